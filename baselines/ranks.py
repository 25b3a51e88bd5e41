"""Selection by the rank of one score: the highest, the middle or the lowest of a pool."""

from __future__ import annotations

import numpy as np

from staff.selection import Draws

WHICH = ("top", "middle", "low")


def take(scores: np.ndarray, which: str, budget: int, rng: Draws) -> np.ndarray:
    """Positions of `budget` samples: the highest scored ("top"), the lowest ("low"), or the ones whose ranks lie
    around the median ("middle"). Equal scores are ranked by keyed draws."""
    start = {"top": 0, "middle": (len(scores) - budget) // 2, "low": len(scores) - budget}[which]
    return rng.highest_first(scores)[start : start + budget]
