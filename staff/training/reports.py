"""What a fine-tuning reports: speed, progress, and warnings that it changed its model little or not at all."""

from __future__ import annotations

import logging
import time
from typing import Any

import numpy as np
from torch import Tensor
from transformers import TrainerCallback

from staff.runtime import processes
from staff.runtime.progress import progress

log = logging.getLogger(__name__)

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


class Speed:
    """Tokens per second, without padding, over all processes. It does not wait for the device before it is read."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._tokens: Any = 0

    def count(self, attention_mask: Tensor) -> None:
        """Count the tokens of a batch that is about to be processed."""
        if self._since is None:
            self._since = time.perf_counter()
        self._tokens = self._tokens + attention_mask.sum()

    def read(self) -> float:
        """The speed since the last time, or since the first batch; to be called by all processes."""
        now, since = time.perf_counter(), self._since
        tokens = processes.all_reduce_sum(np.array([int(self._tokens)]))[0]
        self._since, self._tokens = now, 0
        return 0.0 if since is None else float(tokens) / (now - since)


class Progress(TrainerCallback):
    """Shows how many steps are done, the remaining time and the loss. `close` it after the training."""

    def __init__(self, name: str, samples: int) -> None:
        self._name, self._samples = name, samples
        self._bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        steps = f"{state.max_steps} step{'s'[: state.max_steps != 1]}"
        log.info("fine-tuning %s on %d samples: %s", self._name, self._samples, steps)
        self._bar = progress(state.max_steps, f"fine-tuning {self._name}", "step", done=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._bar.update(1)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if logs and "loss" in logs:
            self._bar.set_postfix_str(f"loss {logs['loss']:.3f}", refresh=False)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
