"""Embedding: a vector for each sample, from the model's hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from staff.errors import UserError
from staff.scoring.signal import Pass, Signal

if TYPE_CHECKING:
    from torch import Tensor


POOLINGS = ("answer_mean", "position_weighted", "last_token")


@dataclass(frozen=True)
class Embedding(Signal):
    """Pooled hidden states of one layer: (B, hidden size), float32.

    Attributes:
        layer: -1 for the last, after the final norm; otherwise the index of a block, whose output is read.
        pooling: "answer_mean", the mean over answer tokens; "position_weighted", the mean over all tokens, weighted
            by their position 1..T (RDS+, Ivison et al. 2025, section 3); "last_token", the state at the last token.
    """

    name: ClassVar[str] = "embedding"
    version: ClassVar[int] = 1
    logits: ClassVar[bool] = False
    dtype: ClassVar[str] = "float32"

    layer: int = -1
    pooling: str = "answer_mean"

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise UserError(f"pooling={self.pooling!r} of the signal 'embedding': choose {', '.join(POOLINGS)}.")

    @property
    def reads(self) -> str:
        return "answers" if self.pooling == "answer_mean" else "tokens"

    def shape(self, config: Any) -> tuple[int, ...]:
        return (config.hidden_size,)

    def compute(self, batch: Pass) -> Tensor:
        import torch

        positions = batch.positions(self.reads)
        states = batch.states_at(self.layer, positions).float()
        if self.pooling == "answer_mean":
            return positions.mean(states)
        ends = positions.counts.cumsum(0)
        if self.pooling == "last_token":
            return states[ends - 1]
        starts = (ends - positions.counts).repeat_interleave(positions.counts)
        weights = torch.arange(1, len(states) + 1, device=states.device) - starts
        summed = torch.segment_reduce(states * weights[:, None], "sum", lengths=positions.counts, axis=0)
        return summed / (positions.counts * (positions.counts + 1) / 2)[:, None]
