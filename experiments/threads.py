"""How many threads compute, and how they wait: set in the environment before torch loads OpenMP."""

from __future__ import annotations

import os

NUMBER, WAITING = "OMP_NUM_THREADS", "OMP_WAIT_POLICY"
ALSO_WAITING = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""The variables of GNU's and LLVM's OpenMP for the same."""


def wait_passively() -> None:
    """Let threads sleep while they wait for each other, unless the user has set how they wait.

    By default they spin, and on a machine with other work take the time of those that they wait for. OpenMP reads
    this once, when it is loaded; workers inherit it.
    """
    if not any(name in os.environ for name in (WAITING, *ALSO_WAITING)):
        os.environ[WAITING] = "passive"


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def of_worker(workers: int) -> dict[str, str]:
    """Variables for one of several workers of this machine: its share of the cores as threads, at least one, unless
    the user has set OMP_NUM_THREADS."""
    return {} if NUMBER in os.environ else {NUMBER: str(max(1, cores() // workers))}
