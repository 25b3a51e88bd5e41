"""Progress of long work: a bar on a terminal, occasional lines in a log."""

from __future__ import annotations

import io
import logging
import multiprocessing
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

log = logging.getLogger(__name__)

# Of one process alone. By default tqdm has a semaphore, and a killed process leaves it to a warning.
tqdm.set_lock(threading.RLock())

EVERY = 30.0
"""Seconds between two lines in a log, at least. Work that takes less writes none."""
LINES = 50
"""Lines in a log, at most."""


class LogHandler(logging.StreamHandler):
    """Writes log lines to standard error, above the bars that are drawn there."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            with tqdm.external_write_mode(file=sys.stderr):
                super().emit(record)
        except Exception:
            self.handleError(record)


class _Lines(tqdm):
    """Writes lines to the log instead of drawing a bar."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if msg is None:
            log.info("%s", str(self))  # formatted now, since a handler may format it later


def progress(total: int, what: str, unit: str = "sample", done: int = 0) -> tqdm:
    """A context manager whose `update(count)` reports that `count` more units are done.

    Args:
        total: the number of units.
        what: a short description of the work.
        unit: the name of a unit.
        done: the units that were done before, by a process from which this one resumes.
    """
    shown: dict[str, Any] = {"total": total, "desc": what, "unit": unit, "initial": done, "leave": False}
    # Bars of several worker processes would overwrite each other.
    if sys.stderr.isatty() and multiprocessing.parent_process() is None:
        return tqdm(**shown, dynamic_ncols=True)
    line = "{desc}: {n} of {total} {unit}s, {elapsed} gone, {remaining} to go{postfix}"
    # tqdm would write more often than `miniters` says where `maxinterval` has passed.
    seldom: dict[str, Any] = {"delay": EVERY, "mininterval": EVERY, "maxinterval": float("inf")}
    return _Lines(**shown, **seldom, miniters=max(1, total // LINES), bar_format=line, file=io.StringIO())


@contextmanager
def naming_bars_of_transformers(what: str) -> Iterator[None]:
    """Name the bars that transformers draws in the block, and remove each when it is done."""
    from transformers.utils.logging import set_tqdm_hook

    before = set_tqdm_hook(lambda draw, args, kwargs: draw(*args, **{**kwargs, "desc": what, "leave": False}))
    try:
        yield
    finally:
        set_tqdm_hook(before)
