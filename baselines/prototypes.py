"""Self-supervised prototypes: the samples farthest from, or nearest to, the prototype of their cluster
(Sorscher et al., NeurIPS 2022, "Beyond neural scaling laws").

Embeddings are clustered by k-means, and the distance to the nearest centroid says how hard a sample is. The
paper finds that the hardest are best where data is plentiful and the easiest where it is scarce. It released no
code. The three metrics are those of SemDeDup's code, of the same group, which sorts each cluster by this
distance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from baselines.asks import Embedded, unit_rows
from baselines.kmeans import kmeans, nearest
from staff.selection import Coreset, Draws, ScorePool, check_choice, check_range

METRICS = ("cosine_spherical", "cosine", "l2")


@dataclass(frozen=True, kw_only=True)
class Prototypes(Embedded):
    """Samples of the whole pool by their distance to the nearest of k centroids.

    Attributes:
        num_clusters: k of k-means.
        metric: see `prototype_distances`; embeddings are scaled to norm 1 for the cosine ones.
        keep: "hard" for the farthest, "easy" for the nearest.
    """

    version: ClassVar[int] = 1

    num_clusters: int = 100
    metric: str = "cosine_spherical"
    keep: str = "hard"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "num_clusters", 1, whole=True)
        check_choice(self, "metric", METRICS)
        check_choice(self, "keep", ("hard", "easy"))

    def select(self, pool: ScorePool, budget: int, rng: Draws) -> Coreset:
        """Raises UserError for an embedding that is not finite, by the sample's id."""
        points, priorities = self.embeddings(pool), rng.priorities("k-means")
        points = points if self.metric == "l2" else unit_rows(points)
        spherical = self.metric == "cosine_spherical"
        _, centroids = kmeans(points, self.num_clusters, priorities, spherical=spherical)
        # In an order drawn by id, rounding falls alike in every order of the pool.
        order, labels, distances = np.argsort(priorities), np.empty(len(points), np.int64), np.empty(len(points))
        labels[order], distances[order] = prototype_distances(points[order], centroids, self.metric)
        picked = rng.highest_first(distances if self.keep == "hard" else -distances)[:budget]
        return Coreset(picked, scores={"cluster": labels, "distance": distances})


def prototype_distances(points: np.ndarray, centroids: np.ndarray, metric: str) -> tuple[np.ndarray, np.ndarray]:
    """The centroid of each sample and its distance to it, both (N,).

    Args:
        points: (N, d).
        centroids: (k, d).
        metric: "l2", the nearest and its squared Euclidean distance; "cosine", the same centroid and one minus
            their cosine; "cosine_spherical", the one of largest inner product, and one minus that.
    """
    labels, distances = nearest(points, centroids, inner=metric == "cosine_spherical")
    if metric == "cosine":
        distances = -np.einsum("nd,nd->n", unit_rows(points), unit_rows(centroids)[labels], dtype=np.float64)
    return labels, distances if metric == "l2" else 1 + distances
