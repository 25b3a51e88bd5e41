"""The machine that the program runs on."""

import platform
import re
from contextlib import suppress
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
