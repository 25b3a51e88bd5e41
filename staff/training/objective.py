"""Objectives: what fine-tuning minimises. One implementation; another loss is a new file."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Objective(Protocol):
    """The loss of each answer token. A step minimises its mean over the step's answer tokens.

    Implementations are frozen dataclasses.
    """

    def compute(self, logits: Tensor, targets: Tensor) -> Tensor:
        """(L,), float32 or wider, from logits (L, V) and the token ids (L,) that follow."""
        ...


@dataclass(frozen=True)
class Supervised:
    """Cross-entropy of the answer tokens (supervised fine-tuning)."""

    version: ClassVar[int] = 1

    def compute(self, logits: Tensor, targets: Tensor) -> Tensor:
        from staff.scoring.positions import token_losses

        return token_losses(logits, targets)
