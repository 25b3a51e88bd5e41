"""The store between stages: whatever was computed once is found by what determines it, and never looks free.

    root/<stage>/<fingerprint>/   the files of an artefact (safetensors, parquet, JSON) and its manifest.json
    root/tmp/                     what is being written
    root/locks/                   one lock file an artefact
    root/attempts/                what was begun and not finished (`staff.attempts`)
    root/checkpoints/             where a long fine-tuning goes on from if it is killed (`staff.checkpoints`)

An artefact is written to a temporary folder, its manifest last, and published by one rename while its lock is held.
So a folder with a manifest is whole, and a process that dies leaves nothing that is read. The manifest tells what
the artefact and everything it was made from cost; whoever reads it is charged the same as whoever made it. It also
holds a checksum of every file, which a process compares when it first reads the artefact.

Of processes that carry out a run together (`staff.distributed`) the first looks, locks, writes and publishes, and
tells the others; they take part in the making, and what they write is thrown away.
"""

import errno
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock, Timeout

from staff import distributed
from staff.attempts import attempt
from staff.cost import Meter
from staff.errors import UserError
from staff.manifest import (
    Artifact,
    Charges,
    check_contents,
    check_sizes,
    digest,
    read_manifest,
    refuse_non_json,
    write_manifest,
)

log = logging.getLogger(__name__)

Make = Callable[[Path, Meter], None]

STAGE_VERSIONS = {"finetune": 2, "scores": 2, "coreset": 2, "evaluation": 1, "model": 1}
"""Part of every fingerprint: raised when a stage's code computes something else than before."""

_READING = ("staff/models.py", "staff/adapters.py", "staff/data.py", "staff/tokens.py")
STAGE_SOURCES: dict[str, tuple[str, ...]] = {
    "finetune": (
        *("staff/finetune.py", "staff/checkpoints.py", "staff/online.py", "staff/trainer.py", "staff/gradients.py"),
        *("staff/training_warnings.py", *_READING),
    ),
    "scores": ("staff/pool.py", "staff/scoring.py", "staff/gradients.py", *_READING),
    "coreset": ("staff/pool.py", "staff/regions.py", "staff/selection.py"),
    "evaluation": ("staff/evaluate.py", *_READING),
    "model": ("staff/models.py", "staff/made.py"),
}
"""The files (or globs) whose change demands a new version of the stage; tests/test_stage_sources.py insists."""

_OF_ONE_PROCESS = ("model",)
"""The stages in whose making nothing is shared out between processes."""

VISIBLE = 60.0
"""Seconds in which a published folder is to be seen by the processes of its run, wherever they are."""

_STORAGE_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ESTALE),
}


@dataclass(frozen=True)
class _Frame:
    """An artefact being made, and what it has read so far."""

    fingerprint: str
    meter: Meter = field(default_factory=Meter)
    inputs: Charges = field(default_factory=dict)


_frames: ContextVar[tuple[_Frame, ...]] = ContextVar("frames", default=())


