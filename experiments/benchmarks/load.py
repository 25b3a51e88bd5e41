"""Time and memory of a large pool: reading, tokens, every selection method, export and the report, by its size.

`python -m experiments.benchmarks.load --sizes 10000,100000,1000000` makes a pool of synthetic samples of about
sixty tokens for each size, and runs each stage by the code that a run uses:

- read: the JSON Lines file is read, rendered, searched for duplicates, and kept for the next process.
- tokenise: for the small model and for the target, which share a tokenizer here.
- identify: digest of the samples, fingerprints of the run and of the tokens.
- select by ...: every method of --methods at a pruning rate of 0.5, and the coreset saved. Given numbers stand for
  every score of a model, and random embeddings of 128 dimensions for its own.
- run: a whole run by imported scores, without evaluation, up to its record.
- export: in a new process, that run's coreset as JSON Lines.
- report: in a new process, tables, figures and page over a record of each of these methods. The records are those
  of runs on --shrunk samples, with the scores and regions of the large pool in place of their own.
- start again: a new process, from its own start until another run on the same pool knows its pool and its name.

Seconds are processor time over all cores, which other work on the machine disturbs little; "by the clock" they are
wall time. Memory is the peak of the process while the stage ran, with interpreter, libraries and samples; in
brackets, what the process held before. Growth is the exponent of the number of samples between the smallest and the
largest pool, the slope of a log-log plot: 1 is linear.
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
import psutil
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig

from experiments.benchmarks import common
from experiments.export import export
from experiments.run import CONF, run
from staff.arrays import ArrayPool
from staff.pool import Pool
from staff.selection import Draws, run_method
from staff.store.cost import Meter

METHODS = (
    "ccs,el2n,full,grand,ifd,longest,moderate,perplexity,random,random_length,raw,rs2,shortest,staff,staff_debiased,"
    "staff_official,staff_paper,superfiltering"
)
AS_IMPORTED = "method=imported", "evaluation=none", "pruning_rate=0.9"
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


class Placeholder(ArrayPool):
    """A pool whose models all give the same scores, and the same embeddings."""

    def __init__(self, pool: Pool) -> None:
        super().__init__(pool.ids, {}, pool.answer_lengths, lengths=pool.lengths)
        self.scores = scores_of(len(pool.ids))
        self.embeddings = np.random.default_rng(0).standard_normal((len(pool.ids), 128), dtype=np.float32)

    def ask(self, signal: Any, of: str, at: np.ndarray | None = None, view: str = "pool", **options: Any) -> Any:
        if isinstance(signal, list | tuple):
            return [self.ask(one, of, at) for one in signal]
        values = self.embeddings if signal == "embedding" else self.scores
        return values if at is None else values[at]


def scores_of(size: int) -> np.ndarray:
    return np.random.default_rng(1).lognormal(size=size)


def write_samples(folder: Path, size: int) -> None:
    """A pool of that many distinct samples, and four to test with."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    for split, count in (("train", size), ("test", 4)):
        with (folder / f"{split}.jsonl").open("w") as file:
            for number in range(count):
                prompt = f"{number}. {' '.join(rng.choice(WORDS, int(rng.integers(30, 51))))}?"
                answer = " ".join(rng.choice(WORDS, int(rng.integers(5, 20))))
                file.write(json.dumps({"prompt": prompt, "answer": answer}) + "\n")


def composed(folder: Path, *overrides: str) -> DictConfig:
    """The configuration of a run on the samples in `folder`."""
    paths = f"task.data_dir={folder / 'data'}", f"results_dir={folder}", f"family.target.path={SMALL}"
    fixed = (
        "task=file",
        "task.max_new_tokens=4",
        "pruning_rate=0.5",
        "tracking=none",
        f"store_dir={folder / 'artifacts'}",
    )
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose("config", overrides=[*fixed, *paths, *overrides])


