"""Random: a uniform draw, which every other method should beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from staff.selection import Coreset, Draws, ScorePool


@dataclass(frozen=True)
class Random:
    """Selects samples uniformly without replacement, at no cost."""

    version: ClassVar[int] = 1

    def select(self, pool: ScorePool, budget: int, rng: Draws) -> Coreset:
        return Coreset(rng.choose("pick", np.arange(len(pool.ids)), budget))
