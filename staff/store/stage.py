"""Stages: work that is done once and identified by everything that determines its result."""

from __future__ import annotations

import inspect
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from staff.store.manifest import digest, refuse_non_json

if TYPE_CHECKING:
    from staff.store.cost import Meter
    from staff.store.manifest import Artifact


class Stage(ABC):
    """One stage of an experiment, such as a fine-tuning. Implementations are frozen dataclasses.

    Attributes:
        kind: the stage's folder in the store.
        version: to be raised when the code computes other numbers than before. The stage, and all that depend on
            it, are then computed again. Changed messages or names need no new version.
            `tests/test_stage_numbers.py` recomputes a small slice of every stage, and fails where numbers changed
            without a new version.
        one_process: whether only the main process runs it, while the others wait.
    """

    kind: ClassVar[str]
    version: ClassVar[int]
    one_process: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """What the stage does, in words, for logs and manifests."""
        return self.kind

    @property
    def inputs(self) -> tuple[Stage, ...]:
        """The stages whose artefacts `run` is given, in this order. Their fingerprints are part of this one's."""
        return ()

    @abstractmethod
    def key(self) -> dict[str, Any]:
        """Everything besides `inputs` that determines the result, as JSON holds it."""

    @abstractmethod
    def run(self, folder: Path, meter: Meter, *inputs: Artifact) -> None:
        """Do the work: write files to the empty `folder`, and add FLOPs and tokens to `meter`.

        Artefacts that the stage gets from the store while it runs become inputs of its artefact too.
        """

    def estimate(self, folder: Path, meter: Meter, *inputs: Artifact) -> None:
        """Do the stage's part of a dry run, without loading weights.

        It adds the same FLOPs and tokens, computed from shapes, and writes placeholders for the files that other
        stages read. The default runs the stage.
        """
        self.run(folder, meter, *inputs)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of kind, version, key and the inputs' fingerprints: 64 hexadecimal digits.

        Raises:
            TypeError: a value in the key that JSON cannot hold (a tuple, a path, a NumPy number, NaN).
        """
        return self.fingerprint_of(self.version)

    def fingerprint_of(self, version: int) -> str:
        """The fingerprint of an older version of this stage."""
        key = self.key()
        refuse_non_json(key, f"{self.kind} key")
        inputs = [stage.fingerprint for stage in self.inputs]
        return digest({"stage": self.kind, "version": version, "key": key, "inputs": inputs})


def identity(part: Any) -> dict[str, Any]:
    """What determines the behaviour of a method, signal or generator: its class, fields and code.

    A class with a `version` is identified by it, and must raise it when its numbers change. A class without one,
    such as a user's own, is identified by the text of its file. A class that reads the file in its field `path` has
    the property `content_digest`, which replaces the path.
    """
    kind = type(part)
    settings = {f.name: plain(getattr(part, f.name)) for f in fields(part)} if is_dataclass(part) else {}
    known: dict[str, Any] = {"class": f"{kind.__module__}.{kind.__qualname__}", "settings": settings}
    version = getattr(kind, "version", None)
    source = inspect.getsource(sys.modules[kind.__module__]) if version is None else ""
    known["version"] = version if version is not None else sha256(source.encode()).hexdigest()
    if content := getattr(part, "content_digest", None):
        known["content"] = content
        settings.pop("path", None)
    return known


def plain(value: Any) -> Any:
    """`value` as JSON holds it: tuples as lists, dataclasses as dictionaries, methods and signals by `identity`."""
    if is_dataclass(value) and not isinstance(value, type):
        if any(hasattr(value, name) for name in ("select", "compute")):
            return identity(value)
        return {field.name: plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value


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
    """Call all listeners with an event."""
    for listener in _listeners.get():
        listener(event)
