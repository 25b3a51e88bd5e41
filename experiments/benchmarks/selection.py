"""Cost of selection once the scores are there, by the size of the pool.

`python -m experiments.benchmarks.selection` runs every case in a process of its own, at a pruning rate of 0.5, on
scores and clustered embeddings of 576 dimensions drawn with seed 0. "seconds" is the wall time of `select`, "CPU
seconds" its processor time over all cores. Ratios are of processor time, which other work on the machine disturbs
less. Peak memory is that of the process, with interpreter and inputs. --shrink 100 divides the sizes by 100.
"""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

import numpy as np

from baselines.ccs import CCS
from baselines.d2 import D2
from staff.arrays import ArrayPool
from staff.selection import Coreset, Draws, ScorePool, SelectionMethod, run_method
from staff.speculative import Staff
from staff.store.cost import Cost, Meter

DIMENSIONS = 576  # SmolLM2-135M's hidden size


@dataclass(frozen=True)
class DenseD2:
    """D2 as one would write it first, with N x N matrices in float64."""

    def select(self, pool: ScorePool, budget: int, rng: Draws) -> Coreset:
        importance, features = pool.ask(["el2n", "embedding"], of="target_tuned")
        features = features.astype(np.float64)
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


def growing(name: str, method: SelectionMethod, shrink: int) -> list[Case]:
    smallest = Case(name, method, 1_000 // shrink)
    return [smallest, *(Case(name, method, size // shrink, smallest) for size in (10_000, 100_000))]


def cases(shrink: int) -> list[Case]:
    paper = Case("D2", D2(), 12_460 // shrink)  # the paper's DialogSum training set
    return [
        *growing("CCS", CCS(), shrink),
        Case("STAFF", Staff(), 1_000_000 // shrink),
        *growing("D2", D2(), shrink),
        paper,
        Case("D2, dense", DenseD2(), paper.size, paper),
    ]


def measure(case: Case) -> Measured:
    rng = np.random.default_rng(0)
    asked = ("effort", "small"), ("effort", "target"), ("el2n", "target_tuned")
    signals: dict[tuple[str, str], np.ndarray] = {key: rng.lognormal(size=case.size) for key in asked}
    if "D2" in case.name:
        centres = rng.standard_normal((max(1, case.size // 20), DIMENSIONS), dtype=np.float32)
        features = rng.standard_normal((case.size, DIMENSIONS), dtype=np.float32)
        features += centres[rng.integers(0, len(centres), case.size)]
        signals["embedding", "target_tuned"] = features
    pool = ArrayPool([f"sample {i}" for i in range(case.size)], signals)
    started = time.process_time()
    with Meter() as meter:
        coreset = run_method(case.method, pool, case.size // 2, Draws(0, pool.ids))
    return Measured(meter.cost, time.process_time() - started, coreset.indices)


def compared(case: Case, measured: Measured, other: Measured) -> str:
    """How the case compares with the one before it."""
    assert case.against is not None
    ratio = f"{measured.cpu_seconds / other.cpu_seconds:.1f} x {case.against.name} at {case.against.size:,}"
    if case.against.size != case.size:
        return ratio
    return f"{ratio}; {np.isin(measured.indices, other.indices).mean():.2%} the same selection"


def main() -> None:
    # Imported here, so that the measured processes, which import this file, do not load torch.
    from experiments.benchmarks.common import arguments, row, table, write

    options, _ = arguments(__doc__, shrink=1)
    lines = table("method", "pool", "seconds", "CPU seconds", "ratio", "peak memory, MB")
    done: dict[Case, Measured] = {}
    for case in cases(options.shrink):
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
            this = done[case] = executor.submit(measure, case).result()
        ratio = compared(case, this, done[case.against]) if case.against else ""
        memory = f"{this.cost.peak_memory_bytes / 1e6:,.0f}"
        lines.append(row(case.name, f"{case.size:,}", this.cost.seconds, this.cpu_seconds, ratio, memory))
        print(lines[-1], flush=True)
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    lines += ["", f"BLAS: {blas['name']} {blas['version']}."]
    write(options.name, __doc__, lines)


if __name__ == "__main__":
    main()
