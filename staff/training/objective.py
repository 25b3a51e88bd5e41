"""Objectives that fine-tuning minimises. Another objective is a class in a file of your own."""

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
        """The loss of each token, (L,), in float32 or wider.

        Args:
            logits: logits at the positions that predict the tokens, (L, V).
            targets: the tokens, (L,).
        """
        ...


@dataclass(frozen=True)
class Supervised:
    """Cross-entropy of the answer tokens (supervised fine-tuning)."""

    version: ClassVar[int] = 1

    def compute(self, logits: Tensor, targets: Tensor) -> Tensor:
        from staff.scoring.positions import token_losses

        return token_losses(logits, targets)
