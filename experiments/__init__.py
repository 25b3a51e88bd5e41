"""The application: every command is a module of this package. The library `staff` imports none of it.

Importing it prepares the process for a command, since every command and every worker of a sweep does so first: how
OpenMP's threads wait, which cannot be set once torch is loaded, and that modules of your own are found.
"""

from __future__ import annotations

import os
import select
import sys
import warnings
from collections.abc import Callable
from functools import wraps

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""How threads wait: variables of OpenMP, of GNU's and of LLVM's."""


def wait_passively() -> None:
    """Let threads sleep while they wait for each other, unless the user has set how they wait.

    By default they spin, and on a machine with other work take the time of those that they wait for. OpenMP reads
    this once, when it is loaded; workers inherit it.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ[WAITING[0]] = "passive"


wait_passively()
# Last, so that a package of the same name in the working folder shadows nothing.
if (_here := os.getcwd()) not in sys.path:
    sys.path.append(_here)


def quiet() -> None:
    """Silence other libraries on the terminal. Worker processes inherit the environment and the filters."""
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # it asks the hub more than it needs
    warnings.simplefilter("ignore", FutureWarning)
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def command(main: Callable[[], None]) -> Callable[[], None]:
    """`main`, where an error that the user can fix ends the process with its sentence. If the reader of the output,
    such as `head`, has closed it, the process ends without a word."""

    @wraps(main)
    def guarded() -> None:
        quiet()
        try:
            try:
                main()
            finally:
                sys.stdout.flush()
        except Exception as error:
            from experiments.sweep import sentence_of

            if isinstance(error, BrokenPipeError) and reader_gone():
                sys.exit(1)
            if (sentence := sentence_of(error)) is None:
                raise
            sys.exit(f"staff: {sentence}")

    return guarded


def reader_gone() -> bool:
    """Whether the reader of standard output has closed it. If so, nothing more is printed."""
    output = select.poll()
    output.register(sys.stdout.fileno(), 0)
    gone = any(event & select.POLLERR for _, event in output.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it ends
    return gone
