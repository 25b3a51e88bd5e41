"""Warnings about a fine-tuning that can have taught its model little or nothing."""

from __future__ import annotations

from typing import Any

MIN_STEPS = 10
"""Optimiser steps below which a fine-tuning is reported. Adam moves a weight by about one learning rate per step:
in fewer steps than these, at the usual 1e-4, no entry of an adapter's B, which starts at zero, gets beyond 1e-3."""


def checksums(model: Any) -> list[int]:
    """One integer per trainable tensor, over the bytes of what this process holds of it: equal lists before and
    after training mean that no weight moved. A copy of all weights would take their memory once more."""
    import torch

    local = (getattr(p, "to_local", lambda p=p: p)() for p in model.parameters() if p.requires_grad)
    return [int(p.detach().contiguous().view(torch.uint8).sum(dtype=torch.int64)) for p in local]


def training_warnings(steps: int, moved: bool) -> list[str]:
    """What a reader of a fine-tuning's results should be warned of, in sentences; empty for an ordinary one."""
    found = []
    if steps < MIN_STEPS:
        found.append(f"only {steps} optimiser step{'s' * (steps != 1)}, fewer than {MIN_STEPS}.")
    if not moved:
        found.append("no trainable weight moved: the model answers as it did before.")
    return found
