"""TSDS: samples near the validation slice, spread out where the pool is dense (Liu, Karbasi and Rekatsinas, 2024).

Each slice sample hands out an equal mass to its nearest neighbours in the pool, a neighbour's part being inversely
proportional to the density around it, so that near-duplicates share what one sample would get. How many neighbours
are used balances alignment, the distance over which mass is transported, against diversity (algorithm 2).

The paper and the released code (ZifanL/TSDS) draw samples by their mass, with replacement, which leaves fewer
distinct ones than asked for. Here the samples of the largest mass are taken; keyed draws decide among equals.
The density is that of the paper, over the whole pool. The released code sums over the nearest 1,000 among all
neighbours found (`density: neighbours`, preset `tsds_official`), and stops with an error where a slice sample's
nearest neighbour would get more than all of its mass; here that neighbour gets the whole.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd

from baselines.asks import Embedded, unit_rows
from staff.selection import Coreset, Draws, ScorePool, check_choice, check_range

ROWS, COLUMNS = 256, 4096  # of a block of distances: 4 MB, which stays in a processor's cache
DENSITY_NEIGHBOURS = 1000  # of the released density


@dataclass(frozen=True, kw_only=True)
class TSDS(Embedded):
    """The samples of the largest mass under TSDS' assignment, on embeddings of norm 1.

    Attributes:
        of: the small model fine-tuned on the pool by default.
        alpha: weight of alignment against diversity; the larger, the fewer neighbours are used.
        scale: C of the paper, in units of distance.
        sigma: radius of the kernel of the density, 1 - (distance / sigma)^2.
        max_neighbors: of a slice sample, at most a tenth of the pool.
        density: "pool", "neighbours" as released, or "uniform".
    """

    version: ClassVar[int] = 1

    of: str = "small"
    alpha: float = 0.5
    scale: float = 5.0
    sigma: float = 0.75
    max_neighbors: int = 5000
    density: str = "pool"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "alpha", 0, 1)
        check_range(self, "scale", 1e-9)
        check_range(self, "sigma", 1e-9)
        check_range(self, "max_neighbors", 2, whole=True)
        check_choice(self, "density", ("pool", "neighbours", "uniform"))

    def select(self, pool: ScorePool, budget: int, rng: Draws) -> Coreset:
        """Raises UserError for an embedding that is not finite, by the sample's id."""
        # In an order drawn by id, ties and rounding fall alike in every order of the pool.
        order = np.argsort(rng.priorities("ties"))
        queries = unit_rows(self.slice_embeddings(pool))
        candidates = unit_rows(self.embeddings(pool))[order]
        neighbours, distances = nearest_candidates(candidates, queries, self.max_neighbors)
        density = self._density(candidates, neighbours)
        assigned, level, used = assign_mass(neighbours, distances, density, len(order), self.alpha, self.scale)
        mass = np.empty(len(order))
        mass[order] = assigned
        filled = max(budget - int((mass > 0).sum()), 0)
        notes = (f"{filled} samples without mass were drawn at random: raise max_neighbors.",) if filled else ()
        diagnostics = pd.DataFrame({"neighbours": used + 2, "nearest": distances[:, 0], "level": level})
        return Coreset(rng.highest_first(mass)[:budget], diagnostics, {"mass": mass}, filled, notes)

    def _density(self, candidates: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
        if self.density == "uniform":
            return np.ones(neighbours.shape)
        found, where = np.unique(neighbours, return_inverse=True)
        if self.density == "pool":
            density = kernel_density(candidates, found, self.sigma)
        else:
            density = density_official(
                candidates[found], self.sigma, min(DENSITY_NEIGHBOURS, len(candidates) // 10)
            )
        return density[where].reshape(neighbours.shape)


def nearest_candidates(candidates: np.ndarray, queries: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Each query's nearest candidates, nearest first, and their distances, both (M, K); K is `most`, but at most a
    tenth of the candidates and, where there are so many, at least 2.

    Args:
        candidates: (N, d), float32.
        queries: (M, d), float32.
    """
    n = len(candidates)
    count = min(max(min(most, n // 10), 2), n)
    squares = np.einsum("nd,nd->n", candidates, candidates)
    neighbours = np.empty((len(queries), count), dtype=np.int64)
    distances = np.empty((len(queries), count))
    for row, query in enumerate(queries):
        near = np.argpartition(squares - 2 * (candidates @ query), count - 1)[:count]
        difference = candidates[near] - query  # exactly, for the order among near ones
        exact = np.sqrt(np.einsum("nd,nd->n", difference, difference, dtype=np.float64))
        by_distance = np.lexsort((near, exact))
        neighbours[row], distances[row] = near[by_distance], exact[by_distance]
    return neighbours, distances


def kernel_density(points: np.ndarray, at: np.ndarray, sigma: float) -> np.ndarray:
    """The sum over all points, itself included, of max(0, 1 - (distance / sigma)^2), at each of `at`, (len(at),).

    Args:
        points: (N, d), float32.
    """
    centred = points - points.mean(axis=0, dtype=np.float64).astype(np.float32)
    squares = np.einsum("nd,nd->n", centred, centred)
    density = np.zeros(len(at))
    for start in range(0, len(at), ROWS):
        rows = at[start : start + ROWS]
        for first in range(0, len(points), COLUMNS):
            columns = slice(first, first + COLUMNS)
            block = centred[rows] @ centred[columns].T
            block *= 2
            block -= squares[rows, None]
            block -= squares[columns]
            block /= sigma**2
            block += 1
            block[rows[:, None] == np.arange(first, first + block.shape[1])] = 1  # a sample to itself, exactly
            density[start : start + ROWS] += np.clip(block, 0, 1, out=block).sum(axis=1, dtype=np.float64)
    return density


def assign_mass(
    neighbours: np.ndarray, distances: np.ndarray, density: np.ndarray, size: int, alpha: float, scale: float
) -> tuple[np.ndarray, float, np.ndarray]:
    """The mass of each candidate, (size,), which adds up to 1; the level s; and the last neighbour of each query
    that gets its full part, from 0, (M,), -1 if none does.

    A common level s rises. At level s neighbour k of a query is served in full, with 1 / (M s density), if the
    parts up to it add up to s or less in units of 1 / density; the one after the last gets what remains of the
    query's 1 / M. The level stops where the cost of transport, weighed by alpha / C, outweighs 1 - alpha, or where
    a query has used all its neighbours.

    Args:
        neighbours: nearest candidates of each query, nearest first, (M, K).
        distances: to them, (M, K).
        density: around them, (M, K).
        size: number of candidates.
    """
    queries, count = neighbours.shape
    if count == 1:
        return np.bincount(neighbours[:, 0], minlength=size) / queries, 1.0, np.full(queries, -1)
    last, level = np.full(queries, -1), 0.0
    weights, far = (1 / density.astype(np.float64)).tolist(), distances.astype(np.float64).tolist()
    served = [d[0] * w[0] for d, w in zip(far, weights)]  # sum of weight times distance over neighbours in full
    costs, total = [0.0] * queries, 0.0
    heap = [(w[0], 0, query) for query, w in enumerate(weights)]
    heapq.heapify(heap)
    while heap:
        level, k, query = heapq.heappop(heap)
        total -= costs[query]
        costs[query] = far[query][k + 1] * level - served[query]
        total += costs[query]
        if alpha / scale * total >= (1 - alpha) * queries:
            break
        last[query] = k
        if k < count - 2:
            weight = weights[query][k + 1]
            heapq.heappush(heap, (level + weight, k + 1, query))
            served[query] += far[query][k + 1] * weight
    parts = 1 / queries / level / density.astype(np.float64)
    parts[np.arange(count) > last[:, None]] = 0
    parts[np.arange(queries), last + 1] = np.maximum(1 / queries - parts.sum(axis=1), 0)
    return np.bincount(neighbours.ravel(), parts.ravel(), minlength=size), level, last


# ---------------------------------------------------------------- as released


def density_official(found: np.ndarray, sigma: float, count: int) -> np.ndarray:
    """`kernel_density` of each point over its `count` nearest among the points `found` alone, itself included.

    Args:
        found: the union of all queries' neighbours, (U, d), float32.
    """
    points = found.astype(np.float64)
    squares = np.einsum("nd,nd->n", points, points)
    count = min(max(count, 1), len(points))
    density = np.empty(len(points))
    for start in range(0, len(points), ROWS):
        rows = slice(start, start + ROWS)
        block = squares[rows, None] + squares - 2 * points[rows] @ points.T
        block[np.arange(len(block)), np.arange(start, start + len(block))] = 0  # exactly
        nearest = np.partition(np.maximum(block, 0), count - 1, axis=1)[:, :count]
        density[rows] = np.maximum(1 - nearest / sigma**2, 0).sum(axis=1)
    return density


def assign_mass_official(
    neighbours: np.ndarray, distances: np.ndarray, density: np.ndarray, size: int, alpha: float, scale: float
) -> tuple[np.ndarray, float, np.ndarray]:
    """`assign_mass` as released: a query's last neighbour in full is at least its first.

    Raises:
        ValueError: that first neighbour would get more than the query's mass, where the released code fails.
    """
    mass, level, last = assign_mass(neighbours, distances, density, size, alpha, scale)
    if (1 / density[last < 0, 0] / level > 1 + 1e-9 * len(neighbours)).any():
        raise ValueError("the nearest neighbour of a query would get more than all of its mass")
    return mass, level, np.maximum(last, 0)
