"""D2 pruning: difficulty and diversity, by messages over a graph of samples (Maharana et al., ICLR 2024).

Every sample is joined to its k nearest neighbours in the space of embeddings, d_ij being the Euclidean distance.
Forward messages make the importance x_i of a sample (EL2N on the fine-tuned target) into the density of its
neighbourhood, x_i + sum over neighbours of exp(-d_ij) x_j. Then the sample of largest value is picked and its
neighbours are charged for it, x_j -= exp(-gamma d_ij) x_i, again and again until the budget is spent.

There is no N x N matrix: distances are computed for a block of rows at a time, and the graph is sparse. The search
is exact, and at N^2 times the dimensions it is what D2 costs. With embeddings of 576 dimensions, on 2 cores shared
with other work: 4.5 s of processor time (9 s by the clock) and 0.27 GB at N = 12,460, where N x N matrices take
28 s and 5.4 GB; 194 s (481 s by the clock) and 1.1 GB at N = 100,000 (results/benchmarks/selection.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt
from typing import ClassVar

import numpy as np
import pandas as pd

from baselines.el2n import VARIANTS
from staff.runtime.progress import progress
from staff.selection import Coreset, Draws, ScorePool, check_choice, check_range, check_scores

BLOCK_ROWS = 256  # samples whose neighbours are searched at once: 100 MB of distances at N = 100,000


@dataclass(frozen=True)
class D2:
    """Graph-based selection on EL2N and mean-pooled last hidden states of the target fine-tuned on the whole pool.

    Attributes:
        num_neighbors: k of the graph, which joins two samples if either is among the other's k nearest.
        gamma: of the charge on neighbours; the smaller, the more diverse the coreset.
        features: "normalised" to L2 norm 1, or "raw". At the scale of raw hidden states exp(-d) vanishes, and D2
            selects what EL2N would.
        variant: of EL2N, see `baselines.el2n.el2n_scores`.
    """

    version: ClassVar[int] = 1

    num_neighbors: int = 5
    gamma: float = 0.1
    features: str = "normalised"
    variant: str = "standard"

    def __post_init__(self) -> None:
        check_range(self, "num_neighbors", 1, whole=True)
        check_range(self, "gamma", 0)
        check_choice(self, "features", ("normalised", "raw"))
        check_choice(self, "variant", VARIANTS)

    def select(self, pool: ScorePool, budget: int, rng: Draws) -> Coreset:
        """Raises UserError for an EL2N score or an embedding that is not finite, by the sample's id."""
        el2n, features = pool.ask(["el2n", "embedding"], of="target_tuned", variant=self.variant)
        el2n = check_scores(el2n, pool.ids, "EL2N score")
        features = np.asarray(features, dtype=np.float32)
        norms = check_scores(np.linalg.norm(features, axis=1), pool.ids, "the norm of the embedding")
        # In an order drawn by id, ties of distance and of value, and rounding too, fall alike in every order of
        # the pool.
        order = np.argsort(rng.priorities("ties"))
        importance, features = np.maximum(el2n[order], 1e-7), features[order]
        if self.features == "normalised":
            features /= np.where(norms > 0, norms, 1)[order, None].astype(np.float32)
        graph = Graph.of_neighbours(*nearest_neighbours(features, self.num_neighbors))
        density = importance + graph.gather(np.exp(-graph.distances), importance)
        picked = pick_and_charge(density, graph, np.exp(-self.gamma * graph.distances), budget)

        in_pool_order = np.empty_like(density)
        in_pool_order[order] = density
        degrees = np.diff(graph.starts)
        diagnostics = (
            pd.DataFrame({"neighbours": degrees, "picked": np.isin(np.arange(len(order)), picked)})
            .groupby("neighbours", as_index=False)
            .agg(size=("picked", "size"), picked=("picked", "sum"))
        )
        notes: tuple[str, ...] = ()
        if len(graph.ends) and density.sum() < 1.001 * importance.sum():
            notes = ("neighbours add less than 0.1 % to the importance: samples lie too far apart for the graph.",)
        return Coreset(order[picked], diagnostics, {"el2n": el2n, "density": in_pool_order}, notes=notes)


@dataclass(frozen=True)
class Graph:
    """An undirected graph in compressed rows: sample i is joined to ends[starts[i]:starts[i + 1]].

    Attributes:
        starts: shape (N + 1,).
        ends: shape (edges,), every edge from both sides.
        distances: its length d_ij, shape (edges,).
    """

    starts: np.ndarray
    ends: np.ndarray
    distances: np.ndarray

    @classmethod
    def of_neighbours(cls, neighbours: np.ndarray, distances: np.ndarray) -> Graph:
        """The union of the directed edges i -> neighbours[i] and their reverses, both arguments of shape (N, k)."""
        n, k = neighbours.shape
        here, there = np.repeat(np.arange(n), k), neighbours.ravel()
        edges, first = np.unique(np.concatenate([here * n + there, there * n + here]), return_index=True)
        rows, ends = np.divmod(edges, n)
        return cls(np.searchsorted(rows, np.arange(n + 1)), ends, np.tile(distances.ravel(), 2)[first])

    def gather(self, weights: np.ndarray, values: np.ndarray) -> np.ndarray:
        """The sum over each sample's edges of weight times the value at the other end, shape (N,)."""
        rows = np.repeat(np.arange(len(values)), np.diff(self.starts))
        return np.bincount(rows, weights=weights * values[self.ends], minlength=len(values))


