"""k-means in NumPy, for methods that cluster a pool.

Everything is computed in an order of the samples that is drawn by id, so the clusters, down to rounding, do not
depend on the order of the pool. Distances come from matrix products over blocks of samples: an iteration takes
2 N K d operations, and memory is that of the samples in float64.
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import csr_matrix

BLOCK_ROWS = 4096


def squared_distances(points: np.ndarray, squares: np.ndarray, others: np.ndarray) -> np.ndarray:
    """|x - y|^2 between rows x of `points` and y of `others`, (rows, others), float64; exactly 0 for equal rows.

    Args:
        points: (rows, d), float64.
        squares: their |x|^2, (rows,).
        others: (others, d), float64.
    """
    scale = squares[:, None] + np.einsum("kd,kd->k", others, others)
    distances = scale - 2 * (points @ others.T)
    distances[distances < 1e-12 * scale] = 0  # what is left of equal rows after rounding
    return distances


def nearest(points: np.ndarray, centroids: np.ndarray, *, inner: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The nearest centroid of each point, the first one of equals, and the squared distance to it, both (N,).

    `inner`: the centroid of largest inner product instead, and that product's negative.
    """
    labels, distances = np.empty(len(points), dtype=np.int64), np.empty(len(points))
    centroids = centroids.astype(np.float64)
    for start in range(0, len(points), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        block = points[rows].astype(np.float64)
        squares = np.einsum("nd,nd->n", block, block)
        to_all = -(block @ centroids.T) if inner else squared_distances(block, squares, centroids)
        labels[rows] = to_all.argmin(1)
        distances[rows] = to_all.min(1)
    return labels, distances


def kmeans(
    points: np.ndarray, k: int, priorities: np.ndarray, *, iterations: int = 20, spherical: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Lloyd's algorithm after a k-means++ start: labels (N,) and centroids (at most k, d), float64.

    There are fewer than k centroids where there are fewer distinct points. A cluster that loses all its points
    moves to the point that is farthest from its centroid.

    Args:
        points: (N, d).
        k: at least 1.
        priorities: keyed draws of the points, (N,), uint64: `Draws.priorities`.
        iterations: at most; faiss, which the released code of several methods calls, has 20.
        spherical: centroids are scaled to norm 1; for points of norm 1.
    """
    order = np.argsort(priorities)
    ordered = points[order].astype(np.float64)
    ordered_labels, centroids = _lloyd(ordered, _start(ordered, k, priorities[order[:4]]), iterations, spherical)
    labels = np.empty(len(points), dtype=np.int64)
    labels[order] = ordered_labels
    return labels, centroids


def _start(points: np.ndarray, k: int, seed: np.ndarray) -> np.ndarray:
    """k-means++ (Arthur and Vassilvitskii, 2007): points drawn in proportion to their squared distance to the
    centroids drawn before."""
    rng = np.random.default_rng(seed)
    squares = np.einsum("nd,nd->n", points, points)
    chosen, distances = [0], squared_distances(points, squares, points[:1])[:, 0]
    while len(chosen) < k and distances.any():
        chosen.append(int(rng.choice(len(points), p=distances / distances.sum())))
        to_new = squared_distances(points, squares, points[chosen[-1:]])[:, 0]
        np.minimum(distances, to_new, out=distances)
    return points[chosen]


def _lloyd(
    points: np.ndarray, centroids: np.ndarray, iterations: int, spherical: bool
) -> tuple[np.ndarray, np.ndarray]:
    labels, distances = nearest(points, centroids)
    for _ in range(iterations):
        before = labels
        centroids = _means(points, labels, distances, len(centroids))
        if spherical:
            norms = np.linalg.norm(centroids, axis=1, keepdims=True)
            centroids /= np.where(norms > 0, norms, 1)
        labels, distances = nearest(points, centroids)
        if (labels == before).all():
            break
    return labels, centroids


def _means(points: np.ndarray, labels: np.ndarray, distances: np.ndarray, k: int) -> np.ndarray:
    counts = np.bincount(labels, minlength=k)
    members = csr_matrix((np.ones(len(points)), (labels, np.arange(len(points)))), shape=(k, len(points)))
    means = (members @ points) / np.maximum(counts, 1)[:, None]
    empty = np.flatnonzero(counts == 0)
    means[empty] = points[np.argsort(-distances, kind="stable")[: len(empty)]]
    return means
