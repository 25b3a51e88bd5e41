"""The interface of signals: values per sample that a model computes. The signals are in `staff/signals`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from staff.errors import UserError
from staff.models.adapters import LoraSpec

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from staff.scoring.positions import Positions

PARAMETERS = ("last_v_b", "all_lora", "all_linear")
"""Parameters to differentiate by: the last block's v_proj lora_B; all LoRA parameters; all weights and biases of
the linear layers, for a model without adapters."""


@dataclass(frozen=True)
class GradientOf:
    """The parameters by which a sample's mean answer cross-entropy is differentiated.

    Attributes:
        parameters: one of `PARAMETERS`.
        fresh_adapter: a new LoRA adapter that replaces that of fine-tuning. None: the adapter of fine-tuning; on
            the raw model a new one with the same settings.
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
    """Refuse what is not one of `PARAMETERS`.

    Raises:
        UserError: naming the choices.
    """
    if parameters not in PARAMETERS:
        raise UserError(f"gradient={parameters!r} is unknown: choose {', '.join(PARAMETERS)}.")


class Pass(Protocol):
    """What a signal is computed from: the outputs of a model for one batch (`staff.scoring.passes`)."""

    @property
    def gradients(self) -> Any:
        """`staff.scoring.gradients.Gradients` of the batch; None where no signal needs them."""

    @property
    def moments(self) -> Any:
        """The optimiser's moments, by parameter; None where no signal reads them."""

    def positions(self, reads: str) -> Positions:
        """The positions that a signal reads; `reads` as in `Signal`."""
        ...

    def logits_at(self, positions: Positions) -> Tensor:
        """Logits at these positions: (L, V)."""
        ...

    def states_at(self, layer: int, positions: Positions) -> Tensor:
        """Hidden states of a layer at these positions: (L, D)."""
        ...


class Signal:
    """A value per sample. Implementations are frozen dataclasses that state what they need from a pass.

    Attributes:
        name: the name in `pool.ask(name, of=...)` and in results.
        version: to be raised when the numbers change. A signal without one is identified by the source of its file.
        reads: where it reads logits or hidden states: at the positions that predict answer tokens ("predictions"),
            at the answer tokens ("answers"), or at all tokens ("tokens").
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
        """Shape of a sample's value, () for a number, (d,) for a vector; `config` is the model's configuration."""
        return ()

    def check(self, parameters: int) -> None:
        """Raise UserError for what cannot be computed where the gradient is by so many parameters."""

    def compute(self, batch: Pass) -> Tensor:
        """The values of a batch: (B, *shape)."""
        raise NotImplementedError

    def flops(self, model: Any, lengths: np.ndarray, answer_lengths: np.ndarray) -> float:
        """FLOPs in addition to the forward and backward pass, for samples with these lengths (N,)."""
        return 0.0


def gradient_of(signals: Sequence[Signal]) -> GradientOf | None:
    """The gradient that the signals of a pass share; None if no signal needs one.

    Raises:
        UserError: the signals differentiate by different parameters.
    """
    wanted = {signal.gradient for signal in signals if signal.gradient is not None}
    if len(wanted) > 1:
        raise UserError(
            f"the signals {', '.join(signal.name for signal in signals)} differentiate by different parameters: "
            "ask for them one after the other."
        )
    return next(iter(wanted), None)
