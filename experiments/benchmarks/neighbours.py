"""The approximate search for neighbours beside the exact one: time, memory, recall, and what D2 selects by it.

`python -m experiments.benchmarks.neighbours --cases 100000x64,1000000x64` runs D2 at a pruning rate of 0.9 on
clustered embeddings drawn with seed 0, for each N x dimensions, every case in a process of its own. "recall" is the
part of the true five nearest neighbours of 1,000 samples that the approximate search finds. "same coreset" is the
part of the exact search's coreset that is also in the approximate one's, for N up to --exact. Seconds are those of
`select`, on the clock and on the processor. Peak memory is that of the process, with interpreter and embeddings.
`method.search=approximate` needs faiss.
"""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

import numpy as np

from baselines.d2 import D2
from baselines.neighbours import nearest_neighbours
from staff.arrays import ArrayPool
from staff.selection import Draws, run_method
from staff.store.cost import Meter

QUERIES, K = 1_000, 5


class Measured(NamedTuple):
    seconds: float
    cpu_seconds: float
    memory: int
    coreset: np.ndarray


def embeddings(size: int, dimensions: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((max(1, size // 20), dimensions), dtype=np.float32)
    features = rng.standard_normal((size, dimensions), dtype=np.float32)
    for start in range(0, size, 10_000):
        block = features[start : start + 10_000]
        block += centres[rng.integers(0, len(centres), len(block))]
    return features


def measure(size: int, dimensions: int, search: str) -> Measured:
    importance = np.random.default_rng(1).lognormal(size=size)
    signals = {("el2n", "target_tuned"): importance, ("embedding", "target_tuned"): embeddings(size, dimensions)}
    pool = ArrayPool([f"sample {i}" for i in range(size)], signals)
    started = time.process_time()
    with Meter() as meter:
        coreset = run_method(D2(search=search), pool, size // 10, Draws(0, pool.ids))
    cost = meter.cost
    return Measured(cost.seconds, time.process_time() - started, cost.peak_memory_bytes, coreset.indices)


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


def main() -> None:
    # Imported here, so that the measured processes, which import this file, do not load torch.
    from experiments.benchmarks.common import arguments, row, table, write

    options, _ = arguments(__doc__, cases="10000x64,100000x64,1000000x64,10000x576,100000x576", exact=100_000)
    lines = table("N x dimensions", "search", "seconds", "CPU seconds", "peak memory, MB", "recall", "same coreset")
    for case in options.cases.split(","):
        size, dimensions = map(int, case.split("x"))
        coresets = {}
        for search in ("exact", "approximate") if size <= options.exact else ("approximate",):
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
                this = executor.submit(measure, size, dimensions, search).result()
            coresets[search] = this.coreset
            quality = ["", ""]
            if search == "approximate":
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
                    quality[0] = f"{executor.submit(recall, size, dimensions).result():.3f}"
                if "exact" in coresets:
                    quality[1] = f"{np.isin(coresets['exact'], this.coreset).mean():.1%}"
            shape, memory = f"{size:,} x {dimensions}", f"{this.memory / 1e6:,.0f}"
            lines.append(row(shape, search, this.seconds, this.cpu_seconds, memory, *quality))
            print(lines[-1], flush=True)
    write(options.name, __doc__, lines)


if __name__ == "__main__":
    main()
