"""Bounds for every method: fine-tuning on all samples, and no fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from staff.selection import Coreset, Draws, ScorePool


@dataclass(frozen=True)
class Full:
    """Selects all samples, whatever the pruning rate."""

    version: ClassVar[int] = 1

    def fixed_size(self, pool_size: int) -> int:
        return pool_size

    def select(self, pool: ScorePool, budget: int, rng: Draws) -> Coreset:
        return Coreset(np.arange(len(pool.ids)))


@dataclass(frozen=True)
class Raw:
    """Selects no sample: the raw target LLM, without fine-tuning."""

    version: ClassVar[int] = 1

    def fixed_size(self, pool_size: int) -> int:
        return 0

    def select(self, pool: ScorePool, budget: int, rng: Draws) -> Coreset:
        return Coreset(np.empty(0, dtype=np.int64))
