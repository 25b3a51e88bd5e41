"""Locks on files, and a job's turn on a worker: whether it may wait for a lock, or gives the worker up instead.

The locks hold between all processes and machines that see the file system. They are those of `flock`: the system
frees them when their holder dies. Files that stand for locks would outlive it, so a file system without `flock` is
refused.
"""

from __future__ import annotations

import errno
from collections.abc import Collection
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from staff.errors import UserError
from staff.runtime import processes


def file_lock(file: Path, timeout: float = -1) -> FileLock:
    """A lock on a file, not acquired yet.

    Args:
        timeout: seconds to wait for it; -1: without end.
    """
    return FileLock(file, timeout=timeout, fallback_to_soft=False)


def is_free(file: Path) -> bool:
    """Whether no process holds the lock."""
    try:
        with file_lock(file, timeout=0):
            return True
    except Timeout:
        return False


def check_locks_between_nodes(folder: Path) -> None:
    """Have the processes of a run try one lock, before they begin. One process alone has nothing to try, and a
    store that they can only read needs no locks.

    Raises:
        UserError: a process got the lock that the main process held.
    """
    if processes.world_size() == 1:
        return
    held = file_lock(folder / "locks" / "probe.lock")
    if not processes.broadcast_from_main(lambda: _acquired(held)):
        return
    got = False
    with processes.raise_on_all_ranks():
        got = not processes.is_main_process() and is_free(folder / "locks" / "probe.lock")
    double = any(processes.all_gather(got))
    if processes.is_main_process():
        held.release()
    if double:
        raise UserError(
            f"store_dir={folder}: two nodes held one lock at once, so its file system has no locks between "
            "them: mount it with flock (NFS 4, or Lustre with -o flock), or name a folder of another file system."
        )


def _acquired(lock: FileLock) -> bool:
    try:
        Path(lock.lock_file).parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        return False
    return True


@dataclass(frozen=True)
class Turn:
    """What a job may do on a worker, and what it did in its earlier turns.

    Attributes:
        may_wait: False: it raises `Busy` instead of waiting for a stage that another process runs.
        computed: fingerprints of the artefacts that it computed in its earlier turns.
    """

    may_wait: bool = True
    computed: frozenset[str] = frozenset()


_ALONE = Turn()
turn: ContextVar[Turn] = ContextVar("turn", default=_ALONE)
"""The turn that this process is in."""


class Busy(BaseException):
    """Another process runs a stage that the job needs. It is no `Exception`: what ran has not failed.

    Attributes:
        stage: what it is, in words.
        lock: the file that the other process has locked.
        computed: fingerprints of the artefacts that the job has computed so far.
    """

    def __init__(self, stage: str, lock: Path, computed: Collection[str]) -> None:
        super().__init__(stage, lock, computed)  # as pickle makes it again
        self.stage = stage
        self.lock, self.computed = lock, frozenset(computed)
