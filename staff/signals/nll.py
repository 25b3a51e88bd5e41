"""Negative log-likelihood of an answer, separately for its content and its end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from staff.scoring.signal import Pass, Signal

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class AnswerNll(Signal):
    """Nats per content token, and nats of the end token, of each sample's answer: (B, 2)."""

    name: ClassVar[str] = "nll"
    version: ClassVar[int] = 1

    def shape(self, config: Any) -> tuple[int, ...]:
        return (2,)

    def compute(self, batch: Pass) -> Tensor:
        import torch

        from staff.scoring.positions import token_losses

        predictions = batch.positions("predictions")
        losses = token_losses(batch.logits_at(predictions), predictions.targets)
        end = losses[predictions.counts.cumsum(0) - 1]
        total = torch.segment_reduce(losses, "sum", lengths=predictions.counts, axis=0)
        return torch.stack([(total - end) / (predictions.counts - 1).clamp_min(1), end], 1)
