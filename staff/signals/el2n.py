"""EL2N: the norm of the error of a model's prediction (Paul et al., NeurIPS 2021, arXiv:2107.07075)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from staff.errors import UserError
from staff.scoring.signal import Pass, Signal

if TYPE_CHECKING:
    from torch import Tensor

    from staff.scoring.positions import Positions

VARIANTS = ("standard", "official")
CHUNK = 256
"""Positions whose probabilities are in memory at the same time."""


@dataclass(frozen=True)
class EL2N(Signal):
    """EL2N of the answer tokens of a causal language model: (B,).

    Attributes:
        variant: "standard": the mean over tokens of the L2 norm of softmax minus one-hot, at the positions that
            predict the answer tokens. "official": what the authors of STAFF released. It is the root mean square,
            over tokens and vocabulary, of raw logits minus one-hot, at the positions of the tokens themselves.
    """

    name: ClassVar[str] = "el2n"
    version: ClassVar[int] = 1

    variant: str = "standard"

    def __post_init__(self) -> None:
        if self.variant not in VARIANTS:
            raise UserError(f"variant={self.variant!r} of the signal 'el2n': choose {' or '.join(VARIANTS)}.")

    @property
    def reads(self) -> str:
        return "predictions" if self.variant == "standard" else "answers"

    def compute(self, batch: Pass) -> Tensor:
        positions = batch.positions(self.reads)
        return el2n_scores(batch.logits_at(positions), positions, self.variant)


def el2n_scores(logits: Tensor, positions: Positions, variant: str = "standard") -> Tensor:
    """EL2N of every sample, (B,), from logits (L, V) at `positions`; `variant` as in `EL2N`."""
    import torch

    from staff.scoring.positions import widened

    of_token = _error_norms if variant == "standard" else _mean_squared_errors
    chunks = zip(logits.split(CHUNK), positions.targets.split(CHUNK), strict=True)
    mean = positions.mean(torch.cat([of_token(widened(z), y) for z, y in chunks]))
    return mean if variant == "standard" else mean.sqrt()


def _error_norms(logits: Tensor, targets: Tensor) -> Tensor:
    """|| softmax - onehot || of each token, computed from the probabilities of all other tokens.

    Their sum s is 1 - p of the label, so the norm is sqrt(s^2 + sum of their squares). s is taken out of the root,
    so that no square underflows. The textbook form sqrt(sum p^2 - 2 p_label + 1) cancels where p_label is near 1.
    """
    import torch

    wrong = logits.softmax(-1).scatter(-1, targets[:, None], 0.0)
    total = wrong.sum(-1, keepdim=True)
    shares = wrong / total.clamp_min(torch.finfo(wrong.dtype).tiny)
    return total[:, 0] * (1 + shares.square().sum(-1)).sqrt()


def _mean_squared_errors(logits: Tensor, targets: Tensor) -> Tensor:
    label = logits.gather(-1, targets[:, None])[:, 0]
    return (logits.square().sum(-1) - label.square() + (label - 1).square()) / logits.shape[-1]
