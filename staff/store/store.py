"""The store of results: each is computed once, found by its fingerprint, and its cost counts for every reader.

    root/<kind>/<fingerprint>/    the files of an artefact (safetensors, parquet, JSON) and its manifest.json
    root/tmp/                     artefacts that are being written
    root/locks/                   a lock file for each artefact
    root/attempts/                stages that were started and not finished (`staff.store.cost`)
    root/checkpoints/             checkpoints of long stages, to resume from
    root/samples/                 the samples of large data files, once read (`staff.data.stored`)

An artefact is written to a temporary folder, its manifest last, and published by one rename under its lock. So a
folder with a manifest is complete, and a process that dies leaves nothing that is read. The manifest records the
cost of the artefact and of everything it was made from; every reader is charged this cost, like the process that
computed it. It also has a checksum of every file, which a process verifies when it first reads the artefact.

In a run of several processes (`staff.runtime.processes`) the main process finds, locks, writes and publishes
artefacts for all. The others take part in the work, and the files they write are discarded.
"""

import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from filelock import Timeout

from staff.errors import UserError
from staff.runtime import processes
from staff.runtime.files import storage_failure
from staff.store.cost import Meter, attempt
from staff.store.locks import Busy, check_locks_between_nodes, file_lock, is_free, turn
from staff.store.manifest import (
    Artifact,
    Charges,
    await_manifest,
    check_contents_once,
    check_sizes,
    read_manifest,
    write_manifest,
)
from staff.store.stage import Stage, StageEnded, StageStarted, emit

log = logging.getLogger(__name__)

SAMPLES = "samples"
RESERVED = ("tmp", "locks", "attempts", "checkpoints", SAMPLES)
"""Folders of the store that hold no artefacts."""


@dataclass(frozen=True)
class _Frame:
    """A stage that is running, and what it has read so far."""

    fingerprint: str
    meter: Meter
    inputs: Charges = field(default_factory=dict)


_frames: ContextVar[tuple[_Frame, ...]] = ContextVar("frames", default=())


