"""Time and memory of a large pool: data loading, scoring, every selection method and the report, by its size.

`python -m experiments.benchmarks.load --sizes 25000,100000` makes a pool of synthetic samples of about thirty
tokens for each size, in a process of its own, and runs each stage by the code that a run uses:

- load: the JSON Lines file is read, rendered, and tokenised for the small model and for the target.
- identify: digest of the samples, fingerprints of the run and of the tokens.
- score: effort (last_v_b) of the tiny family's small model, at 2,048 tokens per batch, stored and read.
- select by ...: every method of --methods at a pruning rate of 0.5, and the coreset saved. The efforts stand for
  every score of a model, and random embeddings of 128 dimensions for its own.
- report: tables, figures and page over a record of each of these methods. The records are those of runs on --shrunk
  samples, with the scores and regions of the large pool in place of their own.

All of it grows at most linearly with the number of samples, except for D2, whose exact search for neighbours
measures every pair. Seconds are processor time over all cores, which other work on the machine disturbs little.
Memory is the peak of the process while the stage ran, with interpreter, libraries and samples; in brackets, what
the process held before.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig

from experiments.benchmarks import common
from experiments.run import CONF, run
from staff.arrays import ArrayPool
from staff.selection import Draws, run_method
from staff.store.cost import Meter

METHODS = "ccs,d2,el2n,full,grand,random,random_length,raw,staff,staff_official,staff_paper"
SMALL = "pkg://staff/assets/tiny/small"
WORDS = ("the", "person", "says", "that", "they", "will", "go", "to", "work", "and", "talk", "about", "it")
log = logging.getLogger("staff")


class Measured(NamedTuple):
    """Processor seconds of a stage, and bytes of memory before it and at its peak."""

    seconds: float
    before: int
    peak: int


class Stages:
    """Measures stages, each in a with statement."""

    def __init__(self) -> None:
        self.measured: dict[str, Measured] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        before = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
        began = time.process_time()
        with Meter() as meter:
            yield
        taken = Measured(time.process_time() - began, before, meter.cost.peak_memory_bytes)
        self.measured[stage] = taken
        log.info("%s: %.1f s of the processor, %.0f MB", stage, taken.seconds, taken.peak / 1e6)


class StandIn(ArrayPool):
    """A pool whose models all give the same scores, and the same embeddings."""

    def __init__(self, ids: Sequence[str], answer_lengths: np.ndarray, scores: np.ndarray) -> None:
        super().__init__(ids, {}, answer_lengths)
        self.scores = scores
        self.embeddings = np.random.default_rng(0).standard_normal((len(ids), 128), dtype=np.float32)

    def ask(self, signal: Any, of: str, at: np.ndarray | None = None, view: str = "pool", **options: Any) -> Any:
        if isinstance(signal, list):
            return [self.ask(one, of, at) for one in signal]
        values = self.embeddings if signal == "embedding" else self.scores
        return values if at is None else values[at]


def write_samples(folder: Path, size: int) -> None:
    """A pool of that many distinct samples, and four to test with."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for split, count in (("train", size), ("test", 4)):
        with (folder / f"{split}.jsonl").open("w") as file:
            for number in range(count):
                prompt = f"{number}. {' '.join(rng.choice(WORDS, int(rng.integers(10, 21))))}?"
                answer = " ".join(rng.choice(WORDS, int(rng.integers(2, 13))))
                file.write(json.dumps({"prompt": prompt, "answer": answer}) + "\n")


def composed(folder: Path, *overrides: str) -> DictConfig:
    """The configuration of a run on the samples in `folder`."""
    paths = f"task.data_dir={folder / 'data'}", f"results_dir={folder}", f"family.target.path={SMALL}"
    fixed = "task=jsonl", "task.max_new_tokens=4", "pruning_rate=0.5", "tracking=none", "scoring.batch_tokens=2048"
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose("config", overrides=[*fixed, *paths, *overrides])


def measure(size: int, methods: Sequence[str], shrunk: int, folder: Path) -> dict[str, Measured]:
    """Every stage, in the order of a run."""
    from experiments.report.__main__ import write
    from experiments.report.records import collect
    from experiments.single import Run

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    write_samples(folder / "data", size)
    few = f"task.train_limit={shrunk}", "finetune.epochs=1", "finetune.small_epochs=1"
    runs = {}
    for name in methods:
        choices = {"family": "tiny", "task": "jsonl", "method": name}
        runs[name] = run(composed(folder, *few, f"method={name}"), choices)
    stages = Stages()
    with stages("load"):
        this = Run(composed(folder), {})
        pool = this.pool
    with stages("identify"):
        _ = this.fingerprint, pool.key()
    with stages("score"):
        efforts = pool.ask("effort", of="target")
    stand_in = StandIn(pool.ids, pool.answer_lengths, efforts)
    for name in methods:
        method: Any = instantiate(composed(folder, f"method={name}").method, _convert_="all")
        with stages(f"select by {name}"):
            coreset = run_method(method, stand_in, size // 2, Draws(0, stand_in.ids))
            coreset.save(folder, stand_in.ids)
        samples = pd.read_parquet(folder / "samples.parquet")
        samples.insert(2, "answer_tokens", pool.answer_lengths)
        samples.to_parquet(runs[name] / "samples.parquet")
        if len(coreset.diagnostics):
            coreset.diagnostics.to_csv(runs[name] / "regions.csv", index=False)
    with stages("report"):
        write(folder, collect(folder))
    return stages.measured


def table(measured: Mapping[int, dict[str, Measured]], value: Callable[[Measured], str]) -> list[str]:
    stages = next(iter(measured.values()))
    rows = [common.row(stage, *(value(of_size[stage]) for of_size in measured.values())) for stage in stages]
    return [*common.table("stage", *(f"{size:,}" for size in measured)), *rows]


def main() -> None:
    options, _ = common.arguments(__doc__, sizes="25000,50000,100000,200000", methods=METHODS, shrunk=24)
    measured: dict[int, dict[str, Measured]] = {}
    for size in map(int, options.sizes.split(",")):
        with (
            tempfile.TemporaryDirectory() as folder,
            ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor,
        ):
            methods = options.methods.split(",")
            measured[size] = executor.submit(measure, size, methods, options.shrunk, Path(folder)).result()
        seconds = table(measured, lambda stage: f"{stage.seconds:.1f}")
        memory = table(measured, lambda stage: f"{stage.peak / 1e6:,.0f} ({stage.before / 1e6:,.0f})")
        title = ["Seconds of processor time:", ""], ["Peak memory in MB (before):", ""]
        common.write(options.name or "load", __doc__, title[0] + seconds, title[1] + memory)


if __name__ == "__main__":
    main()
