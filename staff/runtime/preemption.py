"""Signals that ask a process to end soon: SIGTERM, SIGUSR1 and SIGUSR2, as schedulers send them before they kill.

A fine-tuning defers them to the end of its step, saves a checkpoint, and stops (`staff.training.checkpoints`). Then
the signal takes its usual course: a launcher may handle it and requeue the job, and a process without a handler is
ended by it. The application ends with the exit status `RESUMABLE`, wherever it is.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

RESUMABLE = os.EX_TEMPFAIL
"""Exit status 75: the process was asked to end, and the same command resumes."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


class Preempted(SystemExit):
    """Ends the process with the status `RESUMABLE`. It is no `Exception`: what ran has not failed."""

    def __init__(self) -> None:
        super().__init__(RESUMABLE)


def listen() -> None:
    """Have the signals raise `Preempted`, for the whole process. One that the process ignores stays ignored."""
    for number in SIGNALS:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _raise)


def _raise(number: int, frame: FrameType | None) -> None:
    raise Preempted


@contextmanager
def deferred() -> Iterator[Callable[[], bool]]:
    """Hold back the signals that arrive in the block, and deliver the last one at its end.

    Only Python's main thread can; in another one nothing is held back.

    Yields:
        A function that says whether a signal has arrived.
    """
    arrived: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    usual = {number: signal.signal(number, lambda number, frame: arrived.append(number)) for number in SIGNALS}
    try:
        yield lambda: bool(arrived)
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
    if arrived:
        signal.raise_signal(arrived[-1])
