"""Loss: the cross-entropy of a sample's answer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from staff.errors import UserError
from staff.scoring.signal import Pass, Signal

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Loss(Signal):
    """Mean cross-entropy of the answer tokens, with the end token, in nats: (B,).

    Attributes:
        prompt: whether the answer is read after its prompt, or only after the begin token. If the tokenizer has no
            begin token, the first token of an answer without prompt is not predicted, and not in the mean.
        text: "answer"; or "all", the mean over the tokens of prompt and answer.
    """

    name: ClassVar[str] = "loss"
    version: ClassVar[int] = 1

    prompt: bool = True
    text: str = "answer"

    def __post_init__(self) -> None:
        if self.text not in ("answer", "all"):
            raise UserError(f"text={self.text!r} of the signal {self.name!r} is unknown: choose answer or all.")

    def compute(self, batch: Pass) -> Tensor:
        from staff.scoring.positions import token_losses

        predictions = batch.positions("predictions")
        return predictions.mean(token_losses(batch.logits_at(predictions), predictions.targets))


@dataclass(frozen=True)
class Perplexity(Loss):
    """The exponential of the mean cross-entropy, with the fields of `Loss`: (B,). Both rank samples alike."""

    name: ClassVar[str] = "perplexity"
    version: ClassVar[int] = 1

    def compute(self, batch: Pass) -> Tensor:
        return super().compute(batch).exp()
