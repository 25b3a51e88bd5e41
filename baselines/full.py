"""The two ends that a coreset lies between: all samples, and none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from staff.selection import Coreset, Draws, ScorePool


@dataclass(frozen=True)
class Full:
    """Every sample, whatever the pruning rate."""

    pruning_rate: ClassVar[float] = 0.0

    def select(self, pool: ScorePool, budget: int, rng: Draws) -> Coreset:
        return Coreset(np.arange(len(pool.ids)))


@dataclass(frozen=True)
class Raw:
    """No sample: the target LLM as it is, without fine-tuning."""

    pruning_rate: ClassVar[float] = 1.0

    def select(self, pool: ScorePool, budget: int, rng: Draws) -> Coreset:
        return Coreset(np.empty(0, dtype=np.int64))