class Store:
    """The artefacts under one folder, shared by any number of processes.

    Args:
        root: the folder, made on first need.
        workers: how many processes work at the same time on this machine, which seconds depend on;
            recorded. None: unknown.
    """

    def __init__(self, root: Path | str, workers: int | None = 1) -> None:
        self.root = Path(root).absolute()
        self.workers = workers
        self.computed: set[str] = set()
        """Fingerprints of the artefacts that were made through this object rather than read."""
        self._cleaned = False

    @staticmethod
    def fingerprint(stage: str, key: dict[str, Any], version: int | None = None) -> str:
        """SHA-256 over the canonical JSON of stage, version of its code (the present one) and key; touches no file.

        The key names everything that determines the result, the fingerprints of what it reads included (so that
        a new version of an earlier stage is a new version of this one). It holds only what JSON holds.

        Raises:
            TypeError: for anything else in the key (a tuple, a path, a NumPy number, NaN), naming its place.
        """
        refuse_non_json(key, f"{stage} key")
        return digest({"stage": stage, "version": version or STAGE_VERSIONS[stage], "key": key})

    def get(
        self, stage: str, key: dict[str, Any], make: Make, *, label: str = "", foresee: Make | None = None
    ) -> Artifact:
        """Read the artefact of this stage and key; make it if there is none, or wait for whoever is making it.

        ``make(folder, meter)`` writes files into the empty folder and adds FLOPs and tokens to the meter. What it
        gets from the store in turn becomes an input of this artefact, and none of that time counts as its own.
        What it raises is raised here, and nothing is published. ``label`` says what it is, in log and manifest.

        ``foresee(folder, meter)`` adds the same FLOPs and tokens without loading a model, and writes stand-ins of
        the files that others read: the store of `experiments.plan` calls it instead; this one never does.

        Raises:
            UserError: the store's folder cannot be used, or the artefact in it is damaged.
        """
        fingerprint = self.fingerprint(stage, key)
        name = f"{stage} {fingerprint[:8]}"
        name = f"{label} ({name})" if label else name
        frames = _frames.get()
        if any(frame.fingerprint == fingerprint for frame in frames):
            raise RuntimeError(f"making {name} asks for itself")
        with frames[-1].meter.paused() if frames else nullcontext(), self._storage_errors(), ExitStack() as held:

            def look() -> Artifact | None:
                if not self._cleaned:
                    self.remove_dead_drafts()
                artifact = self._read(stage, fingerprint)
                if artifact is None:
                    held.enter_context(self._lock(fingerprint, name))
                    artifact = self._read(stage, fingerprint)
                return artifact

            artifact = distributed.from_first(look)
            if artifact is None and stage in _OF_ONE_PROCESS:
                artifact = distributed.from_first(lambda: self._make(stage, label, fingerprint, key, make))
            elif artifact is None:
                first = distributed.first()
                made = self._make(stage, label, fingerprint, key, make) if first else _take_part(fingerprint, make)
                artifact = distributed.from_first(lambda: made)
            assert artifact is not None
            if not distributed.first():
                _await(artifact.path)
        if artifact.computed:
            self.computed.add(fingerprint)
        how = "computed in {:.1f} s" if artifact.computed else "read (cost {:.1f} s)"
        log.info("%s: %s", name, how.format(artifact.cost.seconds))
        if frames:
            frames[-1].inputs.update(artifact.charged())
        return artifact

    def find(self, stage: str, key: dict[str, Any]) -> Artifact | None:
        """The artefact if it is published; never makes it, waits for it, or makes it anybody's input. For what it
        cost: its files are not compared with their checksums."""
        with self._storage_errors():
            return self._read(stage, self.fingerprint(stage, key), contents=False)

    def _read(self, stage: str, fingerprint: str, *, contents: bool = True) -> Artifact | None:
        folder = self.root / stage / fingerprint[:32]
        if not (folder / "manifest.json").exists():
            return None
        manifest, artifact = read_manifest(folder)
        check_sizes(folder, manifest)
        if contents:
            _check_contents_once(folder, (folder / "manifest.json").stat().st_mtime_ns)
        return artifact

    def remove_dead_drafts(self) -> None:
        """Remove what processes that are no more were writing: the temporary folders whose lock nobody holds."""
        self._cleaned = True
        for draft in (self.root / "tmp").glob("*-*"):
            lock = FileLock(self.root / "locks" / f"{draft.name[:32]}.lock", timeout=0)
            with suppress(OSError, Timeout), lock:  # alive, or a store that is only read
                shutil.rmtree(draft)

    def remove(self, artifact: Path) -> None:
        """Take a published folder out of the store; from one moment to the next it is not there."""
        with self._lock(artifact.name, str(artifact)):
            draft = self.root / "tmp" / f"{artifact.name}-{uuid.uuid4().hex}"
            draft.parent.mkdir(exist_ok=True)
            os.rename(artifact, draft)
            shutil.rmtree(draft)

    def at_work(self) -> list[Path]:
        """The locks that some process holds."""
        held = []
        for file in (self.root / "locks").glob("*.lock"):
            try:
                with FileLock(file, timeout=0):
                    pass
            except Timeout:
                held.append(file)
        return held

    def _make(self, stage: str, label: str, fingerprint: str, key: dict[str, Any], make: Make) -> Artifact:
        self._mention_older(stage, label, key)
        prefix = f"{fingerprint[:32]}-"
        for dead in (self.root / "tmp").glob(f"{prefix}*"):  # we hold the lock, so whoever wrote there is gone
            shutil.rmtree(dead, ignore_errors=True)
        draft = self.root / "tmp" / f"{prefix}{uuid.uuid4().hex}"
        draft.mkdir(parents=True)
        folder = self.root / stage / fingerprint[:32]
        frame = _Frame(fingerprint)
        outer = _frames.set((*_frames.get(), frame))
        try:
            with attempt(self.attempts(fingerprint), frame.meter) as lost:
                with frame.meter:
                    make(draft, frame.meter)
                facts = {
                    "stage": stage,
                    "version": STAGE_VERSIONS[stage],
                    "fingerprint": fingerprint,
                    "label": label,
                    "key": key,
                    "lost_attempts": lost,
                    "workers": self.workers,
                    "processes": 1 if stage in _OF_ONE_PROCESS else distributed.world(),
                }
                write_manifest(draft, facts, frame.meter.cost, frame.inputs)
                folder.parent.mkdir(parents=True, exist_ok=True)
                if folder.exists():  # without a manifest, or it would have been read
                    shutil.rmtree(folder)
                os.rename(draft, folder)
            shutil.rmtree(self.checkpoints(fingerprint), ignore_errors=True)
        finally:
            _frames.reset(outer)
            shutil.rmtree(draft, ignore_errors=True)
        return replace(read_manifest(folder)[1], computed=True)

    def attempts(self, fingerprint: str) -> Path:
        """The file that tells of attempts at an artefact which led to nothing."""
        return self.root / "attempts" / f"{fingerprint[:32]}.json"

    def checkpoints(self, fingerprint: str) -> Path:
        """The folder for checkpoints of an artefact in the making, removed once it is published."""
        return self.root / "checkpoints" / fingerprint[:32]

    def _mention_older(self, stage: str, label: str, key: dict[str, Any]) -> None:
        for version in range(1, STAGE_VERSIONS[stage]):
            folder = self.root / stage / self.fingerprint(stage, key, version)[:32]
            if folder.exists():
                said = "%s: version %d of this stage made it in %s, which is not read any more: it is made anew"
                log.info(said, label or stage, version, folder)

    @contextmanager
    def _lock(self, fingerprint: str, name: str) -> Iterator[None]:
        locks = self.root / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        lock = FileLock(locks / f"{fingerprint[:32]}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            log.info("%s: waiting for another process", name)
            lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def _storage_errors(self) -> Iterator[None]:
        """Say what ails the store's disk or folder in one sentence; errors of other places pass unchanged."""
        try:
            yield
        except Exception as error:
            filename = getattr(error, "filename", None)
            where = self.root if filename is None else Path(str(filename))
            ours = where.is_relative_to(self.root) or self.root.is_relative_to(where)
            if _error_number(error) not in _STORAGE_ERRORS or not ours:
                raise
            raise UserError(
                f"the store in {self.root} cannot be used ({getattr(error, 'strerror', None) or error}: {where}); "
                "mend that or name another folder with store_dir=PATH"
            ) from error


def _take_part(fingerprint: str, make: Make) -> None:
    """A process's part of what the first one makes; what it writes is of no use to anybody."""
    frame = _Frame(fingerprint)
    outer = _frames.set((*_frames.get(), frame))
    try:
        with TemporaryDirectory() as nowhere, frame.meter:
            make(Path(nowhere), frame.meter)
    finally:
        _frames.reset(outer)


def _await(folder: Path) -> None:
    """Until what another process has published is seen here: a network file system may take a while."""
    deadline = time.monotonic() + VISIBLE
    while not (folder / "manifest.json").exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"{folder} was published by another process of this run and is not there for this one: store_dir "
                "must be a folder that all of them share."
            )
        time.sleep(0.1)


@cache
def _check_contents_once(folder: Path, made: int) -> None:
    """Once a process for what was published at the time `made`: it takes about as long as loading."""
    check_contents(folder, read_manifest(folder)[0])


def _error_number(error: Exception) -> int | None:
    """The errno of an OSError, or of the same failure as safetensors' Rust code words it."""
    if isinstance(error, OSError):
        return error.errno
    rust = re.search(r"\(os error (\d+)\)", str(error))
    return int(rust[1]) if rust else None
