"""The store between stages: whatever was computed once is found by what determines it, and never looks free.

    root/<stage>/<fingerprint>/   the files of an artefact (safetensors, parquet, JSON) and its manifest.json
    root/tmp/                     what is being written
    root/locks/                   one lock file an artefact

An artefact is written to a temporary folder, its manifest last, and published by one rename while its lock is held.
So a folder with a manifest is whole, and a process that dies leaves nothing that is read. The manifest tells what
the artefact and everything it was made from cost; whoever reads it is charged the same as whoever made it.
"""

import errno
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from staff.cost import Cost, Meter
from staff.errors import UserError

log = logging.getLogger(__name__)

STAGE_VERSIONS = {"finetune": 1, "scores": 1, "coreset": 1, "evaluation": 1, "model": 1}
"""Part of every fingerprint: raised when a stage's code computes something else than before."""

STAGE_SOURCES: dict[str, tuple[str, ...]] = {
    "finetune": (
        "staff/finetune.py",
        "staff/online.py",
        "staff/trainer.py",
        "staff/gradients.py",
        "staff/models.py",
        "staff/data.py",
    ),
    "scores": ("staff/pool.py", "staff/scoring.py", "staff/gradients.py", "staff/models.py", "staff/data.py"),
    "coreset": ("staff/pool.py", "staff/regions.py", "staff/selection.py"),
    "evaluation": ("staff/evaluate.py", "staff/models.py", "staff/data.py"),
    "model": ("staff/models.py", "staff/made.py"),
}
"""The files (or globs) whose change demands a new version of the stage; tests/test_stage_sources.py insists."""


class Charge(NamedTuple):
    """What one artefact is charged at, and what it is to a reader."""

    stage: str
    label: str
    cost: Cost


Charges = dict[str, Charge]
"""By fingerprint, one entry a distinct artefact."""

_STORAGE_ERRORS = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ESTALE),
}


