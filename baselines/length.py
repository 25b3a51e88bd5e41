"""Longest and shortest answers.

The longest answers are a baseline that is hard to beat (Zhao et al., ICML 2024, "Long Is More for Alignment").
The authors released a list of samples and no code. Length is counted here in tokens of the target's tokenizer,
over the answer alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from baselines.asks import WHICH, take
from staff.selection import Coreset, Draws, ScorePool, check_choice


@dataclass(frozen=True)
class Length:
    """Samples by the length of their answer; no model scores anything.

    Attributes:
        which: "top" for the longest answers, "low" for the shortest, "middle" for those around the median.
    """

    version: ClassVar[int] = 1

    which: str = "top"

    def __post_init__(self) -> None:
        check_choice(self, "which", WHICH)

    def select(self, pool: ScorePool, budget: int, rng: Draws) -> Coreset:
        lengths = np.asarray(pool.answer_lengths, dtype=np.int64)
        return Coreset(take(lengths, self.which, budget, rng), scores={"answer_length": lengths})
