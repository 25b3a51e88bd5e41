"""Models and data sets of the Hugging Face hub, as folders of its local cache.

A name is resolved to a commit once in a process. Its files are then fetched by that commit: what the cache has
costs no request. A hub that fails is given up within seconds, in one sentence.

Files in the Xet store are fetched over HTTP too. Their own client (hf_xet) keeps trying for minutes by timers of
its own, so that a failing hub could not be given up in time. For its speed, set HF_HUB_DISABLE_XET=0.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from staff.errors import UserError, in_one_line
from staff.runtime.patience import Patience, Unanswered, over_http, progress_logged

log = logging.getLogger(__name__)

PATIENCE = 15.0
"""Seconds without an answer or any data after which the hub is given up."""
IMPATIENCE = 3.0
"""The same where the cache has a snapshot to use instead."""
AWAY = 60.0
"""Seconds for which a hub that did not answer is not asked about what the cache has."""

LIGHT = {
    "model": ("*.json", "*.jinja", "*.model", "*.spm", "*.tiktoken", "*.txt"),  # configuration and tokenizer
    "dataset": ("README.*",),  # names the files of each configuration
}
"""What is fetched when a name is resolved."""

_FIELDS = {"model": ("family.*.path", "family.*.revision"), "dataset": ("task.hub", "task.revision")}
_INSTEAD = {
    "model": "a local folder: family.target.path=FOLDER family.small.path=FOLDER",
    "dataset": "task.data_dir=FOLDER with train.jsonl and test.jsonl",
}


@dataclass(frozen=True)
class Repository:
    """A model or a data set on the hub.

    Attributes:
        kind: "model" or "dataset".
        revision: branch, tag or commit; None: the default branch.
        gated: it asks for an accepted licence, as far as the configuration knows.
    """

    name: str
    kind: str = "model"
    revision: str | None = None
    gated: bool = False

    def commit(self) -> str:
        """The commit that the revision stands for, fixed within a process.

        If the hub does not answer, it is that of the snapshot in the cache, and the log says so.

        Raises:
            UserError: neither the hub nor the cache has it.
        """
        return _commit(self)

    def fetch(self, patterns: Sequence[str] | None = None, leave_out: Sequence[str] = ("*/*",)) -> Path:
        """The folder of the commit, with the files that match.

        Args:
            patterns: names, where `*` stands for anything; None: those of `LIGHT`.
            leave_out: the same; by default everything in subfolders.

        Raises:
            UserError: the files cannot be fetched, or are damaged.
        """
        return _snapshot(self, self.commit(), LIGHT[self.kind] if patterns is None else patterns, leave_out)


class _Damaged(Exception):
    """A file that does not match its checksum."""


_lock = threading.Lock()
_away_until = 0.0
_waited = 0.0
_asked_once = False


@contextmanager
def asked_once() -> Iterator[None]:
    """Within the block, a hub that did not answer is asked for nothing else, though the cache lacks it."""
    global _asked_once
    before, _asked_once = _asked_once, True
    try:
        yield
    finally:
        _asked_once = before


def waited() -> float:
    """Seconds that this process has spent on the hub, which no stage is charged for."""
    return _waited


@cache
def _commit(repository: Repository) -> str:
    return _snapshot(repository, repository.revision, LIGHT[repository.kind], ("*/*",)).name


def _snapshot(repository: Repository, revision: str | None, patterns: Sequence[str], out: Sequence[str]) -> Path:
    from huggingface_hub import constants

    global _away_until
    what: dict[str, Any] = {"repo_id": repository.name, "repo_type": repository.kind, "revision": revision}
    what |= {"allow_patterns": list(patterns), "ignore_patterns": list(out)}
    with _lock, _counted():
        cached = None
        try:
            cached = _cached(what)
            if cached is None and constants.HF_HUB_OFFLINE:
                raise FileNotFoundError
            if cached is not None and (constants.HF_HUB_OFFLINE or _is_whole(what, cached)):
                return cached
            away = time.monotonic() < _away_until
            if not away or (cached is None and not _asked_once):
                with _alone(repository):
                    held = _cached(what)  # another process may have fetched it meanwhile
                    whole = held is not None and _is_whole(what, held)
                    return held if held is not None and whole else _download(repository, what, cached)
            if cached is None:
                raise Unanswered("it did not answer before")
        except Unanswered as error:
            _away_until = time.monotonic() + AWAY
            if cached is None:
                raise _refusal(repository, error) from error
        except Exception as error:
            raise _refusal(repository, error) from error
        _tell_of_cached(repository, revision, cached, "did not answer")
        return cached


def _cached(what: Mapping[str, Any]) -> Path | None:
    """The folder of the snapshot in the cache; None if there is none, or a file is known to be missing."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(**what, local_files_only=True))
    except FileNotFoundError:
        return None
    # In a cache without a list of the repository's files, the client notices nothing.
    return folder if all((folder / name).is_file() for name in what["allow_patterns"] if "*" not in name) else None


