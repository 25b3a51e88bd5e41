"""A thousand runs in one process (RUNS): memory, time, files, threads and child processes stay as they were."""

import os
import statistics
import threading
import time
from pathlib import Path

from conftest import run_shrunk

RUNS = int(os.environ.get("RUNS", "1000"))
TINY = (
    "task.train_limit=8",
    "task.test_limit=1",
    "task.max_new_tokens=2",
    "pruning_rate=0.5",
    "task.metrics=[rougeL]",
)


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def test_a_thousand_runs_in_one_process_leave_nothing_behind(tmp_path: Path):
    memory, seconds, handles, threads = [], [], [], []
    before = children()
    for seed in range(RUNS):
        began = time.monotonic()
        tracked = "wandb" if seed % 10 == 0 else "none"  # offline: a service and its files
        run_shrunk(tmp_path, f"tracking={tracked}", "method=random", f"seed={seed}", *TINY)
        seconds.append(time.monotonic() - began)
        memory.append(resident())
        handles.append(len(os.listdir("/proc/self/fd")))
        threads.append(threading.active_count())
        if seed % max(1, RUNS // 20) == 0:
            left = f"{handles[-1]} files, {threads[-1]} threads"
            print(f"{seed}: {memory[-1] / 1e6:.0f} MB, {seconds[-1]:.2f} s, {left}")
    hundred = RUNS // 10
    first, last = slice(hundred // 2, hundred), slice(-hundred, None)
    grown = statistics.median(memory[last]) / statistics.median(memory[first])
    slower = statistics.median(seconds[last]) / statistics.median(seconds[first])
    print(
        f"{RUNS} runs: memory times {grown:.3f}, time times {slower:.2f}; "
        f"files {handles[hundred]} to {handles[-1]}, threads {threads[hundred]} to {threads[-1]}"
    )
    assert grown < 1.1 and slower < 1.5
    assert max(handles[last]) <= max(handles[first]) and max(threads[last]) <= max(threads[first])
    assert len(children() - before) <= 1, "W&B's service, one for the process"
