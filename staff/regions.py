"""Stratification by score, and allocation of a budget to the strata, for STAFF and CCS.

A region (in STAFF) or stratum (in CCS) has the samples whose scores are in one of K intervals of equal width. The
budget is allocated to the smallest region first, so that what it cannot take is left for larger ones. This is
called the serving order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def equal_width_edges(low: float, high: float, num_regions: int, dtype: str = "float64") -> np.ndarray:
    """The upper edges of K regions of equal width over [low, high], shape (K,), ascending.

    In float32 they are the edges of the authors' code, and the last one can be below `high`.
    """
    if dtype == "float32":
        first, last = np.float32(low), np.float32(high)
        with np.errstate(over="ignore"):  # edges that overflow are clipped to the last
            step = (last - first) / np.float32(num_regions)
            edges = first + step * np.arange(1, num_regions + 1, dtype=np.float32)
        return np.minimum(edges, last).astype(np.float64)
    return np.linspace(low, high, num_regions + 1)[1:]


def stratify(scores: np.ndarray, edges: np.ndarray, *, upper_closed: bool = True) -> np.ndarray:
    """The region of each sample, shape (N,), int64; -1 for a score above the last edge.

    Args:
        upper_closed: whether a score on an edge belongs to the region below it (STAFF) or above it (CCS).
    """
    region_of = np.searchsorted(edges, scores, side="left" if upper_closed else "right")
    return np.where(region_of < len(edges), region_of, -1)


def serving_order(region_of: np.ndarray, positions: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """The non-empty regions, smallest first (those of equal size by score), and their members.

    Args:
        region_of: the region of each sample, -1 for none.
        positions: the samples' positions in the pool.
    """
    inside = region_of >= 0
    region_of, positions = region_of[inside], positions[inside]
    by_region = np.argsort(region_of, kind="stable")
    regions, starts, sizes = np.unique(region_of[by_region], return_index=True, return_counts=True)
    members = np.split(positions[by_region], starts[1:])
    order = np.argsort(sizes, kind="stable")
    return regions[order], [members[i] for i in order]


def share_out(left: int, sizes: Sequence[int] | np.ndarray, weights: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """The budgets of the regions after one pass in serving order, shape (regions,), int64.

    Region i gets floor(left x weights[i] / totals[i]) of the budget that is left at its turn, but at most its size
    and at most what is left.
    """
    budgets = np.zeros(len(sizes), dtype=np.int64)
    for i, (size, weight, total) in enumerate(zip(sizes, weights, totals)):
        budgets[i] = min(size, int(left * weight / total), left)
        left -= budgets[i]
    return budgets


def regions_left(count: int) -> np.ndarray:
    """The number of regions left at each turn, with the current one: count, ..., 2, 1."""
    return np.arange(count, 0, -1)


def shares_of_ratio(ratios: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Weights V_i, and totals (the sum of V over the regions left at turn i), for `share_out`.

    A region gets an equal share among the regions left if it has no ratio (NaN), or if its ratio and those of all
    later regions are zero.
    """
    known = np.nan_to_num(ratios)
    totals = np.cumsum(known[::-1])[::-1]
    equal = np.isnan(ratios) | (totals == 0)
    return np.where(equal, 1.0, known), np.where(equal, regions_left(len(ratios)), totals)
