"""What selection costs once the scores are there, by the size of the pool.

`python -m experiments.benchmark_selection` runs every case in a process of its own, at a pruning rate of 0.5, on
scores and clustered embeddings of 576 dimensions drawn with seed 0. Time is that of `select`, on the clock and on
the processor (all cores together; ratios are of this one, which other work on the machine disturbs less). Peak
memory is that of the process, interpreter and inputs included. Prints the table and writes it to
results/benchmarks/selection.md.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from staff.cost import Cost, Meter

from baselines.ccs import CCS
from baselines.d2 import D2
from staff.pool import ArrayPool
from staff.selection import Coreset, Draws, ScorePool, SelectionMethod, run_method
from staff.speculative import Staff

OUTPUT = Path("results/benchmarks/selection.md")
DIMENSIONS = 576  # SmolLM2-135M's hidden size


@dataclass(frozen=True)
class DenseD2:
    """D2 as one would write it first, with N x N matrices in float64."""

    def select(self, pool: ScorePool, budget: int, rng: Draws) -> Coreset:
        importance = pool.scores("el2n", "target_tuned")
        features = pool.scores("embedding", "target_tuned").astype(np.float64)
        features /= np.linalg.norm(features, axis=1, keepdims=True)
        distances = np.sqrt(np.maximum(2 - 2 * features @ features.T, 0))
        np.fill_diagonal(distances, np.inf)
        nearest = np.argpartition(distances, 4, axis=1)[:, :5]
        joined = np.zeros(distances.shape, dtype=bool)
        np.put_along_axis(joined, nearest, True, axis=1)
        joined |= joined.T
        values = importance + np.where(joined, np.exp(-distances), 0) @ importance
        picked = np.empty(budget, dtype=np.int64)
        for turn in range(budget):
            picked[turn] = best = values.argmax()
            near = joined[best]
            values[near] -= np.exp(-0.1 * distances[best, near]) * values[best]
            values[best] = -np.inf
        return Coreset(picked)


@dataclass(frozen=True)
class Measured:
    cost: Cost
    cpu_seconds: float
    indices: np.ndarray


@dataclass(frozen=True)
class Case:
    """A method, the size of the pool, and the earlier case that its time is compared with."""

    name: str
    method: SelectionMethod
    size: int
    against: Case | None = None


def growing(name: str, method: SelectionMethod) -> tuple[Case, Case, Case]:
    thousand = Case(name, method, 1_000)
    return thousand, Case(name, method, 10_000, thousand), Case(name, method, 100_000, thousand)


PAPER = Case("D2", D2(), 12_460)  # the paper's DialogSum training set
CASES = (
    *growing("CCS", CCS()),
    Case("STAFF", Staff(), 1_000_000),
    *growing("D2", D2()),
    PAPER,
    Case("D2, dense", DenseD2(), 12_460, PAPER),
)


def measure(case: Case) -> Measured:
    rng = np.random.default_rng(0)
    asked = ("effort", "small"), ("effort", "target"), ("el2n", "target_tuned")
    scores: dict[tuple[str, str], np.ndarray] = {key: rng.lognormal(size=case.size) for key in asked}
    if "D2" in case.name:
        centres = rng.standard_normal((case.size // 20, DIMENSIONS), dtype=np.float32)
        features = rng.standard_normal((case.size, DIMENSIONS), dtype=np.float32)
        features += centres[rng.integers(0, len(centres), case.size)]
        scores["embedding", "target_tuned"] = features
    pool = ArrayPool([f"sample {i}" for i in range(case.size)], scores)
    started = time.process_time()
    with Meter() as meter:
        coreset = run_method(case.method, pool, case.size // 2, Draws(0, pool.ids))
    return Measured(meter.cost, time.process_time() - started, coreset.indices)


def main() -> None:
    lines = ["| method | pool | seconds | CPU seconds | ratio | peak memory, MB |", "|---|---:|---:|---:|---|---:|"]
    print(*lines, sep="\n")
    done: dict[Case, Measured] = {}
    for case in CASES:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
            this = done[case] = executor.submit(measure, case).result()
        ratio = ""
        if other := case.against:
            ratio = f"{this.cpu_seconds / done[other].cpu_seconds:.1f} x {other.name} at {other.size:,}"
            if other.size == case.size:
                ratio += f"; {np.isin(this.indices, done[other].indices).mean():.2%} the same selection"
        times = f"{this.cost.seconds:.3g} | {this.cpu_seconds:.3g}"
        memory = this.cost.peak_memory_bytes / 1e6
        lines.append(f"| {case.name} | {case.size:,} | {times} | {ratio} | {memory:,.0f} |")
        print(lines[-1], flush=True)
    machine = f"{this.cost.device}, {os.cpu_count()} cores, {platform.system()} {platform.machine()}"
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    versions = f"Python {sys.version.split()[0]}, NumPy {np.__version__}, {blas['name']} {blas['version']}"
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text("\n".join([f"# {__doc__}", *lines, "", f"{machine}; {versions}.", ""]))
    print(f"{machine}; {versions}\nwritten to {OUTPUT}")


if __name__ == "__main__":
    main()
