"""What a run tells those who listen: stages that start and end, and values logged while a model trains.

The library emits events and knows nothing of who listens. In a run of several processes only the main one should.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from staff.store.manifest import Artifact
    from staff.store.stage import Stage


@dataclass(frozen=True)
class StageStarted:
    """A stage is about to be run; a stage that is read only ends."""

    stage: Stage


@dataclass(frozen=True)
class StageEnded:
    """A stage was run or read. `artifact` is None if it failed."""

    stage: Stage
    artifact: Artifact | None


@dataclass(frozen=True)
class TrainingLogged:
    """Values of the fine-tuning that is running, such as its loss, after this many optimiser steps."""

    step: int
    values: Mapping[str, float]


Event = StageStarted | StageEnded | TrainingLogged
Listener = Callable[[Event], None]
"""Called with every event, in order, by the thread that does the work. It must not raise."""

_listeners: ContextVar[tuple[Listener, ...]] = ContextVar("listeners", default=())


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Call `listener` with every event of the block."""
    before = _listeners.set((*_listeners.get(), listener))
    try:
        yield
    finally:
        _listeners.reset(before)


def emit(event: Event) -> None:
    """Tell all listeners."""
    for listener in _listeners.get():
        listener(event)
