"""Probability: how sure the model is of a sample's answer (data maps, Swayamdipta et al., EMNLP 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from staff.scoring.signal import Pass, Signal

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Probability(Signal):
    """Mean over the answer tokens of the true token's probability: (B,)."""

    name: ClassVar[str] = "probability"
    version: ClassVar[int] = 1

    def compute(self, batch: Pass) -> Tensor:
        from staff.scoring.positions import token_losses

        predictions = batch.positions("predictions")
        return predictions.mean((-token_losses(batch.logits_at(predictions), predictions.targets)).exp())
