"""The nearest neighbours of every sample in an embedding space, exact or approximate.

The exact search takes N^2 times dimensions operations. The approximate one looks only into the cells nearest to a
sample, which takes N^1.5 times dimensions: an inverted file as in Jégou et al. 2011, "Product Quantization for
Nearest Neighbor Search", without their quantisation (IndexIVFFlat of faiss).
"""

from __future__ import annotations

import hashlib
import importlib.util
from math import isqrt
from typing import Any

import numpy as np

from staff.errors import UserError
from staff.runtime.progress import progress

SEARCHES = ("exact", "approximate")
BLOCK_ROWS = 256
"""Samples per block of the exact search: 100 MB of distances at N = 100,000."""
PROBES = 64
"""Cells of the approximate search that are looked into for each sample."""
KNOWN = 8
"""Searches whose result is kept: the pruning rates of a sweep share one for each seed."""

_known: dict[tuple[Any, ...], tuple[np.ndarray, np.ndarray]] = {}


def check_search(search: str) -> None:
    """Refuse the approximate search where its library is missing."""
    if search == "approximate" and importlib.util.find_spec("faiss") is None:
        raise UserError("method.search=approximate needs faiss: pip install 'staff-coresets[neighbours]'.")


def nearest_neighbours(features: np.ndarray, k: int, search: str = "exact") -> tuple[np.ndarray, np.ndarray]:
    """Positions and distances of the k nearest neighbours of each sample, both (N, k).

    A pool of k samples or fewer has fewer neighbours. An approximate search may miss some of the nearest and have
    farther ones in their place; the distances are exact all the same.

    Args:
        features: (N, dimensions), float32.
        search: one of `SEARCHES`.
    """
    content = hashlib.blake2b(np.ascontiguousarray(features).data).hexdigest()
    key = (content, features.shape, str(features.dtype), k, search)
    if key not in _known:
        while len(_known) >= KNOWN:
            del _known[next(iter(_known))]
        _known[key] = _neighbours(features, k, search)
    return _known[key]


def _neighbours(features: np.ndarray, k: int, search: str) -> tuple[np.ndarray, np.ndarray]:
    k = min(k, len(features) - 1)
    if k == 0:
        return np.empty((1, 0), dtype=np.int64), np.empty((1, 0))
    if search == "exact":
        positions, distances, settled = _search(features, np.arange(len(features)), k, np.float32)
    else:
        positions, distances, settled = _search_cells(features, k)
    doubtful = np.flatnonzero(~settled)
    if len(doubtful):
        positions[doubtful], distances[doubtful], _ = _search(features, doubtful, k, np.float64)
    return positions, distances


def _search_cells(features: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `_search`, for all rows. A row is settled if its cells have at least k other samples."""
    n = len(features)
    index = _cells(np.ascontiguousarray(features, np.float32), cells=max(1, min(4 * isqrt(n), n // 64)))
    positions, distances = np.empty((n, k), dtype=np.int64), np.empty((n, k))
    settled = np.empty(n, dtype=bool)
    rows = 16 * BLOCK_ROWS
    with progress(n, "approximate neighbours") as bar:
        for start in range(0, n, rows):
            block = np.arange(start, min(start + rows, n))
            _, candidates = index.search(np.ascontiguousarray(features[block], np.float32), min(2 * k + 1, n))
            candidates[candidates == block[:, None]] = -1
            settled[block] = (candidates >= 0).sum(1) >= k
            positions[block], distances[block] = _nearest_of(features, block, candidates, k)
            bar.update(len(block))
    return positions, distances, settled


def _cells(features: np.ndarray, cells: int) -> Any:
    """An inverted file of the features, with the cells of k-means on a fixed random part of them."""
    import faiss  # pyright: ignore[reportMissingImports]

    dimensions = features.shape[1]
    coarse = faiss.IndexFlatL2(dimensions)
    index = faiss.IndexIVFFlat(coarse, dimensions, cells)
    index.cp.max_points_per_centroid = 64
    index.train(features)
    index.add(features)
    index.nprobe = min(PROBES, cells)
    return index


def _nearest_of(
    features: np.ndarray, rows: np.ndarray, candidates: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of each row's candidates, by distances from differences in float64; -1 is no candidate."""
    difference = features[candidates].astype(np.float64) - features[rows, None]
    exact = np.sqrt(np.einsum("bcd,bcd->bc", difference, difference))
    exact[candidates < 0] = np.inf
    nearest = np.argsort(exact, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(candidates, nearest, 1), np.take_along_axis(exact, nearest, 1)


def _search(
    features: np.ndarray, rows: np.ndarray, k: int, dtype: type
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Positions and distances of the k nearest neighbours of `rows`, and whether they are certain, for each row.

    Squared distances come from a matrix product, as |y|^2 - 2xy without the row's own |x|^2. Its rounding can
    change the order of near neighbours. So the distances of 2k candidates are computed again from differences in
    float64. A row is certain if no rounding error can have excluded a nearer candidate.
    """
    n, dimensions = features.shape
    count = min(2 * k, n - 1)
    group = isqrt(n // count)
    columns = -(-n // group) * group
    # Centring does not change distances and reduces rounding errors. The columns of padding are infinitely far.
    points = np.zeros((columns, dimensions), dtype)
    np.subtract(features, features.mean(0, dtype=np.float64).astype(dtype), out=points[:n])
    squares = np.full(columns, np.inf, dtype)
    squares[:n] = np.einsum("nd,nd->n", points[:n], points[:n], dtype=np.float64)
    # Twice the largest rounding error of a dot product, plus the rounding of the points themselves.
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
            positions[here], distances[here] = _nearest_of(features, block, candidates, k)
            settled[here] = (count == n - 1) | (distances[here, -1] ** 2 <= bound)
            bar.update(len(block))
    return positions, distances, settled


def smallest(values: np.ndarray, count: int, group: int) -> np.ndarray:
    """Columns of the `count` smallest values in each row, shape (rows, count).

    They are in the `count` groups with the smallest minima, so only these are sorted.

    Args:
        values: (rows, columns).
        group: columns per group; it divides the number of columns, which is at least group x count.
    """
    grouped = values.reshape(len(values), group, -1)
    best = np.argpartition(grouped.min(1), count - 1)[:, :count]
    members = grouped.shape[2] * np.arange(group)
    columns = (best[:, None, :] + members[:, None]).reshape(len(values), -1)
    inside = np.argpartition(np.take_along_axis(values, columns, 1), count - 1)[:, :count]
    return np.take_along_axis(columns, inside, 1)
