"""What a large pool takes: data loading, scoring, every selection method and the report, by its size.

`python -m experiments.benchmark_load [SIZE ...]` makes synthetic samples of about thirty tokens, a pool for each
size in a process of its own, and carries out each stage by the code that a run uses:

- load: the JSON Lines file is read, rendered, and tokenised for the small model and for the target.
- identify: digest of the samples, fingerprints of the run and of the tokens.
- score: effort (last_v_b) of the tiny family's small model, at 2,048 tokens a batch, stored and read.
- select by ...: every method of conf/method at a pruning rate of 0.5 and the coreset saved. The efforts stand for
  every score of a model, and random embeddings of 128 dimensions for its own.
- report: tables, figures and page over a record of each of these methods: those of runs on 24 samples, with the
  scores and regions of the large pool in place of their own.

All of it grows with the number of samples at most, but for D2: its exact search for neighbours measures every pair.
Time is that of the processor, all cores together, which other work on the machine disturbs little. Memory is the
peak of the process while the stage ran, interpreter, libraries and samples included; "before" is what it held when
the stage began. Writes results/benchmarks/load.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
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

from experiments.run import CONF, run
from staff.cost import Meter, processor_name
from staff.pool import ROLES, ArrayPool
from staff.selection import Draws

OUTPUT = Path("results/benchmarks/load.md")
SIZES = (25_000, 50_000, 100_000, 200_000)
METHODS = sorted({file.stem for file in (Path(CONF) / "method").glob("*.yaml")} - {"precomputed", "oracle"})
SMALL = "pkg://staff/assets/tiny/small"
WORDS = ("the", "person", "says", "that", "they", "will", "go", "to", "work", "and", "talk", "about", "it")
log = logging.getLogger("staff")


class Measured(NamedTuple):
    """What a stage took: seconds of the processor, and bytes of memory before it and at its peak."""

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
    with initialize_config_dir(CONF, version_base="1.3"):
        paths = (f"task.data_dir={folder / 'data'}", f"results_dir={folder}", f"family.target.path={SMALL}")
        fixed = (
            "task=jsonl",
            "task.max_new_tokens=4",
            "pruning_rate=0.5",
            "tracking=none",
            "scoring.batch_tokens=2048",
        )
        return compose("config", overrides=[*fixed, "scoring.batch_tokens=2048", *paths, *overrides])


def measure(size: int, folder: Path) -> dict[str, Measured]:
    """Every stage, in the order of a run."""
    from experiments.report.__main__ import write
    from experiments.report.records import collect
    from experiments.single import Run

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    write_samples(folder / "data", size)
    shrunk = ("task.train_limit=24", "finetune.epochs=1", "finetune.small_epochs=1")
    runs = {}
    for name in METHODS:
        choices = {"family": "tiny", "task": "jsonl", "method": name}
        runs[name] = run(composed(folder, *shrunk, f"method={name}"), choices)
    stages = Stages()
    with stages("load"):
        this = Run(composed(folder), {})
        pool = this.pool
    with stages("identify"):
        _ = this.fingerprint, pool.for_small.fingerprint, pool.for_target.fingerprint
    with stages("score"):
        efforts = pool.scores("effort", "target")
    embeddings = np.random.default_rng(0).standard_normal((size, 128), dtype=np.float32)
    scores = {(signal, role): efforts for signal in ("effort", "el2n") for role in ROLES}
    scores |= {("embedding", role): embeddings for role in ROLES}
    at_hand = ArrayPool(pool.ids, scores, pool.answer_lengths)
    for name in METHODS:
        method: Any = instantiate(composed(folder, f"method={name}").method, _convert_="all")
        budget = size - int(getattr(method, "pruning_rate", 0.5) * size)
        with stages(f"select by {name}"):
            coreset = method.select(at_hand, budget, Draws(0, at_hand.ids))
            coreset.save(folder, at_hand.ids)
        samples = pd.read_parquet(folder / "samples.parquet")
        samples.insert(2, "answer_tokens", pool.answer_lengths)
        samples.to_parquet(runs[name] / "samples.parquet")
        if len(coreset.diagnostics):
            coreset.diagnostics.to_csv(runs[name] / "regions.csv", index=False)
    with stages("report"):
        write(folder, collect(folder))
    return stages.measured


def table(measured: dict[int, dict[str, Measured]], value: Callable[[Measured], str]) -> list[str]:
    sizes = list(measured)
    lines = [f"| stage | {' | '.join(f'{size:,}' for size in sizes)} |", f"|---|{'---:|' * len(sizes)}"]
    for stage in measured[sizes[0]]:
        lines.append(f"| {stage} | {' | '.join(value(measured[size][stage]) for size in sizes)} |")
    return lines


def page(measured: dict[int, dict[str, Measured]]) -> str:
    threads = os.environ.get("OMP_NUM_THREADS", "as many as cores")
    machine = f"{processor_name()}, {os.cpu_count()} cores, {threads} thread(s), {platform.system()}"
    said = [
        f"# {__doc__}",
        "Seconds of the processor:\n",
        *table(measured, lambda stage: f"{stage.seconds:.1f}"),
        "\nPeak memory in MB (before):\n",
        *table(measured, lambda stage: f"{stage.peak / 1e6:,.0f} ({stage.before / 1e6:,.0f})"),
        f"\n{machine}; Python {platform.python_version()}, NumPy {np.__version__}.\n",
    ]
    return "\n".join(said)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", type=int, nargs="*", default=SIZES, help="samples of the pools")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    arguments = parser.parse_args()
    measured: dict[int, dict[str, Measured]] = {}
    for size in arguments.sizes:
        with (
            tempfile.TemporaryDirectory() as folder,
            ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor,
        ):
            measured[size] = executor.submit(measure, size, Path(folder)).result()
        arguments.output.write_text(page(measured))
        print(f"{size:,} samples: written to {arguments.output}")


if __name__ == "__main__":
    main()