@dataclass(frozen=True)
class Artifact:
    """A published folder, and what it is charged at."""

    path: Path
    """The folder with the files; nobody changes it any more."""
    stage: str
    label: str
    """What it is, in words; no part of the fingerprint."""
    fingerprint: str
    """64 hexadecimal digits; the folder is named by the first 32."""
    cost: Cost
    """Of making this one, without what it read."""
    inputs: Charges
    """What it was made from, transitively."""
    computed: bool
    """True where this call made it, False where it was read."""

    def charged(self) -> Charges:
        """Itself and everything it was made from; merge such dictionaries and every artefact counts once."""
        return {**self.inputs, self.fingerprint: Charge(self.stage, self.label, self.cost)}


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

    @staticmethod
    def fingerprint(stage: str, key: dict[str, Any]) -> str:
        """SHA-256 over the canonical JSON of stage, version of its code and key; touches no file.

        The key names everything that determines the result, the fingerprints of what it reads included (so that
        a new version of an earlier stage is a new version of this one). It holds only what JSON holds.

        Raises:
            TypeError: for anything else in the key (a tuple, a path, a NumPy number, NaN), naming its place.
        """
        _refuse_non_json(key, f"{stage} key")
        canonical = json.dumps(
            {"stage": stage, "version": STAGE_VERSIONS[stage], "key": key}, sort_keys=True, separators=(",", ":")
        )
        return hashlib.sha256(canonical.encode()).hexdigest()

    def get(
        self, stage: str, key: dict[str, Any], make: Callable[[Path, Meter], None], *, label: str = ""
    ) -> Artifact:
        """Read the artefact of this stage and key; make it if there is none, or wait for whoever is making it.

        ``make(folder, meter)`` writes files into the empty folder and adds FLOPs and tokens to the meter. What it
        gets from the store in turn becomes an input of this artefact, and none of that time counts as its own.
        What it raises is raised here, and nothing is published. ``label`` says what it is, in log and manifest.

        Raises:
            UserError: the store's folder cannot be used, or the artefact in it is damaged.
        """
        fingerprint = self.fingerprint(stage, key)
        name = f"{stage} {fingerprint[:8]}"
        name = f"{label} ({name})" if label else name
        frames = _frames.get()
        if any(frame.fingerprint == fingerprint for frame in frames):
            raise RuntimeError(f"making {name} asks for itself")
        with frames[-1].meter.paused() if frames else nullcontext(), self._storage_errors():
            artifact = self._read(stage, fingerprint)
            if artifact is None:
                with self._lock(fingerprint, name):
                    artifact = self._read(stage, fingerprint) or self._make(stage, label, fingerprint, key, make)
        if artifact.computed:
            self.computed.add(fingerprint)
        how = "computed in {:.1f} s" if artifact.computed else "read (cost {:.1f} s)"
        log.info("%s: %s", name, how.format(artifact.cost.seconds))
        if frames:
            frames[-1].inputs.update(artifact.charged())
        return artifact

    def find(self, stage: str, key: dict[str, Any]) -> Artifact | None:
        """The artefact if it is published; never makes it, waits for it, or makes it anybody's input."""
        with self._storage_errors():
            return self._read(stage, self.fingerprint(stage, key))

    def _read(self, stage: str, fingerprint: str, computed: bool = False) -> Artifact | None:
        folder = self.root / stage / fingerprint[:32]
        if not (folder / "manifest.json").exists():
            return None
        mend = f"delete the folder {folder} and it is made again"
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            sizes = {name: entry["size"] for name, entry in manifest["files"].items()}
            cost = Cost.from_dict(manifest["cost"])
            label = manifest["label"]
            inputs = {
                read: Charge(entry["stage"], entry["label"], Cost.from_dict(entry["cost"]))
                for read, entry in manifest["inputs"].items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder / 'manifest.json'} is damaged ({error!r}); {mend}") from error
        for name, size in sizes.items():
            file = folder / name
            if not file.is_file():
                raise UserError(f"{file} is missing from its artefact; {mend}")
            if (found := file.stat().st_size) != size:
                raise UserError(f"{file} has {found} bytes where its manifest says {size}; {mend}")
        return Artifact(folder, stage, label, fingerprint, cost, inputs, computed)

    def _make(
        self, stage: str, label: str, fingerprint: str, key: dict[str, Any], make: Callable[[Path, Meter], None]
    ) -> Artifact:
        prefix = f"{fingerprint[:32]}-"
        for dead in (self.root / "tmp").glob(f"{prefix}*"):  # we hold the lock, so whoever wrote there is gone
            shutil.rmtree(dead, ignore_errors=True)
        draft = self.root / "tmp" / f"{prefix}{uuid.uuid4().hex}"
        draft.mkdir(parents=True)
        frame = _Frame(fingerprint)
        outer = _frames.set((*_frames.get(), frame))
        try:
            with frame.meter:
                make(draft, frame.meter)
            self._write_manifest(draft, stage, label, key, frame)
            folder = self.root / stage / fingerprint[:32]
            folder.parent.mkdir(parents=True, exist_ok=True)
            if folder.exists():  # without a manifest, or it would have been read
                shutil.rmtree(folder)
            os.rename(draft, folder)
        finally:
            _frames.reset(outer)
            shutil.rmtree(draft, ignore_errors=True)
        artifact = self._read(stage, fingerprint, computed=True)
        assert artifact is not None
        return artifact

    def _write_manifest(self, draft: Path, stage: str, label: str, key: dict[str, Any], frame: _Frame) -> None:
        manifest = {
            "stage": stage,
            "label": label,
            "version": STAGE_VERSIONS[stage],
            "fingerprint": frame.fingerprint,
            "key": key,
            "files": {
                file.relative_to(draft).as_posix(): {"size": file.stat().st_size, "sha256": _seal(file)}
                for file in sorted(draft.rglob("*"))
                if file.is_file()
            },
            "cost": frame.meter.cost.to_dict(),
            "inputs": {
                read: {"stage": charge.stage, "label": charge.label, "cost": charge.cost.to_dict()}
                for read, charge in frame.inputs.items()
            },
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": library_versions(),
            "workers": self.workers,
        }
        with (draft / "manifest.json").open("x", encoding="utf-8") as file:
            json.dump(manifest, file, indent=1)
        _seal(draft / "manifest.json")

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


def _error_number(error: Exception) -> int | None:
    """The errno of an OSError, or of the same failure as safetensors' Rust code words it."""
    if isinstance(error, OSError):
        return error.errno
    rust = re.search(r"\(os error (\d+)\)", str(error))
    return int(rust[1]) if rust else None


def _refuse_non_json(value: Any, place: str) -> None:
    if type(value) is dict:
        for name, entry in value.items():
            if type(name) is not str:
                raise TypeError(f"{place} has the name {name!r}, which is no string")
            _refuse_non_json(entry, f"{place}.{name}")
    elif type(value) is list:
        for position, entry in enumerate(value):
            _refuse_non_json(entry, f"{place}[{position}]")
    elif type(value) not in (str, int, float, bool, type(None)):
        raise TypeError(f"{place} is {value!r}, a {type(value).__name__}: a key holds only what JSON holds")
    elif type(value) is float and not float("-inf") < value < float("inf"):
        raise TypeError(f"{place} is {value!r}, which JSON cannot hold")


def _seal(file: Path) -> str:
    """Bring a file to the disk, so that no power cut publishes an empty one, and return its SHA-256."""
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        return hashlib.file_digest(stream, "sha256").hexdigest()


@cache
def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that numbers depend on, without importing them."""
    versions = {"python": platform.python_version()}
    for name in ("numpy", "torch", "transformers", "peft", "safetensors", "pyarrow"):
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return versions
