"""How far a long piece of work is: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import io
import logging
import multiprocessing
import sys
from typing import Any

from tqdm import tqdm

log = logging.getLogger(__name__)

EVERY = 30.0
"""Seconds between two lines of a log; what is done sooner says nothing."""


class _Lines(tqdm):
    """Writes lines to the log in place of a bar."""

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        if msg is None:
            log.info("%s", str(self))  # now: a handler may look at it later


def progress(total: int, what: str, unit: str = "sample") -> tqdm:
    """To be told of what is done by `update(count)`, within a with statement.

    Args:
        total: how many there are to do.
        what: is being done, in a word or two.
    """
    shown: dict[str, Any] = {"total": total, "desc": what, "unit": unit}
    # Bars of several worker processes would overwrite each other.
    if sys.stderr.isatty() and multiprocessing.parent_process() is None:
        return tqdm(**shown)
    line = "{desc}: {n} of {total} {unit}s, {elapsed} gone, {remaining} to go"
    seldom: dict[str, Any] = {"delay": EVERY, "mininterval": EVERY, "miniters": 1}
    return _Lines(**shown, **seldom, bar_format=line, file=io.StringIO(), leave=False)
