"""Coverage by k-means: equal shares of the budget over clusters of the embeddings.

Clusters are served smallest first, as in S2L, so that what a small one cannot take goes to larger ones. Inside
a cluster samples are drawn at random, or those nearest to its centroid, or farthest from it, are taken. There
is no paper to be faithful to: this is the plain form of what many methods that cluster build on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd

from baselines.asks import FEATURES, Embedded, unit_rows
from baselines.kmeans import kmeans, nearest
from baselines.s2l import equal_shares
from staff.regions import serving_order
from staff.selection import Coreset, Draws, ScorePool, check_choice, check_range

PICKS = ("random", "nearest", "farthest")


@dataclass(frozen=True, kw_only=True)
class KMeansCoverage(Embedded):
    """Equal shares over clusters.

    Attributes:
        num_clusters: k of k-means.
        pick: inside a cluster: "random", "nearest" to the centroid, or "farthest" from it.
        features: "normalised" to norm 1, or "raw".
    """

    version: ClassVar[int] = 1

    num_clusters: int = 100
    pick: str = "random"
    features: str = "normalised"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "num_clusters", 1, whole=True)
        check_choice(self, "pick", PICKS)
        check_choice(self, "features", FEATURES)

    def select(self, pool: ScorePool, budget: int, rng: Draws) -> Coreset:
        """Raises UserError for an embedding that is not finite, by the sample's id."""
        points, priorities = self.embeddings(pool), rng.priorities("k-means")
        points = points if self.features == "raw" else unit_rows(points)
        _, centroids = kmeans(points, self.num_clusters, priorities)
        # In an order drawn by id, rounding falls alike in every order of the pool.
        order, labels, squares = np.argsort(priorities), np.empty(len(points), np.int64), np.empty(len(points))
        labels[order], squares[order] = nearest(points[order], centroids)
        clusters, members = serving_order(labels, np.arange(len(points)))
        shares = equal_shares(members, budget)
        key = {"random": np.zeros(len(points)), "nearest": -squares, "farthest": squares}[self.pick]
        preferred = rng.highest_first(key, "pick")
        rank = np.empty(len(points), dtype=np.int64)
        rank[preferred] = np.arange(len(points))
        picked = [m[np.argsort(rank[m])[:share]] for m, share in zip(members, shares)]
        diagnostics = pd.DataFrame({"cluster": clusters, "size": [len(m) for m in members], "budget": shares})
        scores = {"cluster": labels, "distance": np.sqrt(squares)}
        return Coreset(np.concatenate(picked), diagnostics, scores)