class Store:
    """The artefacts under one folder, shared by any number of processes.

    Args:
        root: the folder, created when it is first needed.
        workers: how many processes work on this machine at the same time, since seconds depend on it. Recorded in
            manifests. None: unknown.
    """

    def __init__(self, root: Path | str, workers: int | None = 1) -> None:
        self.root = Path(root).absolute()
        self.workers = workers
        self.computed: set[str] = set(turn.get().computed)
        """Fingerprints of the artefacts that this object, or its job in an earlier turn, computed."""
        self.used: set[str] = set()
        """Fingerprints of the artefacts that this object gave, and of all that these were made from."""
        self._begun = False

    def get(self, stage: Stage) -> Artifact:
        """The artefact of `stage`: read it, wait for the process that is computing it, or run the stage.

        Artefacts that the stage itself gets from the store become inputs of its own; their time is not part of its
        cost. An error in the stage is raised here, and nothing is published.

        Raises:
            UserError: the store's folder cannot be used, or the artefact in it is damaged.
            Busy: another process is computing it, and this one may not wait (`staff.store.locks`).
        """
        name = f"{stage.label} ({stage.kind} {stage.fingerprint[:8]})"
        frames = _frames.get()
        if any(frame.fingerprint == stage.fingerprint for frame in frames):
            raise RuntimeError(f"{name} asks for itself")
        with frames[-1].meter.paused() if frames else nullcontext(), self._storage_errors(), ExitStack() as held:
            if not self._begun:
                check_locks_between_nodes(self.root)
                processes.broadcast_from_main(self.remove_dead_drafts)
                self._begun = True

            def look() -> Artifact | None:
                artifact = self._read(stage)
                if artifact is None:
                    held.enter_context(self._lock(stage.fingerprint, name, turn.get().may_wait))
                    artifact = self._read(stage)
                return artifact

            artifact = processes.broadcast_from_main(look)
            if artifact is None:
                artifact = self._run_with_events(stage)
            if not processes.is_main_process():
                await_manifest(artifact.path)
        how = "computed in {:.1f} s" if artifact.computed else "read (cost {:.1f} s)"
        known = not artifact.computed and stage.fingerprint in self.used
        log.log(logging.DEBUG if known else logging.INFO, "%s: %s", name, how.format(artifact.cost.seconds))
        emit(StageEnded(stage, artifact))
        if artifact.computed:
            self.computed.add(stage.fingerprint)
        self.used |= artifact.charged().keys()
        if frames:
            frames[-1].inputs.update(artifact.charged())
        return artifact

    def find(self, stage: Stage) -> Artifact | None:
        """The artefact if it is published, otherwise None.

        This never computes it, waits for it, or records it as an input. It is for the artefact's cost alone:
        checksums are not verified.
        """
        with self._storage_errors():
            return self._read(stage, contents=False)

    def folder(self, stage: Stage) -> Path:
        """The folder of the stage's artefact, once it is published."""
        return self.root / stage.kind / stage.fingerprint[:32]

    def carry_out(self, stage: Stage, folder: Path, meter: Meter, inputs: list[Artifact]) -> None:
        """Do the stage's work in an empty folder."""
        stage.run(folder, meter, *inputs)

    def remove_dead_drafts(self) -> None:
        """Remove what dead processes left: temporary folders whose lock is free, and the attempts and checkpoints
        of artefacts that are published."""
        for draft in (self.root / "tmp").glob("*-*"):
            lock = file_lock(self.root / "locks" / f"{draft.name[:32]}.lock", timeout=0)
            with suppress(OSError, Timeout), lock:  # a live process, or a store that is only read
                shutil.rmtree(draft)
        for left in (*(self.root / "attempts").glob("*"), *(self.root / "checkpoints").glob("*")):
            if any(self.root.glob(f"*/{left.name[:32]}/manifest.json")):
                with suppress(OSError):
                    shutil.rmtree(left) if left.is_dir() else left.unlink()

    def remove(self, artifact: Path) -> None:
        """Remove a published folder, atomically for readers."""
        with self._lock(artifact.name, str(artifact)):
            draft = self.root / "tmp" / f"{artifact.name}-{uuid.uuid4().hex}"
            draft.parent.mkdir(exist_ok=True)
            os.rename(artifact, draft)
            shutil.rmtree(draft)

    def held_locks(self) -> list[Path]:
        """The lock files that some process holds."""
        return [file for file in (self.root / "locks").glob("*.lock") if not is_free(file)]

    def attempts(self, stage: Stage) -> Path:
        """The file that records failed attempts at the stage."""
        return self.root / "attempts" / f"{stage.fingerprint[:32]}.json"

    def checkpoints(self, stage: Stage) -> Path:
        """The folder for the stage's checkpoints, removed once its artefact is published."""
        return self.root / "checkpoints" / stage.fingerprint[:32]

    def _read(self, stage: Stage, *, contents: bool = True) -> Artifact | None:
        folder = self.folder(stage)
        if not (folder / "manifest.json").exists():
            return None
        manifest, artifact = read_manifest(folder)
        check_sizes(folder, manifest)
        if contents:
            check_contents_once(folder, (folder / "manifest.json").stat().st_mtime_ns)
        return artifact

    def _mention_older(self, stage: Stage) -> None:
        for version in range(1, stage.version):
            older = self.root / stage.kind / stage.fingerprint_of(version)[:32]
            if older.exists():
                said = "%s: %s was computed by version %d of this stage, and is not read"
                log.info(said, stage.label, older, version)

    def _run_with_events(self, stage: Stage) -> Artifact:
        emit(StageStarted(stage))
        try:
            return self._run(stage)
        except BaseException:
            emit(StageEnded(stage, None))
            raise

    def _run(self, stage: Stage) -> Artifact:
        """Run the stage in the main process, or in all. Its inputs are got by all of them in either case."""
        with self._frame(stage) as (frame, inputs):

            def make() -> Artifact:
                return self._make(stage, frame, inputs)

            if stage.one_process:
                return processes.broadcast_from_main(make)
            made = make() if processes.is_main_process() else self._take_part(stage, frame, inputs)
            artifact = processes.broadcast_from_main(lambda: made)
            assert artifact is not None
            return artifact

    def _make(self, stage: Stage, frame: _Frame, inputs: list[Artifact]) -> Artifact:
        self._mention_older(stage)
        prefix = f"{stage.fingerprint[:32]}-"
        for dead in (self.root / "tmp").glob(f"{prefix}*"):  # we hold the lock, so its writer is dead
            shutil.rmtree(dead, ignore_errors=True)
        draft = self.root / "tmp" / f"{prefix}{uuid.uuid4().hex}"
        draft.mkdir(parents=True)
        folder = self.folder(stage)
        try:
            with attempt(self.attempts(stage), frame.meter) as failed:
                with frame.meter:
                    self.carry_out(stage, draft, frame.meter, inputs)
                facts = {
                    "stage": stage.kind,
                    "version": stage.version,
                    "fingerprint": stage.fingerprint,
                    "label": stage.label,
                    "key": stage.key(),
                    "failed_attempts": failed,
                    "workers": self.workers,
                    "processes": 1 if stage.one_process else processes.world_size(),
                }
                write_manifest(draft, facts, frame.meter.cost, frame.inputs)
                folder.parent.mkdir(parents=True, exist_ok=True)
                if folder.exists():  # without a manifest, or it would have been read
                    shutil.rmtree(folder)
                os.rename(draft, folder)
            shutil.rmtree(self.checkpoints(stage), ignore_errors=True)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return replace(read_manifest(folder)[1], computed=True)

    def _take_part(self, stage: Stage, frame: _Frame, inputs: list[Artifact]) -> None:
        """Another process's part of what the main one makes; the files it writes are discarded."""
        with TemporaryDirectory() as discarded, frame.meter:
            self.carry_out(stage, Path(discarded), frame.meter, inputs)

    @contextmanager
    def _frame(self, stage: Stage) -> Iterator[tuple[_Frame, list[Artifact]]]:
        """Record what the block gets from the store as inputs of the stage, after the stage's own inputs."""
        frame = _Frame(stage.fingerprint, Meter(self.checkpoints(stage)))
        outer = _frames.set((*_frames.get(), frame))
        try:
            yield frame, [self.get(stage) for stage in stage.inputs]
        finally:
            _frames.reset(outer)

    @contextmanager
    def _lock(self, fingerprint: str, name: str, may_wait: bool = True) -> Iterator[None]:
        locks = self.root / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        lock = file_lock(locks / f"{fingerprint[:32]}.lock")
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            if not may_wait:
                raise Busy(name, Path(lock.lock_file), self.computed) from None
            log.info("%s: waiting for another process", name)
            held = lock.acquire()
        with held:
            yield

    @contextmanager
    def _storage_errors(self) -> Iterator[None]:
        """Turn errors of the store's disk or folder into a `UserError`; other errors pass unchanged."""
        try:
            yield
        except Exception as error:
            filename = getattr(error, "filename", None)
            where = self.root if filename is None else Path(str(filename))
            ours = where.is_relative_to(self.root) or self.root.is_relative_to(where)
            if (why := storage_failure(error)) is None or not ours:
                raise
            raise UserError(
                f"the store in {self.root} cannot be used ({why}: {where}); "
                "fix this or set another folder with store_dir=PATH"
            ) from error