def pick_and_charge(values: np.ndarray, graph: Graph, charges: np.ndarray, budget: int) -> np.ndarray:
    """Pick the largest value, take from its neighbours charge times that value, `budget` times over.

    Values may fall below zero, and to pick one of those raises its neighbours: a heap would have to be told of
    every change, edge by edge. To look through all values for the largest costs N per pick, which is next to
    nothing beside the search for neighbours.
    """
    values = values.copy()
    picked = np.empty(budget, dtype=np.int64)
    for turn in range(budget):
        picked[turn] = best = values.argmax()
        edges = slice(graph.starts[best], graph.starts[best + 1])
        values[graph.ends[edges]] -= charges[edges] * values[best]
        values[best] = -np.inf
    return picked


def nearest_neighbours(features: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Every sample's k nearest others (fewer in a smaller pool), exactly: positions and distances, both (N, k).

    Args:
        features: (N, dimensions), float32.
    """
    k = min(k, len(features) - 1)
    if k == 0:
        return np.empty((1, 0), dtype=np.int64), np.empty((1, 0))
    positions, distances, settled = _search(features, np.arange(len(features)), k, np.float32)
    doubtful = np.flatnonzero(~settled)
    if len(doubtful):
        positions[doubtful], distances[doubtful], _ = _search(features, doubtful, k, np.float64)
    return positions, distances


def _search(
    features: np.ndarray, rows: np.ndarray, k: int, dtype: type
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions and distances of the k nearest of each of `rows`, and whether the precision of `dtype` sufficed.

    Squared distances come from one matrix product, |y|^2 - 2xy up to the row's own |x|^2, whose rounding may upset
    the order of near neighbours. So twice as many candidates are measured again by their differences in
    float64, and a row is settled if rounding cannot have kept a nearer one from being a candidate.
    """
    n, dimensions = features.shape
    count = min(2 * k, n - 1)
    group = isqrt(n // count)
    columns = -(-n // group) * group
    # Distances survive a shift, and a small norm keeps rounding small. What fills up the columns is infinitely far.
    points = np.zeros((columns, dimensions), dtype)
    np.subtract(features, features.mean(0, dtype=np.float64).astype(dtype), out=points[:n])
    squares = np.full(columns, np.inf, dtype)
    squares[:n] = np.einsum("nd,nd->n", points[:n], points[:n], dtype=np.float64)
    # Twice the worst case of a dot product of two points, and the rounding of the points themselves.
    slack = (dimensions + 16) * np.finfo(dtype).eps * squares[:n].max()
    positions, distances = np.empty((len(rows), k), dtype=np.int64), np.empty((len(rows), k))
    settled = np.empty(len(rows), dtype=bool)
    with progress(len(rows), "nearest neighbours") as bar:
        for start in range(0, len(rows), BLOCK_ROWS):
            here = slice(start, start + BLOCK_ROWS)
            block = rows[here]
            near = points[block] @ points.T
            near *= -2
            near += squares
            near[np.arange(len(block)), block] = np.inf
            candidates = smallest(near, count, group)
            bound = np.take_along_axis(near, candidates, 1).max(1) + squares[block] - slack
            difference = features[candidates].astype(np.float64) - features[block, None]
            exact = np.sqrt(np.einsum("bcd,bcd->bc", difference, difference))
            nearest = np.argsort(exact, axis=1, kind="stable")[:, :k]
            positions[here] = np.take_along_axis(candidates, nearest, 1)
            distances[here] = np.take_along_axis(exact, nearest, 1)
            settled[here] = (count == n - 1) | (distances[here, -1] ** 2 <= bound)
            bar.update(len(block))
    return positions, distances, settled


def smallest(values: np.ndarray, count: int, group: int) -> np.ndarray:
    """Columns of each row's `count` smallest values, shape (rows, count).

    They lie in the `count` groups whose minima are smallest, so that only these need sorting.

    Args:
        values: (rows, columns).
        group: columns of a group; divides their number, which is at least group x count.
    """
    grouped = values.reshape(len(values), group, -1)
    best = np.argpartition(grouped.min(1), count - 1)[:, :count]
    members = grouped.shape[2] * np.arange(group)
    columns = (best[:, None, :] + members[:, None]).reshape(len(values), -1)
    inside = np.argpartition(np.take_along_axis(values, columns, 1), count - 1)[:, :count]
    return np.take_along_axis(columns, inside, 1)
