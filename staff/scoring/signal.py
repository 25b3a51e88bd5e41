"""What a signal is: a value per sample that a pass over a model gives. Each signal is a file of `staff/signals`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from staff.errors import UserError
from staff.models.adapters import LoraSpec

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from staff.scoring.passes import Pass

PARAMETERS = ("last_v_b", "all_lora", "all_linear")
"""What can be differentiated by: the last block's v_proj lora_B; all LoRA parameters; all weights and biases of the
linear layers of a model without adapters."""


@dataclass(frozen=True)
class GradientOf:
    """By what the sample's mean answer cross-entropy is differentiated.

    Attributes:
        parameters: one of `PARAMETERS`.
        fresh_adapter: a new LoRA adapter in place of fine-tuning's; None: fine-tuning's own (a fresh one of its
            shape on the raw model).
    """

    parameters: str
    fresh_adapter: LoraSpec | None = None

    def __post_init__(self) -> None:
        check_parameters(self.parameters)
        if self.fresh_adapter and self.parameters == "all_linear":
            raise UserError(
                "gradient=all_linear differentiates by the model's own weights: leave out fresh_adapter."
            )


def check_parameters(parameters: str) -> None:
    """Refuse what is none of `PARAMETERS`."""
    if parameters not in PARAMETERS:
        raise UserError(f"gradient={parameters!r} is unknown: choose {', '.join(PARAMETERS)}.")


class Signal:
    """A value per sample. Implementations are frozen dataclasses that say what they need of a pass.

    Attributes:
        name: as in `pool.ask(name, of=...)`, and of the column in results.
        version: raised when the numbers change. A signal without one is known by the text of its file.
        reads: where it reads logits or hidden states: "predictions" of the answer tokens, at the "answers"
            themselves, or at all "tokens".
        logits: whether it reads logits.
        layer: whose hidden states it reads: -1 the last, after the final norm, otherwise a block's output by its
            index; None: no hidden states.
        gradient: what it differentiates by; None: no gradients.
        moments: whether it reads the optimiser's moments, which a fine-tuning keeps where it is asked to.
        prompt: False: the answers are read without their prompts.
        text: "answer", or "all": prompt tokens count as answer tokens too.
        dtype: of the stored values.
    """

    name: ClassVar[str]
    reads: str = "predictions"
    logits: bool = True
    layer: int | None = None
    gradient: GradientOf | None = None
    moments: bool = False
    prompt: bool = True
    text: str = "answer"
    dtype: ClassVar[str] = "float64"

    def shape(self, config: Any) -> tuple[int, ...]:
        """Shape of a sample's value: () for a number, (d,) for a vector. `config` is the model's."""
        return ()

    def compute(self, batch: Pass) -> Tensor:
        """The values of a batch: (B, *shape)."""
        raise NotImplementedError

    def flops(self, model: Any, lengths: np.ndarray, answer_lengths: np.ndarray) -> float:
        """FLOPs besides those of the forward and backward pass, of samples with these lengths (N,)."""
        return 0.0


def gradient_of(signals: Sequence[Signal]) -> GradientOf | None:
    """The gradient that the signals of one pass share; None if none needs one.

    Raises:
        UserError: they differentiate by different parameters.
    """
    wanted = {signal.gradient for signal in signals if signal.gradient is not None}
    if len(wanted) > 1:
        raise UserError(
            f"the signals {', '.join(signal.name for signal in signals)} differentiate by different parameters: "
            "ask for them one after the other."
        )
    return next(iter(wanted), None)
