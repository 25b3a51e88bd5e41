"""Stratification by score, and sharing a budget out over the strata; STAFF and CCS rest on it.

A region (the paper's word) and a stratum (CCS's) are the same: the samples whose scores lie in one of K intervals
of equal width. Regions are served smallest first, so that what a small region cannot take goes to larger ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def equal_width_edges(low: float, high: float, num_regions: int, dtype: str = "float64") -> np.ndarray:
    """The K upper edges of K regions of equal width over [low, high], shape (K,), ascending.

    In float32 the edges are those of the authors' code, whose last one may lie below `high`.
    """
    if dtype == "float32":
        first, last = np.float32(low), np.float32(high)
        with np.errstate(over="ignore"):  # what is too large lies above the last edge
            step = (last - first) / np.float32(num_regions)
            edges = first + step * np.arange(1, num_regions + 1, dtype=np.float32)
        return np.minimum(edges, last).astype(np.float64)
    return np.linspace(low, high, num_regions + 1)[1:]


def stratify(scores: np.ndarray, edges: np.ndarray, *, upper_closed: bool = True) -> np.ndarray:
    """The region of each sample, shape (N,), int64; -1 where a score lies above the last edge.

    `upper_closed`: a score on an edge belongs to the region below it (STAFF) or above it (CCS).
    """
    region_of = np.searchsorted(edges, scores, side="left" if upper_closed else "right")
    return np.where(region_of < len(edges), region_of, -1)


def serving_order(region_of: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """The regions that are not empty, smallest first (equal sizes by score), and each one's members.

    Args:
        region_of: region of each of the samples `positions`, -1 for none.
        positions: their positions in the pool.
    """
    inside = region_of >= 0
    region_of, positions = region_of[inside], positions[inside]
    by_region = np.argsort(region_of, kind="stable")
    regions, starts, sizes = np.unique(region_of[by_region], return_index=True, return_counts=True)
    members = np.split(positions[by_region], starts[1:])
    order = np.argsort(sizes, kind="stable")
    return regions[order], [members[i] for i in order]


def share_out(left: int, sizes: Sequence[int] | np.ndarray, weights: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """One pass over the regions in serving order, `left` being what is left of the budget at each.

    Region i gets floor(left x weights[i] / totals[i]), never more than its size or than what is left.
    Returns the budgets, shape (regions,), int64.
    """
    budgets = np.zeros(len(sizes), dtype=np.int64)
    for i, (size, weight, total) in enumerate(zip(sizes, weights, totals)):
        budgets[i] = min(size, int(left * weight / total), left)
        left -= budgets[i]
    return budgets


def regions_left(count: int) -> np.ndarray:
    """How many regions are left, the one being served included: count, ..., 2, 1."""
    return np.arange(count, 0, -1)


def shares_of_ratio(ratios: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights V_i and totals (the sum of V over region i and those after it) for `share_out`.

    A region without a ratio (NaN) has an equal share among the regions left, and so has one whose ratio, and
    those of all regions after it, are zero.
    """
    known = np.nan_to_num(ratios)
    totals = np.cumsum(known[::-1])[::-1]
    equal = np.isnan(ratios) | (totals == 0)
    return np.where(equal, 1.0, known), np.where(equal, regions_left(len(ratios)), totals)
