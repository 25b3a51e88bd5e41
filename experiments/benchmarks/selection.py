"""Cost of selection once the scores are there, by the size of the pool.

`python -m experiments.benchmarks.selection` runs every case in a process of its own, at a pruning rate of 0.5, on
scores and clustered embeddings of 576 dimensions drawn with seed 0. "seconds" is the wall time of `select`, "CPU
seconds" its processor time over all cores. Ratios are of processor time, which other work on the machine disturbs
less. Peak memory is that of the process, with interpreter and inputs. --shrink 100 divides the sizes by 100.

With `--search 100000x64,1000000x64` it compares the approximate search for neighbours with the exact one instead:
D2 at a pruning rate of 0.9, for each N x dimensions. "recall" is the part of the true five nearest neighbours of
1,000 samples that the approximate search finds. "same coreset" is the part of the exact search's coreset that is
also in the approximate one's, for N up to --exact. `method.search=approximate` needs faiss.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any

import numpy as np

from baselines.ccs import CCS
from baselines.d2 import D2
from baselines.neighbours import nearest_neighbours
from staff.arrays import ArrayPool
from staff.selection import Coreset, Draws, ScorePool, SelectionMethod, run_method
from staff.speculative import Staff
from staff.store.cost import Cost, Meter

QUERIES, K = 1_000, 5
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
    dimensions: int = DIMENSIONS
    kept: float = 0.5


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


def embeddings(size: int, dimensions: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((max(1, size // 20), dimensions), dtype=np.float32)
    features = rng.standard_normal((size, dimensions), dtype=np.float32)
    for start in range(0, size, 10_000):
        block = features[start : start + 10_000]
        block += centres[rng.integers(0, len(centres), len(block))]
    return features


def measure(case: Case) -> Measured:
    rng = np.random.default_rng(0)
    asked = ("effort", "small"), ("effort", "target"), ("el2n", "target_tuned")
    signals: dict[tuple[str, str], np.ndarray] = {key: rng.lognormal(size=case.size) for key in asked}
    if "D2" in case.name:
        signals["embedding", "target_tuned"] = embeddings(case.size, case.dimensions)
    pool = ArrayPool([f"sample {i}" for i in range(case.size)], signals)
    started = time.process_time()
    with Meter() as meter:
        coreset = run_method(case.method, pool, int(case.kept * case.size), Draws(0, pool.ids))
    return Measured(meter.cost, time.process_time() - started, coreset.indices)


def apart(way: Callable[..., Any], *arguments: Any) -> Any:
    """What `way` returns, in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
        return executor.submit(way, *arguments).result()


def recall(size: int, dimensions: int) -> float:
    """Of the approximate search, over `QUERIES` samples spread over the pool, against all distances."""
    features = embeddings(size, dimensions)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    found, _ = nearest_neighbours(features, K, "approximate")
    queries = np.linspace(0, size - 1, QUERIES).astype(int)
    hits = 0
    for query in queries:
        near = features @ features[query]
        near[query] = -np.inf
        hits += len(np.intersect1d(np.argpartition(near, -K)[-K:], found[query]))
    return hits / (K * QUERIES)


def searches(size: int, dimensions: int, exact: bool) -> Iterator[tuple[Any, ...]]:
    """A row for each search for neighbours; the exact one only where asked."""
    coresets = {}
    for search in ("exact", "approximate") if exact else ("approximate",):
        this = apart(measure, Case("D2", D2(search=search), size, dimensions=dimensions, kept=0.1))
        coresets[search] = this.indices
        quality = ["", ""]
        if search == "approximate":
            quality[0] = f"{apart(recall, size, dimensions):.3f}"
            if "exact" in coresets:
                quality[1] = f"{np.isin(coresets['exact'], this.indices).mean():.1%}"
        shape, memory = f"{size:,} x {dimensions}", f"{this.cost.peak_memory_bytes / 1e6:,.0f}"
        yield shape, search, this.cost.seconds, this.cpu_seconds, memory, *quality


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

    options, _ = arguments(__doc__, shrink=1, search="", exact=100_000)
    if options.search:
        lines = table(
            "N x dimensions", "search", "seconds", "CPU seconds", "peak memory, MB", "recall", "same coreset"
        )
        for shape in options.search.split(","):
            size, dimensions = map(int, shape.split("x"))
            for cells in searches(size, dimensions, size <= options.exact):
                lines.append(row(*cells))
                print(lines[-1], flush=True)
        write(options.name or "neighbours", __doc__, lines)
        return
    lines = table("method", "pool", "seconds", "CPU seconds", "ratio", "peak memory, MB")
    done: dict[Case, Measured] = {}
    for case in cases(options.shrink):
        this = done[case] = apart(measure, case)
        ratio = compared(case, this, done[case.against]) if case.against else ""
        memory = f"{this.cost.peak_memory_bytes / 1e6:,.0f}"
        lines.append(row(case.name, f"{case.size:,}", this.cost.seconds, this.cpu_seconds, ratio, memory))
        print(lines[-1], flush=True)
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    lines += ["", f"BLAS: {blas['name']} {blas['version']}."]
    write(options.name, __doc__, lines)


if __name__ == "__main__":
    main()
