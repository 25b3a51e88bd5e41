"""How many threads compute, and how they wait, said to OpenMP by the environment before torch loads it."""

from __future__ import annotations

import os

NUMBER, WAITING = "OMP_NUM_THREADS", "OMP_WAIT_POLICY"
ALSO_WAITING = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""By which GNU's and LLVM's OpenMP are told the same."""


def wait_passively() -> None:
    """Have threads sleep while they wait for each other, unless the user has said how they are to wait.

    By default they spin, and on a machine with other work take the time of those that they wait for. OpenMP reads
    this once, when it is loaded; workers inherit it.
    """
    if not any(name in os.environ for name in (WAITING, *ALSO_WAITING)):
        os.environ[WAITING] = "passive"


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_cores(workers: int) -> str:
    """Give each of several workers of this machine, yet to be started, its share of the cores as threads, at least
    one, unless the user has set OMP_NUM_THREADS; the choice in words. A single one is left to torch."""
    if workers > 1 and NUMBER not in os.environ:
        os.environ[NUMBER] = str(max(1, cores() // workers))
        return f"each with {os.environ[NUMBER]} of {cores()} cores"
    chosen = os.environ.get(NUMBER)
    return f"each with {NUMBER}={chosen}" if chosen else "with as many threads as torch chooses"
