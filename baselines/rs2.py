"""RS2: a fresh random subset for every epoch (Okanovic et al., ICLR 2024).

Repeated random sampling keeps the budget of every epoch, and with it the number of optimiser steps, but sees more
of the pool than a fixed random coreset. A method that selects one coreset should be compared with both.

The paper has two forms. In Algorithm 1 every epoch's subset is drawn from the whole pool (`repeats: true`, the
default). Without replacement (`repeats: false`), an epoch takes samples that none before has had, until the pool is
used up and a new order is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from staff.errors import UserError
from staff.selection import Coreset, Draws, ScorePool, check_range


@dataclass(frozen=True)
class RS2:
    """Uniform over the pool, drawn again for every epoch. The score "epochs" is how many of them a sample is in.

    Attributes:
        epochs: of fine-tuning on the coreset.
        repeats: whether a sample may be drawn again before all others were.
    """

    version: ClassVar[int] = 1

    epochs: int
    repeats: bool = True

    def __post_init__(self) -> None:
        check_range(self, "epochs", 1, whole=True)
        if not isinstance(self.repeats, bool):
            raise UserError(f"method.repeats={self.repeats!r} must be true or false.")

    def select(self, pool: ScorePool, budget: int, rng: Draws) -> Coreset:
        everything = np.arange(len(pool.ids))
        if self.repeats:
            schedule = np.stack([rng.choose(f"epoch {k}", everything, budget) for k in range(self.epochs)])
        else:
            schedule = without_repeats(rng, everything, budget, self.epochs)
        times = np.bincount(schedule.ravel(), minlength=len(everything)).astype(np.float64)
        return Coreset.by_epoch(schedule, scores={"epochs": times})


def without_repeats(rng: Draws, candidates: np.ndarray, budget: int, epochs: int) -> np.ndarray:
    """Consecutive parts of random orders of the candidates, (epochs, budget).

    An epoch that an order ends in takes the rest from the next order, whose samples that it has already come in the
    epoch after it.
    """
    schedule, left, order = np.empty((epochs, budget), dtype=np.int64), np.empty(0, dtype=np.int64), 0
    for epoch in range(epochs):
        taken, left = left[:budget], left[budget:]
        if len(taken) < budget:
            fresh = rng.choose(f"order {order}", candidates, len(candidates))
            order += 1
            new = fresh[~np.isin(fresh, taken)][: budget - len(taken)]
            left = fresh[~np.isin(fresh, new)]
            taken = np.concatenate([taken, new])
        schedule[epoch] = taken
    return schedule
