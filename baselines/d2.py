"""D2 pruning: difficulty and diversity by message passing on a graph of samples (Maharana et al., ICLR 2024).

Every sample is connected to its k nearest neighbours in embedding space, at Euclidean distances d_ij. Forward
message passing adds to the importance x_i of a sample (EL2N on the fine-tuned target) that of its neighbours: x_i +
sum over neighbours of exp(-d_ij) x_j. Then the sample with the highest value is picked and the values of its
neighbours are reduced, x_j -= exp(-gamma d_ij) x_i, until the budget is spent.

No N x N matrix is formed: distances are computed for a block of rows at a time, and the graph is sparse. The search
for neighbours dominates the cost of D2. results/benchmarks/README.md has times and memory of both searches, and
of N x N matrices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd

from baselines.el2n import VARIANTS
from baselines.neighbours import SEARCHES, check_search, nearest_neighbours
from staff.selection import Coreset, Draws, ScorePool, check_choice, check_range, check_scores


@dataclass(frozen=True)
class D2:
    """Graph-based selection on EL2N and mean-pooled last hidden states of the target fine-tuned on the whole pool.

    Attributes:
        num_neighbors: k; two samples are connected if either is among the other's k nearest.
        gamma: gamma of the reduction of neighbours; a smaller value gives a more diverse coreset.
        features: "normalised" to L2 norm 1, or "raw". At the scale of raw hidden states exp(-d) vanishes, and D2
            selects the same samples as EL2N.
        variant: variant of EL2N, see `baselines.el2n.el2n_scores`.
        search: for neighbours, "exact", or "approximate" by an index of faiss, for pools of a million.
    """

    version: ClassVar[int] = 1

    num_neighbors: int = 5
    gamma: float = 0.1
    features: str = "normalised"
    variant: str = "standard"
    search: str = "exact"

    def __post_init__(self) -> None:
        check_range(self, "num_neighbors", 1, whole=True)
        check_range(self, "gamma", 0)
        check_choice(self, "features", ("normalised", "raw"))
        check_choice(self, "variant", VARIANTS)
        check_choice(self, "search", SEARCHES)
        check_search(self.search)

    def select(self, pool: ScorePool, budget: int, rng: Draws) -> Coreset:
        """The coreset of `budget` samples.

        Raises:
            UserError: an EL2N score or an embedding that is not finite, by the sample's id.
        """
        el2n, features = pool.ask(["el2n", "embedding"], of="target_tuned", variant=self.variant)
        el2n = check_scores(el2n, pool.ids, "EL2N score")
        features = np.asarray(features, dtype=np.float32)
        norms = check_scores(np.linalg.norm(features, axis=1), pool.ids, "the norm of the embedding")
        # Work in an order drawn by id, so that ties and rounding do not depend on the order of the pool.
        order = np.argsort(rng.priorities("ties"))
        importance, features = np.maximum(el2n[order], 1e-7), features[order]
        if self.features == "normalised":
            features /= np.where(norms > 0, norms, 1)[order, None].astype(np.float32)
        graph = Graph.of_neighbours(*nearest_neighbours(features, self.num_neighbors, self.search))
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
    """An undirected graph in compressed rows: sample i is connected to ends[starts[i]:starts[i + 1]].

    Attributes:
        starts: first edge of each sample, shape (N + 1,).
        ends: other end of each edge, shape (edges,); every edge is stored in both directions.
        distances: length d_ij of each edge, shape (edges,).
    """

    starts: np.ndarray
    ends: np.ndarray
    distances: np.ndarray

    @classmethod
    def of_neighbours(cls, neighbours: np.ndarray, distances: np.ndarray) -> Graph:
        """The graph with edges from i to each of neighbours[i]; both arguments have shape (N, k)."""
        n, k = neighbours.shape
        here, there = np.repeat(np.arange(n), k), neighbours.ravel()
        edges, first = np.unique(np.concatenate([here * n + there, there * n + here]), return_index=True)
        rows, ends = np.divmod(edges, n)
        return cls(np.searchsorted(rows, np.arange(n + 1)), ends, np.tile(distances.ravel(), 2)[first])

    def gather(self, weights: np.ndarray, values: np.ndarray) -> np.ndarray:
        """For each sample, the sum over its edges of weight times the value at the other end, shape (N,)."""
        rows = np.repeat(np.arange(len(values)), np.diff(self.starts))
        return np.bincount(rows, weights=weights * values[self.ends], minlength=len(values))


def pick_and_charge(values: np.ndarray, graph: Graph, charges: np.ndarray, budget: int) -> np.ndarray:
    """Positions of `budget` samples: pick the highest value, subtract charge times it from its neighbours, repeat.

    Values can become negative, and picking a negative one raises its neighbours. A heap would need an update for
    every such change. A scan for the highest value costs N per pick, which is negligible beside the neighbour
    search.
    """
    values = values.copy()
    picked = np.empty(budget, dtype=np.int64)
    for turn in range(budget):
        picked[turn] = best = values.argmax()
        edges = slice(graph.starts[best], graph.starts[best + 1])
        values[graph.ends[edges]] -= charges[edges] * values[best]
        values[best] = -np.inf
    return picked
