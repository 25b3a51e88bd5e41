"""Progress of long work: a bar on a terminal, occasional lines in a log."""

from __future__ import annotations

import io
import logging
import multiprocessing
import sys
from typing import Any

from tqdm import tqdm

log = logging.getLogger(__name__)

EVERY = 30.0
"""Seconds between two lines in a log. Work that takes less writes none."""


class _Lines(tqdm):
    """Writes lines to the log instead of drawing a bar."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if msg is None:
            log.info("%s", str(self))  # formatted now, since a handler may format it later


def progress(total: int, what: str, unit: str = "sample") -> tqdm:
    """A context manager whose `update(count)` reports that `count` more units are done.

    Args:
        total: the number of units.
        what: a short description of the work.
        unit: the name of a unit.
    """
    shown: dict[str, Any] = {"total": total, "desc": what, "unit": unit}
    # Bars of several worker processes would overwrite each other.
    if sys.stderr.isatty() and multiprocessing.parent_process() is None:
        return tqdm(**shown)
    line = "{desc}: {n} of {total} {unit}s, {elapsed} gone, {remaining} to go"
    seldom: dict[str, Any] = {"delay": EVERY, "mininterval": EVERY, "miniters": 1}
    return _Lines(**shown, **seldom, bar_format=line, file=io.StringIO(), leave=False)
