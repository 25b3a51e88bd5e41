"""Warnings about a fine-tuning that changed its model little or not at all."""

from __future__ import annotations

from typing import Any

MIN_STEPS = 10
"""Fine-tunings with fewer optimiser steps are reported. Adam moves a weight by about one learning rate per step. So
at 1e-4 no entry of an adapter's B, which starts at zero, exceeds 1e-3 after fewer steps than these."""


def checksums(model: Any) -> list[int]:
    """A checksum of each trainable tensor's bytes in this process.

    Equal lists before and after training mean that no weight changed. A copy of the weights would take more memory.
    """
    import torch

    local = (getattr(p, "to_local", lambda p=p: p)() for p in model.parameters() if p.requires_grad)
    return [int(p.detach().contiguous().view(torch.uint8).sum(dtype=torch.int64)) for p in local]


def training_warnings(steps: int, moved: bool) -> list[str]:
    """Warnings for readers of the results, in sentences.

    Args:
        steps: optimiser steps of the fine-tuning.
        moved: whether any trainable weight changed.
    """
    found = []
    if steps < MIN_STEPS:
        found.append(f"only {steps} optimiser step{'s' * (steps != 1)}, fewer than {MIN_STEPS}.")
    if not moved:
        found.append("no trainable weight moved: the model answers as it did before.")
    return found
