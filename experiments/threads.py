"""How many threads compute, and how they wait.

The number depends on the machine alone, not on what else runs there: another number rounds otherwise, and the same
command is to give the same digits. A smaller number would gain little: beside two busy processes on two cores a
fine-tuning of the tiny target took 13.2 s with two threads that sleep while they wait, and 13.4 s with one.
"""

from __future__ import annotations

import os
from contextlib import suppress
from functools import cache
from pathlib import Path

NUMBER, WAITING = "OMP_NUM_THREADS", "OMP_WAIT_POLICY"
ALSO_WAITING = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""The variables of GNU's and LLVM's OpenMP for the same."""

CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def wait_passively() -> None:
    """Let threads sleep while they wait for each other, unless the user has set how they wait.

    By default they spin, and on a machine with other work take the time of those that they wait for. OpenMP reads
    this once, when it is loaded; workers inherit it.
    """
    if not any(name in os.environ for name in (WAITING, *ALSO_WAITING)):
        os.environ[WAITING] = "passive"


def cores() -> int:
    """How many processors this process may use, by its affinity and by the CPU limit of its container."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([allowed, *(int(limit) for limit in _cgroup_limits())]))


def _cgroup_limits() -> list[float]:
    """The limits of this process's control group and of those around it (cgroup v2), in processors."""
    limits, group = [], CGROUPS
    with suppress(OSError):
        own = next((line[3:] for line in OWN_CGROUP.read_text().splitlines() if line.startswith("0::")), "/")
        for part in ("", *Path(own).parts[1:]):
            group /= part
            if (file := group / "cpu.max").is_file():  # the outermost has none, nor what a container does not see
                quota, period = file.read_text().split()
                limits += [] if quota == "max" else [int(quota) / int(period)]
    return limits


def of_worker(workers: int) -> dict[str, str]:
    """Variables for one of several workers of this machine: its share of the cores as threads, at least one, unless
    the user has set OMP_NUM_THREADS."""
    return {} if NUMBER in os.environ else {NUMBER: str(max(1, cores() // workers))}


@cache
def settled() -> str:
    """Have torch compute with no more threads than cores, unless OMP_NUM_THREADS is set; a sentence for the log.

    Torch does not know the CPU limit of a container. With a thread for each core of the host, all threads would be
    stopped most of the time.
    """
    import torch

    if NUMBER not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), cores()))
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    beside = f", beside other work ({busy:.1f} processes in the last minute)" if busy >= 0.5 else ""
    return f"computing with {torch.get_num_threads()} threads on {cores()} cores{beside}; {NUMBER} sets the threads"
