"""What a stage costs: wall seconds, FLOPs, tokens, peak memory, and the device.

The paper reports selection overhead in hours (figure 4). Hours depend on the machine and FLOPs do not, so both are
recorded. FLOPs are counted from the model's shapes and the real token counts, without padding.

The time of failed attempts at a stage is recorded apart from its cost. An attempt writes its start to a file, and
every `BEAT` seconds the time it has taken. If it is killed, the file remains as last written, so up to `BEAT`
seconds are missing. Work before a checkpoint is not lost: its time is part of the cost of the stage that resumes
there.
"""

import json
import os
import re
import resource
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from staff.runtime import hub
from staff.runtime.machine import processor_name
from staff.store.locks import Busy

BEAT = 5.0
"""Seconds between two updates of the file of an attempt."""


@dataclass(frozen=True)
class Cost:
    """The cost of some work. Costs can be added: ``sum(costs, Cost.zero())``."""

    seconds: float
    """Wall time. A sum of costs has the sum of the times, even if the work ran in parallel."""
    flops: float
    """Floating point operations; a multiply-add counts as two."""
    tokens_forward: int
    """Tokens in forward passes, without padding."""
    tokens_backward: int
    """Tokens in backward passes, without padding."""
    peak_memory_bytes: int
    """Peak memory: allocated on the GPUs, or resident in RAM if no GPU was used."""
    device: str
    """Name of the GPU or processor; several are joined by " + "."""

    def __add__(self, other: "Cost") -> "Cost":
        devices = {*self.device.split(" + "), *other.device.split(" + ")} - {""}
        return Cost(
            self.seconds + other.seconds,
            self.flops + other.flops,
            self.tokens_forward + other.tokens_forward,
            self.tokens_backward + other.tokens_backward,
            max(self.peak_memory_bytes, other.peak_memory_bytes),
            " + ".join(sorted(devices)),
        )

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON holds them."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Cost":
        """The inverse of ``to_dict``, exact to the digit.

        Raises:
            TypeError: a missing or unknown field.
        """
        return cls(**fields)

    @classmethod
    def zero(cls) -> "Cost":
        """The cost of no work, on no device."""
        return cls(0.0, 0.0, 0, 0, 0, "")


class Meter:
    """Measures a ``with`` block. The work inside reports its FLOPs and tokens by ``add``.

    Memory is that of this process, without data-loading workers and other ranks.

    Args:
        checkpoints: folder for the checkpoints of a long stage; None: it saves none.
    """

    def __init__(self, checkpoints: Path | None = None) -> None:
        self.checkpoints = checkpoints
        self._seconds = self._saved = 0.0
        self._started: float | None = None
        self._flops = 0.0
        self._tokens_forward = 0
        self._tokens_backward = 0
        self._peak_memory_bytes = 0
        self._device = ""

    def add(self, flops: float = 0, tokens_forward: int = 0, tokens_backward: int = 0) -> None:
        """Count work: FLOPs, and tokens in forward and backward passes."""
        self._flops += float(flops)
        self._tokens_forward += int(tokens_forward)
        self._tokens_backward += int(tokens_backward)

    def __enter__(self) -> Self:
        for gpu in _gpus_in_use():
            _cuda().synchronize(gpu)
            _cuda().reset_peak_memory_stats(gpu)
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak of resident memory
        self._started = _clock()
        return self

    def __exit__(self, *_: object) -> None:
        gpus = _gpus_in_use()
        for gpu in gpus:
            _cuda().synchronize(gpu)
        self._seconds, self._started = self.seconds, None
        self._peak_memory_bytes = max(self._peak_memory_bytes, peak_memory_bytes())
        self._device = _cuda().get_device_name(gpus[0]) if gpus else processor_name()

    @property
    def seconds(self) -> float:
        """Seconds measured so far. Can be read at any time, from any thread."""
        started = self._started
        return self._seconds + (0.0 if started is None else _clock() - started)

    @property
    def unsaved(self) -> float:
        """Seconds since the last checkpoint, which would be lost if the process were killed now."""
        return self.seconds - self._saved

    def checkpoint(self) -> Cost:
        """The cost so far, to be stored in a checkpoint."""
        with self.paused():
            self._saved = self._seconds
        return self.cost

    def resume(self, checkpoint: Cost) -> None:
        """Add the time that an earlier process spent before the checkpoint from which this one resumes.

        Its FLOPs and tokens are not added: the stage counts those of the whole.
        """
        self._seconds += checkpoint.seconds
        self._saved = checkpoint.seconds
        self._peak_memory_bytes = max(self._peak_memory_bytes, checkpoint.peak_memory_bytes)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the inner block: neither its time nor its memory is measured."""
        self.__exit__()
        try:
            yield
        finally:
            self.__enter__()

    @property
    def cost(self) -> Cost:
        """What was measured and reported. To be read after the block."""
        return Cost(
            self._seconds,
            self._flops,
            self._tokens_forward,
            self._tokens_backward,
            self._peak_memory_bytes,
            self._device,
        )


@contextmanager
def attempt(file: Path, meter: Meter) -> Iterator[list[dict[str, Any]]]:
    """Record the block in `file`, with the seconds of `meter` since its last checkpoint.

    Once the block succeeds, its record and those of earlier attempts are removed.

    Yields:
        The earlier attempts, each with "started" and "seconds"; one that was not killed also has "error", the name
        of the exception.
    """
    earlier = failed_attempts(file)
    this: dict[str, Any] = {"started": datetime.now(UTC).isoformat(timespec="seconds")}
    attempts = [*earlier, this]
    done = threading.Event()

    def write() -> None:
        this["seconds"] = meter.unsaved
        draft = file.with_suffix(".draft")
        draft.write_text(json.dumps(attempts))
        os.replace(draft, file)

    def beat() -> None:
        while not done.wait(BEAT):
            with suppress(OSError):
                write()

    file.parent.mkdir(parents=True, exist_ok=True)
    write()
    heart = threading.Thread(target=beat, daemon=True)
    heart.start()
    try:
        yield earlier
    except Busy:  # not failed, and done again from its start
        attempts.remove(this)
        raise
    except BaseException as error:
        this["error"] = type(error).__name__
        raise
    else:
        attempts.clear()
    finally:
        done.set()
        heart.join()
        with suppress(OSError):
            write() if attempts else file.unlink()


def failed_attempts(file: Path) -> list[dict[str, Any]]:
    """The attempts recorded in a file; empty if there is no file."""
    with suppress(FileNotFoundError, ValueError):
        return json.loads(file.read_text())
    return []


def _clock() -> float:
    """Seconds since some moment, without those spent on downloads."""
    return time.perf_counter() - hub.waited()


def peak_memory_bytes() -> int:
    """Peak memory of this process since a `Meter` last started: on its GPUs, or in RAM if it uses none."""
    gpus = _gpus_in_use()
    return sum(_cuda().max_memory_allocated(gpu) for gpu in gpus) if gpus else _peak_resident_bytes()


def _cuda() -> Any:
    return sys.modules["torch"].cuda


def _gpus_in_use() -> list[int]:
    """The GPUs on which this process has or had memory, without importing torch or initialising a device."""
    if "torch" not in sys.modules or not _cuda().is_initialized():
        return []
    return [gpu for gpu in range(_cuda().device_count()) if _cuda().max_memory_allocated(gpu)]


def _peak_resident_bytes() -> int:
    with suppress(OSError):
        if peak := re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text()):
            return int(peak[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
