"""What all commands that print much have in common."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Callable
from functools import wraps


def pipeable(main: Callable[[], None]) -> Callable[[], None]:
    """`main`, which ends without a word once the reader of its output, such as `head`, has closed it."""

    @wraps(main)
    def command() -> None:
        try:
            try:
                main()
            finally:
                sys.stdout.flush()
        except BrokenPipeError:
            if not reader_gone():
                raise
            sys.exit(1)

    return command


def reader_gone() -> bool:
    """Whether the reader of standard output has closed it. If so, nothing more is printed."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    gone = any(event & select.POLLERR for _, event in output.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it ends
    return gone
