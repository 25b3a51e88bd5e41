"""The two ends that a coreset lies between: all samples, and none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from staff.selection import Coreset, Draws, ScorePool


@dataclass(frozen=True)
class Full:
    """Every sample, whatever the pruning rate."""

    version: ClassVar[int] = 1

    def fixed_size(self, pool_size: int) -> int:
        return pool_size

    def select(self, pool: ScorePool, budget: int, rng: Draws) -> Coreset:
        return Coreset(np.arange(len(pool.ids)))


@dataclass(frozen=True)
class Raw:
    """No sample: the target LLM as it is, without fine-tuning."""

    version: ClassVar[int] = 1

    def fixed_size(self, pool_size: int) -> int:
        return 0

    def select(self, pool: ScorePool, budget: int, rng: Draws) -> Coreset:
        return Coreset(np.empty(0, dtype=np.int64))
