"""A job's turn on a worker: whether it may wait for other processes there, or gives the worker up instead."""

from __future__ import annotations

from collections.abc import Collection
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path


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
