"""k-center: the samples that leave none far from the coreset (Sener and Savarese, ICLR 2018, "Active Learning
for Convolutional Neural Networks: A Core-Set Approach", algorithm 1).

The sample farthest from those picked before is picked next, which covers the pool within twice the least
possible radius. The first one is drawn at random and counts. The paper's robust step, an integer programme, is
left out, as in the released code (DeepCore, `k_center_greedy`). That code takes embeddings as they are
(`k_center_official`), while the default scales them to norm 1. It also selects within each class, of which a
generation task has none.

A pick needs its distance to every sample, so m picks cost m N d operations. The distances of all but the
farthest samples are brought up to date for many picks at once, by one matrix product. The result is the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd

from baselines.asks import FEATURES, Embedded, unit_rows
from baselines.kmeans import BLOCK_ROWS, squared_distances
from staff.selection import Coreset, Draws, ScorePool, check_choice

WINDOW = 2048  # farthest samples whose distances are brought up to date at every pick


@dataclass(frozen=True, kw_only=True)
class KCenter(Embedded):
    """Farthest point first.

    Attributes:
        features: "normalised" to norm 1, or "raw".
    """

    version: ClassVar[int] = 1

    features: str = "normalised"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "features", FEATURES)

    def select(self, pool: ScorePool, budget: int, rng: Draws) -> Coreset:
        """Raises UserError for an embedding that is not finite, by the sample's id."""
        points = self.embeddings(pool)
        # In an order drawn by id the first sample is a random one, and ties and rounding fall alike in every order
        # of the pool.
        order = np.argsort(rng.priorities("ties"))
        points = points[order] if self.features == "raw" else unit_rows(points[order])
        picked, radii = farthest_first(points, np.array([0]), budget - 1)
        diagnostics = pd.DataFrame({"picked": np.arange(2, budget + 1), "radius": radii})
        return Coreset(order[np.concatenate([[0], picked])], diagnostics)


def farthest_first(points: np.ndarray, start: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """`count` picks, each the point farthest from `start` and the picks before it, and its distance to the nearest
    of these; both (count,). The first of equals is picked.

    Args:
        points: (N, d).
        start: positions, at least one; with `count` at most N.
    """
    points = points.astype(np.float64)
    squares = np.einsum("nd,nd->n", points, points)
    distances = np.full(len(points), np.inf)  # squared, to the nearest centre; -1 for a centre
    picked, radii = np.empty(count, dtype=np.int64), np.empty(count)
    pending, done = np.asarray(start), 0  # centres that `distances` does not know
    while done < count:
        for first in range(0, len(points), BLOCK_ROWS):
            rows = slice(first, first + BLOCK_ROWS)
            to_new = squared_distances(points[rows], squares[rows], points[pending]).min(1)
            np.minimum(distances[rows], to_new, out=distances[rows])
        distances[pending] = -1
        window, outside = _farthest(distances)
        near, begun = distances[window], done
        while done < count:
            best = near.argmax()
            if (near[best], -window[best]) < outside:
                break  # a point outside may be farther
            picked[done], radii[done] = window[best], np.sqrt(near[best])
            to_new = squared_distances(points[window], squares[window], points[window[best : best + 1]])[:, 0]
            np.minimum(near, to_new, out=near)
            near[best] = -1
            done += 1
        pending = picked[begun:done]
    return picked, radii


def _farthest(distances: np.ndarray) -> tuple[np.ndarray, tuple[float, int]]:
    """The `WINDOW` farthest points, ascending, and the distance and negative position of the farthest other one."""
    order = np.argsort(-distances, kind="stable")
    window, rest = np.sort(order[:WINDOW]), order[WINDOW:]
    return window, (float(distances[rest[0]]), -int(rest[0])) if len(rest) else (-np.inf, 0)


# ---------------------------------------------------------------- as released


def balanced_official(points: np.ndarray, labels: np.ndarray, fraction: float, starts: np.ndarray) -> np.ndarray:
    """DeepCore's picks with `balance`, class by class: round(fraction n) of the n samples of each.

    Args:
        points: (N, d).
        labels: class of each, (N,).
        starts: the first pick of each class, in the order of the classes; drawn at random there.
    """
    picked = []
    for label, start in zip(np.unique(labels), starts, strict=True):
        members = np.flatnonzero(labels == label)
        count = round(fraction * len(members))
        begun = np.flatnonzero(members == start)
        picks, _ = farthest_first(points[members], begun, max(count - 1, 0))
        picked.append(members[np.concatenate([begun, picks])[:count]])
    return np.concatenate(picked)
