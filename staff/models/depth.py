"""Depth pruning: a small model made of some of the target's blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from staff.errors import UserError


@dataclass(frozen=True)
class DepthPruning:
    """Which of the target's blocks make up the small model, for a family without one.

    Attributes:
        keep_layers: indices of the blocks, increasing; or a number of blocks, evenly spaced from the first to the
            last. None: the small model is not made from the target.
    """

    keep_layers: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        given = [self.keep_layers] if isinstance(self.keep_layers, int) else self.keep_layers or []
        if isinstance(given, str) or not all(type(index) is int for index in given):
            raise UserError(f"{self._setting} must be a number of blocks or a list of block indices: 2 or [0,3].")
        if not isinstance(self.keep_layers, int | None):
            object.__setattr__(self, "keep_layers", tuple(self.keep_layers))  # hashable: shapes are cached by it

    @property
    def _setting(self) -> str:
        kept = list(self.keep_layers) if isinstance(self.keep_layers, tuple) else self.keep_layers
        return f"family.small.from_target.keep_layers={kept!r}"

    def indices(self, depth: int) -> list[int]:
        """The indices of the blocks to keep, for a target with `depth` blocks.

        Raises:
            UserError: a number of blocks outside [1, depth], or indices that do not exist or do not increase.
        """
        if isinstance(self.keep_layers, int):
            if not 1 <= self.keep_layers <= depth:
                raise UserError(f"{self._setting} must lie between 1 and {depth}, the blocks of the target.")
            return np.linspace(0, depth - 1, self.keep_layers).round().astype(int).tolist()
        kept = list(self.keep_layers or [])
        if not kept or kept != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < depth:
            raise UserError(
                f"{self._setting} must be increasing indices of blocks: the target has 0 to {depth - 1}."
            )
        return kept


def keep_blocks(model: Any, kept: Sequence[int]) -> None:
    """Remove all blocks of a causal language model except those at the increasing indices `kept`.

    This is depth pruning as in Shortened LLaMA (Kim et al. 2024), without its retraining: the small model is
    fine-tuned anyway.
    """
    from torch.nn import ModuleList

    config, depth = model.config, model.config.num_hidden_layers
    blocks = next(m for m in model.modules() if isinstance(m, ModuleList) and len(m) == depth)
    remaining = [blocks[index] for index in kept]
    del blocks[:]
    blocks.extend(remaining)
    config.num_hidden_layers = len(kept)
    for name, value in config.to_dict().items():
        if "layer" in name and isinstance(value, list) and len(value) == depth:  # such as layer_types
            setattr(config, name, [value[index] for index in kept])
