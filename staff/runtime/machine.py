"""The machine that the program runs on: its processor, memory and cores, and which kernels attention may use there.

The number of threads depends on the machine alone, not on what else runs there: another number rounds otherwise,
and the same command is to give the same digits. A smaller number would gain little: beside two busy processes on
two cores a fine-tuning of the tiny target took 13.2 s with two threads that sleep while they wait, and 13.4 s with
one.
"""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from staff.runtime import processes

THREADS = "OMP_NUM_THREADS"
CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


@cache
def processor_name() -> str:
    """The name of the processor, such as "AMD EPYC 7B13"."""
    with suppress(OSError):
        if name := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return name[1].strip()
    return platform.processor() or platform.machine()


def free_ram() -> int:
    """Free bytes of RAM, divided among the processes of this run on this machine."""
    import psutil

    return psutil.virtual_memory().available // processes.local_world_size()


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


def worker_threads(workers: int) -> dict[str, str]:
    """Variables for one of several workers of this machine: its share of the cores as threads, at least one, unless
    the user has set OMP_NUM_THREADS."""
    return {} if THREADS in os.environ else {THREADS: str(max(1, cores() // workers))}


@cache
def settle_threads() -> str:
    """Have torch compute with no more threads than cores, unless OMP_NUM_THREADS is set; a sentence for the log.

    Torch does not know the CPU limit of a container. With a thread for each core of the host, all threads would be
    stopped most of the time.
    """
    import torch

    if THREADS not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), cores()))
    busy = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    beside = f", beside other work ({busy:.1f} processes in the last minute)" if busy >= 0.5 else ""
    return (
        f"computing with {torch.get_num_threads()} threads on {cores()} cores{beside}; {THREADS} sets the threads"
    )


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Leave cuDNN's attention out, for passes whose batches change their shape.

    On Hopper and newer GPUs torch prefers it, and it builds an execution plan for every new shape: about 0.1 s a
    batch. The flash and memory-efficient kernels need none.
    """
    import torch

    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
