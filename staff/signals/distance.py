"""Distance: between a model's predictions and a sample's answer (DELIFT, Agarwal et al., ICLR 2025, section 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from staff.scoring.signal import Pass, Signal

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Distance(Signal):
    """Root mean square over the answer tokens of one minus the true token's probability: (B,)."""

    name: ClassVar[str] = "distance"
    version: ClassVar[int] = 1

    def compute(self, batch: Pass) -> Tensor:
        from staff.scoring.positions import token_losses

        predictions = batch.positions("predictions")
        misses = -(-token_losses(batch.logits_at(predictions), predictions.targets)).expm1()
        return predictions.mean(misses.square()).sqrt()
