"""Effort scores from the backward passes of fine-tuning, so that the small model needs no scoring pass.

The trainer's loss is the mean over all n answer tokens of a step. So what it backpropagates into a layer's output
is n_i / n of the gradient of sample i's own mean loss, n_i being the answer tokens of the sample. Scaled back, the
norm of the sample's gradient follows as in `staff.scoring.gradients`. Unlike in a pass with the final weights, the
weights change between samples, and dropout is active where there is any.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from staff.runtime import processes
from staff.scoring.gradients import gradient_layers, squared_weight_gradient_norms
from staff.scoring.positions import Positions


class OnlineEfforts:
    """Collects the efforts of the samples in training steps.

    Args:
        model: a model with LoRA adapters, exact in batches (`staff.scoring.exact`).
        gradient: the parameters, "last_v_b" or "all_lora".
        samples: the number of samples N.
    """

    def __init__(self, model: Any, gradient: str, samples: int) -> None:
        self._layers = gradient_layers(model, gradient)
        self.squared = torch.full((samples,), torch.nan, dtype=torch.float64)

    def save(self, file: Path) -> None:
        """Write each sample's latest effort to a safetensors file: "effort", (N,) float64, NaN if it has none."""
        save_file({"effort": self.squared.sqrt()}, file)

    def all_gather(self) -> None:
        """Add the efforts from the other processes of this run. Each sample is in the steps of one process."""
        for of_one in processes.all_gather(self.squared):
            self.squared = torch.where(self.squared.isnan(), of_one, self.squared)

    @contextmanager
    def watching(self, rows: Tensor, positions: Positions, tokens: Tensor | float) -> Iterator[None]:
        """Score the samples of the forward pass inside, when its loss is backpropagated.

        Args:
            rows: positions of the batch's samples in the data set, (B,).
            positions: the positions at which the last block runs.
            tokens: n, the number of answer tokens that the loss is averaged over, divided by the number of
                processes.
        """
        rows = rows.cpu()
        scale = tokens / positions.counts
        self.squared[rows] = 0.0

        def watch(layer: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            x = args[0].detach()

            def add(g: Tensor) -> None:
                with torch.no_grad():
                    g, wide = positions.by_sample(g), positions.by_sample(x)
                    norms = squared_weight_gradient_norms(wide, g, bias=layer.bias is not None).sqrt()
                    self.squared[rows] += (norms * scale).double().square().cpu()

            output.register_hook(add)

        with ExitStack() as stack:
            for layer in self._layers.values():
                stack.enter_context(layer.register_forward_hook(watch))
            yield
