"""Projected gradient: in which direction a sample moves the model's adapter (LESS, Xia et al., ICML 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from staff.errors import UserError
from staff.scoring.signal import GradientOf, Pass, Signal

if TYPE_CHECKING:
    from torch import Tensor

PUBLISHED = 8192
"""Dimensions of LESS."""


@dataclass(frozen=True)
class ProjectedGradient(Signal):
    """Gradient of the sample's mean answer cross-entropy by all LoRA parameters, projected: (B, dim), float32.

    Attributes:
        dim: dimensions of the projection (`staff.scoring.projection`); LESS has 8,192.
        adam: the step that Adam would take for the gradient, by its moments at the model's checkpoint, in place of
            the gradient itself.
    """

    name: ClassVar[str] = "projected_gradient"
    version: ClassVar[int] = 1
    logits: ClassVar[bool] = False  # type: ignore[misc]
    gradient: ClassVar[GradientOf] = GradientOf("all_lora")  # type: ignore[misc]
    dtype: ClassVar[str] = "float32"

    dim: int = PUBLISHED
    adam: bool = False

    def __post_init__(self) -> None:
        if type(self.dim) is not int or self.dim < 1:
            raise UserError(f"dim={self.dim!r} of the signal 'projected_gradient' must be a whole number above 0.")

    def check(self, parameters: int) -> None:
        if self.dim > max(parameters, PUBLISHED):  # which keeps no less, and takes longer than the gradient itself
            raise UserError(
                f"method.dim={self.dim} is more than the {parameters} parameters that are projected: lower it "
                f"(LESS has {PUBLISHED})."
            )

    @property
    def moments(self) -> bool:  # type: ignore[override]
        return self.adam

    def shape(self, config: Any) -> tuple[int, ...]:
        return (self.dim,)

    def compute(self, batch: Pass) -> Tensor:
        from staff.scoring.projection import Projection

        assert batch.gradients is not None
        return batch.gradients.reduce(Projection(self.dim, batch.moments if self.adam else None))

    def flops(self, model: Any, lengths: np.ndarray, answer_lengths: np.ndarray) -> float:
        from staff.scoring.gradients import gradient_parameters

        parameters = sum(p.numel() for p in gradient_parameters(model, "all_lora").values())
        return 2.0 * parameters * (int(lengths.sum()) + self.dim * len(lengths))