def _is_whole(what: Mapping[str, Any], cached: Path) -> bool:
    """Whether the snapshot is that of a given commit, and known to lack no file."""
    from huggingface_hub import errors, get_cached_repo_tree

    try:
        get_cached_repo_tree(what["repo_id"], repo_type=what["repo_type"], revision=cached.name)
    except errors.CachedRepoTreeNotFoundError:
        return False
    return what["revision"] == cached.name


def _download(repository: Repository, what: Mapping[str, Any], cached: Path | None) -> Path:
    """The folder of the snapshot, as the hub has it; or the cached one, if the hub refuses the name."""
    from huggingface_hub import snapshot_download

    patience = Patience(repository.name, PATIENCE if cached is None else IMPATIENCE, repeat=cached is None)
    before = _blobs(repository)

    def new_blobs() -> set[Path]:
        return _blobs(repository) - before

    with patience.kept(), progress_logged(repository.name, new_blobs), over_http():
        folder = Path(snapshot_download(**what))
    _verify(new_blobs())
    if patience.refused:
        _tell_of_cached(repository, what["revision"], folder, f"refuses it (HTTP {patience.refused})")
    return folder


@contextmanager
def _alone(repository: Repository) -> Iterator[None]:
    """Keeps other processes that share the cache from asking for the same at the same time."""
    from filelock import FileLock
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE) / ".locks"
    lock = FileLock(folder / f"{repo_folder_name(repo_id=repository.name, repo_type=repository.kind)}.lock")
    with suppress(OSError, NotImplementedError):  # a file system that has no locks, or cannot be written to
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _tell_of_cached(repository: Repository, revision: str | None, folder: Path, why: str) -> None:
    if revision != folder.name:
        log.warning("the hub %s: using the cached snapshot %s of %s", why, folder.name, repository.name)


@contextmanager
def _counted() -> Iterator[None]:
    global _waited
    started = time.perf_counter()
    try:
        yield
    finally:
        _waited += time.perf_counter() - started


def _blobs(repository: Repository) -> set[Path]:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=repository.name, repo_type=repository.kind)
    return set((Path(constants.HF_HUB_CACHE) / folder / "blobs").glob("*"))


def _verify(blobs: set[Path]) -> None:
    """Remove files whose content is not what their name, the hub's checksum, says."""
    for blob in sorted(blobs):
        if len(blob.name) == 64:  # of large files, SHA-256
            digest = hashlib.sha256()
        elif len(blob.name) == 40:  # of others, as git has it
            digest = hashlib.sha1(f"blob {blob.stat().st_size}\0".encode(), usedforsecurity=False)
        else:
            continue
        with blob.open("rb") as content:
            while part := content.read(1 << 20):
                digest.update(part)
        if digest.hexdigest() != blob.name:
            pointers = [file for file in blob.parents[1].glob("snapshots/**/*") if file.resolve() == blob.resolve()]
            for file in (*pointers, blob):
                file.unlink(missing_ok=True)
            raise _Damaged(", ".join(sorted({file.name for file in pointers})) or blob.name)


def _refusal(repository: Repository, error: Exception) -> UserError:
    what = {"model": "model", "dataset": "data set"}[repository.kind]
    why, mend = _reason(repository, error)
    return UserError(
        f"the {what} {repository.name!r} cannot be read from the Hugging Face hub ({why}): {mend}, or give "
        f"{_INSTEAD[repository.kind]}."
    )


def _reason(repository: Repository, error: Exception) -> tuple[str, str]:
    """Why it cannot be read, and what to do about it."""
    from huggingface_hub import constants, errors

    name, revision = _FIELDS[repository.kind]
    again = "run the same command again"
    licence = f"accept its licence at {constants.ENDPOINT}/{repository.name} and run `hf auth login`"
    response = _response(error)
    status = getattr(response, "status_code", None)
    code = response.headers.get("X-Error-Code") if response is not None else None
    if isinstance(error, _Damaged):
        return f"{error} does not match its checksum and was removed", again
    if code == "GatedRepo" or (repository.gated and status in (401, 403)):
        return f"it is gated, HTTP {status}", licence
    if code == "RevisionNotFound":
        return f"it has no revision {repository.revision!r}", f"set {revision} to a branch, a tag or a commit of it"
    if status in (401, 403, 404):
        return f"no such name, or a private one, HTTP {status}", f"check {name}, run `hf auth login`"
    if isinstance(error, Unanswered):
        return str(error), f"{licence}, {again}" if repository.gated else again
    if isinstance(error, errors.HFValidationError):
        return "it is neither a folder nor a valid name on the hub", f"check {name}"
    if constants.HF_HUB_OFFLINE:
        mend = f"{licence}, unset it" if repository.gated else "unset it"
        return "HF_HUB_OFFLINE is set, and the cache has no complete snapshot of it", mend
    return in_one_line(error), again


def _response(error: BaseException | None) -> Any:
    """The hub's answer that led to an error; None if it was something else."""
    while error is not None:
        if (response := getattr(error, "response", None)) is not None:
            return response
        error = error.__cause__
    return None
