"""One fine-tuning of the target beside other work, by the number of threads and how they wait.

    python -m experiments.benchmarks.threads --samples 16 --rounds 5 tracking=none task=dialogsum

takes settings of a run. The target is fine-tuned on --samples for one epoch, in interleaved rounds:

- spinning: as many threads as cores, which spin while they wait for each other, as OpenMP has it by default;
- sleeping: the same, and they sleep while they wait (`OMP_WAIT_POLICY=passive`), as the application sets it;
- one: a single thread.

Each way runs on the machine as it is, and beside --beside processes that compute without end. "seconds" are the
median wall time, "processor" the median processor time of the process. "load" is the load average of the machine
before the first round: other work that is not of this benchmark.

With --sweep METHODS, such as random,el2n,grand,ccs,d2,staff, a real sweep is measured instead: these methods at
five pruning rates with three seeds, in an empty folder, with a worker process of one thread for each core. "work"
is the seconds of all stages, each once; "longest chain" is the largest sum over the stages of one run; "bound" is
the larger of work / workers and the longest chain. "jobs" is the time from the first job's start to the last end,
and "sweep" that of the whole command, with the start of the processes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from experiments import WAITING
from experiments.benchmarks.common import arguments, configured, row, table, write
from staff.runtime.machine import THREADS, cores

WAYS: dict[str, tuple[str, str | None]] = {
    "spinning": ("active", None),
    "sleeping": ("passive", None),
    "one": ("passive", "1"),
}
READY = "ready"
BUSY = "import os; parent = os.getppid()\nwhile os.getppid() == parent: pass"


def fine_tune(samples: int, settings: list[str]) -> None:
    """Fine-tune once for each line of standard input, and print wall and processor seconds."""
    from staff.store.cost import Meter
    from staff.training.stage import Finetune

    run = configured(*settings)
    stage = Finetune(run.family.target, run.tokenized["target"].take(np.arange(samples)), run.settings, 1, 0)
    print(READY, flush=True)
    for _ in sys.stdin:
        started = time.perf_counter(), time.process_time()
        with TemporaryDirectory() as folder, Meter() as meter:
            stage.run(Path(folder), meter)
        print(READY, time.perf_counter() - started[0], time.process_time() - started[1], flush=True)


class Way:
    """A process that fine-tunes when it is asked to."""

    def __init__(self, policy: str, number: str | None, command: list[str]) -> None:
        own = {WAITING[0]: policy, **({THREADS: number} if number else {})}
        kept = {k: v for k, v in os.environ.items() if k not in (THREADS, *WAITING[1:])}
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, env={**kept, **own}, text=True)
        self._answer()

    def __call__(self) -> tuple[float, ...]:
        """Wall and processor seconds of one fine-tuning."""
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> tuple[float, ...]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith(READY):
                return tuple(float(part) for part in line.split()[1:])
        raise RuntimeError("the process that fine-tunes has ended")


@contextmanager
def busy(count: int) -> Iterator[None]:
    """Processes that compute without end."""
    others = [subprocess.Popen([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


GRID = "pruning_rate=0.2,0.3,0.5,0.7,0.9", "seed=0,1,2"


def sweep(methods: str, settings: list[str]) -> list[str]:
    """The table of a real sweep."""
    workers = ["hydra/launcher=local", f"hydra.launcher.workers={cores()}", "tracking=none"]
    with TemporaryDirectory() as name:
        grid = ["-m", f"method={methods}", *GRID, *workers, f"results_dir={name}", *settings]
        began = time.monotonic()
        subprocess.run([sys.executable, "-m", "experiments.run", *grid], check=True)
        whole = time.monotonic() - began
        records = [json.loads(file.read_text()) for file in Path(name).glob("runs/*/metrics.json")]
        manifests = [json.loads(file.read_text()) for file in Path(name).glob("artifacts/*/*/manifest.json")]
    seconds = {manifest["fingerprint"]: manifest["cost"]["seconds"] for manifest in manifests}
    work, chain = (
        sum(seconds.values()),
        max(sum(seconds[stage] for stage in record["artifacts"]) for record in records),
    )
    bound = max(work / cores(), chain)
    started, ended = (
        [datetime.fromisoformat(record["run"][when]).timestamp() for record in records]
        for when in ("started", "finished")
    )
    jobs = max(ended) - min(started)
    head = table(
        "runs", "workers", "work", "longest chain", "bound", "jobs", "jobs / bound", "sweep", "sweep / bound"
    )
    counts = row(len(records), cores(), *(f"{s:.0f}" for s in (work, chain, bound, jobs)), jobs / bound)
    return [*head, f"{counts} {whole:.0f} | {whole / bound:.2f} |"]


def main() -> None:
    options, (settings,) = arguments(__doc__, samples=16, rounds=5, beside=cores(), worker=0, sweep="")
    if options.sweep:
        write("sweep", None, sweep(options.sweep, settings))
        return
    if options.worker:
        fine_tune(options.samples, settings)
        return
    load = os.getloadavg()[0]
    command = [sys.executable, "-m", "experiments.benchmarks.threads", "--worker=1", f"--samples={options.samples}"]
    ways = {name: Way(*how, [*command, *settings]) for name, how in WAYS.items()}
    turns = [(name, beside) for beside in (0, options.beside) for name in ways]
    taken: dict[tuple[str, int], list[tuple[float, ...]]] = {turn: [] for turn in turns}
    try:
        for way in ways.values():
            way()  # the first one warms up
        for _ in range(options.rounds):
            for name, beside in taken:
                with busy(beside):
                    taken[name, beside].append(ways[name]())
    finally:
        for way in ways.values():
            way.process.kill()
            way.process.wait()
    lines = table("threads", "beside", "seconds", "processor")
    for (name, beside), seconds in taken.items():
        wall, processor = np.median(seconds, axis=0).tolist()
        lines.append(row(name, f"{beside} busy processes", wall, processor))
    write(None, f"{__doc__}\nHere the load was {load:.1f}.\n", lines)


if __name__ == "__main__":
    main()