def measure(size: int, methods: Sequence[str], shrunk: int, folder: Path) -> dict[str, Measured]:
    """Every stage, in the order of a run."""
    from experiments.setup import Setup
    from experiments.single import Run

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    write_samples(folder / "data", size)
    few = f"task.train_limit={shrunk}", "finetune.epochs=1", "finetune.small_epochs=1"
    runs = {}
    for name in methods:
        choices = {"family": "tiny", "task": "file", "method": name}
        runs[name] = run(composed(folder, *few, f"method={name}"), choices)
    stages = Stages()
    alone = composed(folder, *AS_IMPORTED, f"method.path={folder / 'scores.parquet'}")
    with stages("read"):
        this = Run(Setup.of(composed(folder, "evaluation=none"), {}))
    with stages("tokenise"):
        pool = this.pool
    with stages("identify"):
        _ = this.fingerprint, pool.key()
    placeholder = Placeholder(pool)
    for name in methods:
        method: Any = instantiate(composed(folder, f"method={name}").method, _convert_="all")
        with stages(f"select by {name}"):
            coreset = run_method(method, placeholder, size // 2, Draws(0, placeholder.ids))
            coreset.save(folder, placeholder.ids)
        samples = pd.read_parquet(folder / "samples.parquet")
        samples.insert(2, "answer_tokens", pool.answer_lengths)
        samples.to_parquet(runs[name] / "samples.parquet")
        if len(coreset.diagnostics):
            coreset.diagnostics.to_csv(runs[name] / "regions.csv", index=False)
        del coreset, samples
    pd.DataFrame({"id": pool.ids, "score": placeholder.scores}).to_parquet(folder / "scores.parquet")
    del this, pool, placeholder
    with stages("run"):
        run(alone, {"family": "tiny", "task": "file", "method": "imported"})
    return stages.measured


def hand_on(folder: Path) -> dict[str, Measured]:
    stages = Stages()
    with stages("export"):
        export(next(folder.glob("runs/*imported*/metrics.json")).parent, "jsonl")
    return stages.measured


def report(folder: Path) -> dict[str, Measured]:
    from experiments.report.__main__ import write
    from experiments.report.records import collect

    stages = Stages()
    with stages("report"):
        write(folder, collect(folder))
    return stages.measured


def start_again(folder: Path) -> dict[str, Measured]:
    """A run on the same pool in a new process; seconds since the process started."""
    from experiments.setup import Setup
    from experiments.single import Run

    with Meter() as meter:
        this = Run(Setup.of(composed(folder, "method=random", "evaluation=none"), {}))
        _ = this.name, this.pool.ids
    seconds = time.process_time(), time.time() - psutil.Process().create_time()
    names = "start again", "start again, by the clock"
    return {name: Measured(s, 0, meter.cost.peak_memory_bytes) for name, s in zip(names, seconds, strict=True)}


def table(
    measured: Mapping[int, dict[str, Measured]], value: Callable[[Measured], str], of: Callable[[Measured], float]
) -> list[str]:
    """A row for each stage, a column for each size, and the growth between the smallest and the largest."""
    sizes, rows = list(measured), []
    for stage in measured[sizes[0]]:
        first, last = (of(measured[size][stage]) for size in (sizes[0], sizes[-1]))
        known = first >= 0.1 and len(sizes) > 1
        growth = f"{np.log(last / first) / np.log(sizes[-1] / sizes[0]):.2f}" if known else "-"
        rows.append(common.row(stage, *(value(measured[size][stage]) for size in sizes), growth))
    return [*common.table("stage", *(f"{size:,}" for size in sizes), "growth"), *rows]


def main() -> None:
    options, _ = common.arguments(__doc__, sizes="10000,100000,1000000", methods=METHODS, shrunk=24)
    measured: dict[int, dict[str, Measured]] = {}
    for size in map(int, options.sizes.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            methods = options.methods.split(",")
            measured[size] = _in_a_process(measure, size, methods, options.shrunk, Path(folder))
            for stage in (hand_on, report, start_again):
                measured[size] |= _in_a_process(stage, Path(folder))
        seconds = table(measured, lambda stage: f"{stage.seconds:.1f}", lambda stage: stage.seconds)
        memory = table(
            measured, lambda stage: f"{stage.peak / 1e6:,.0f} ({stage.before / 1e6:,.0f})", lambda stage: stage.peak
        )
        title = ["Seconds of processor time:", ""], ["Peak memory in MB (before):", ""]
        common.write(options.name, __doc__, title[0] + seconds, title[1] + memory)


def _in_a_process(measured: Callable[..., Any], *arguments: Any) -> Any:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        return executor.submit(measured, *arguments).result()


if __name__ == "__main__":
    main()
