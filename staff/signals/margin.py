"""Margin: by how much the true tokens lead over their best rivals (AUM, Pleiss et al., NeurIPS 2020)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from staff.scoring.signal import Pass, Signal

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Margin(Signal):
    """Mean over the answer tokens of the true token's logit less the largest other logit: (B,)."""

    name: ClassVar[str] = "margin"
    version: ClassVar[int] = 1

    def compute(self, batch: Pass) -> Tensor:
        import torch

        from staff.scoring.positions import widened

        predictions = batch.positions("predictions")
        logits, targets = batch.logits_at(predictions), predictions.targets
        own = widened(logits.gather(-1, targets[:, None])[:, 0])
        best, second = logits.topk(2, dim=-1).values.unbind(-1)
        rival = torch.where(logits.argmax(-1) == targets, second, best)
        return predictions.mean(own - widened(rival))
