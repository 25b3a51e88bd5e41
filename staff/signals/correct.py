"""Correct: how much of a sample's answer the model predicts (forgetting, Toneva et al., ICLR 2019)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from staff.scoring.signal import Pass, Signal

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Correct(Signal):
    """Share of the answer tokens to which the model gives the largest logit: (B,)."""

    name: ClassVar[str] = "correct"
    version: ClassVar[int] = 1

    def compute(self, batch: Pass) -> Tensor:
        predictions = batch.positions("predictions")
        found = batch.logits_at(predictions).argmax(-1) == predictions.targets
        return predictions.mean(found.float())
