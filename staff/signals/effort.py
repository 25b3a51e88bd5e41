"""Effort: the norm of a sample's own gradient (STAFF, section 3.1; GraNd, Paul et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from staff.errors import UserError
from staff.models.adapters import LoraSpec
from staff.scoring.signal import GradientOf, Pass, Signal

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Effort(Signal):
    """L2 norm of the gradient of the sample's own mean answer cross-entropy, (B,).

    Attributes:
        parameters: by which the loss is differentiated: "last_v_b", the last block's v_proj lora_B (the authors'
            code); "all_lora", all LoRA parameters (the paper); "all_linear", all weights of linear layers, with
            adapters merged into them.
        fresh_adapter: {rank, alpha, targets} of a new LoRA adapter that replaces that of fine-tuning; None: the
            adapter of fine-tuning.
    """

    name: ClassVar[str] = "effort"
    version: ClassVar[int] = 1
    logits: ClassVar[bool] = False  # type: ignore[misc]

    parameters: str = "last_v_b"
    fresh_adapter: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        _ = self.gradient  # refuses what cannot be differentiated by
        if self.fresh_adapter and not isinstance(self.fresh_adapter["targets"], str):
            listed = {**self.fresh_adapter, "targets": list(self.fresh_adapter["targets"])}
            object.__setattr__(self, "fresh_adapter", listed)

    def __hash__(self) -> int:
        return hash(self.gradient)

    @property
    def gradient(self) -> GradientOf:
        if self.fresh_adapter is None:
            return GradientOf(self.parameters)
        if set(self.fresh_adapter) != {"rank", "alpha", "targets"}:
            raise UserError(f"fresh_adapter={dict(self.fresh_adapter)} must have rank, alpha and targets.")
        targets = self.fresh_adapter["targets"]
        targets = targets if isinstance(targets, str) else tuple(targets)
        return GradientOf(self.parameters, LoraSpec(**{**self.fresh_adapter, "targets": targets}))

    def compute(self, batch: Pass) -> Tensor:
        from staff.scoring.gradients import SquaredNorm

        assert batch.gradients is not None
        return batch.gradients.reduce(SquaredNorm()).sqrt()

    def flops(self, model: Any, lengths: np.ndarray, answer_lengths: np.ndarray) -> float:
        from staff.scoring.exact import batches
        from staff.scoring.flops import contraction_flops

        if self.parameters != "all_linear" and batches(model.config) is None:
            return 0.0  # by plain autograd, which has the gradients themselves
        return contraction_flops(model, lengths, answer_lengths, self.parameters)
