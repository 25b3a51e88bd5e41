"""Moderate coresets: the samples neither near to nor far from the middle of their class (Xia et al., ICLR 2023,
"Moderate Coreset").

The distance of a sample is the Euclidean one to the coordinate-wise median of its class. Samples of all classes
are ranked by it together, and the ranks around the median are kept. A generation task has no classes: by
default the pool is one.

The released code takes embeddings as they are (`moderate_official`), while the default scales them to norm 1.
It keeps the ranks from round(N (0.5 - r / 2)) to round(N (0.5 + r / 2)), halves to even, which may be one more
than r N; the budget is met exactly here, from the same first rank. It returns the ids that it drops.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from baselines.asks import FEATURES, Embedded, row_norms
from baselines.kmeans import kmeans
from staff.errors import UserError
from staff.selection import Coreset, Draws, ScorePool, check_choice, check_range

CLASSES = ("one", "groups", "kmeans")


@dataclass(frozen=True, kw_only=True)
class Moderate(Embedded):
    """The middle ranks by distance to the median.

    Attributes:
        classes: "one"; "groups", those of the task; "kmeans", clusters of the embeddings.
        num_clusters: of "kmeans".
        features: "normalised" to norm 1, or "raw".
    """

    version: ClassVar[int] = 1

    classes: str = "one"
    num_clusters: int = 10
    features: str = "normalised"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "classes", CLASSES)
        check_range(self, "num_clusters", 1, whole=True)
        check_choice(self, "features", FEATURES)

    def select(self, pool: ScorePool, budget: int, rng: Draws) -> Coreset:
        """Raises UserError for an embedding that is not finite, by the sample's id, and for classes by groups where
        the task has none."""
        groups = pool.groups
        if self.classes == "groups" and groups is None:
            raise UserError("method.classes=groups needs groups: set task.group_field, or method.classes=one.")
        points = self.embeddings(pool)
        norms = np.ones(len(points), points.dtype) if self.features == "raw" else row_norms(points)
        labels = np.zeros(len(points), dtype=np.int64)
        if self.classes == "groups" and groups is not None:
            labels = np.unique(groups, return_inverse=True)[1]
        elif self.classes == "kmeans":
            points, norms = points / norms[:, None], np.ones_like(norms)
            labels, _ = kmeans(points, self.num_clusters, rng.priorities("k-means"))
        distances = distances_to_median(points, labels, norms)
        first, _ = middle_ranks(len(points), budget / len(points))
        picked = rng.highest_first(-distances)[first : first + budget]
        return Coreset(picked, scores={"distance": distances, "class": labels})


ROWS, COLUMNS = 65_536, 16
"""Of the embeddings, copied at once."""


def distances_to_median(points: np.ndarray, labels: np.ndarray, norms: np.ndarray) -> np.ndarray:
    """|x - coordinate-wise median of its class|, (N,), float64, where x is a point divided by its norm.

    Points are divided as they are read: a normalised copy of all would double the memory of a large pool.

    Args:
        points: (N, d).
        labels: class of each, (N,).
        norms: what each point is divided by, (N,).
    """
    distances = np.empty(len(points))
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        divisors = norms[members, None]
        columns = (points[members, at : at + COLUMNS] / divisors for at in range(0, points.shape[1], COLUMNS))
        median = np.concatenate([np.median(some, axis=0) for some in columns]).astype(points.dtype)
        for start in range(0, len(members), ROWS):
            rows = members[start : start + ROWS]
            difference = points[rows] / norms[rows, None] - median
            distances[rows] = np.sqrt(np.einsum("nd,nd->n", difference, difference, dtype=np.float64))
    return distances


def middle_ranks(size: int, rate: float) -> tuple[int, int]:
    """First rank kept and the one after the last, as the released code rounds them; rate is the fraction kept."""
    return round(size * (0.5 - rate / 2)), round(size * (0.5 + rate / 2))
