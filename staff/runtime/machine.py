"""The machine that the program runs on, and which kernels attention may use there."""

from __future__ import annotations

import platform
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from staff.runtime import processes


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
