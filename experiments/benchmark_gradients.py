"""Norms over all LoRA parameters and over all parameters of the linear layers, against the ways there are today.

    python -m experiments.benchmark_gradients task=dialogsum task.data_dir=FOLDER -- task=gsm8k ...

takes settings of a run, `--` between cases, and the first --samples of each pool, with the family's small model and
its target, in interleaved rounds:

- one at a time: plain autograd on single samples, as `scoring.one_at_a_time=true`;
- ours: one forward and one backward pass a batch, norms by Gram matrices or by the gradient, whichever is cheaper.

"FLOPs bound" is what "ours / one at a time" would be if both ran at the same speed, by torch's count of floating
point operations: what batching adds is the time between operations, of which small models have most. "of the
floor" is our time over that of a forward pass with logits at label positions alone. The second table is against
bergson (github.com/EleutherAI/bergson), where --bergson names a folder of site-packages that has it (its pins clash
with ours): the squared norms of its collector's per-sample gradients, on the same batches and the same layers, the
head left out. Error: the largest relative difference. Times are the processor's.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from staff.adapters import fresh_lora
from staff.gradients import Positions, gradient_layers, layer_gradient_norms, token_losses
from staff.tokens import TokenizedSamples
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from experiments.benchmark_scoring import batches_of, floor
from experiments.benchmarking import alternating, arguments, configured, row, table, write
from experiments.single import Run
from staff.scoring import Asked, score_samples, suited_batch_tokens


class Case:
    """One model with one kind of parameters, and the samples that it is asked about."""

    def __init__(self, run: Run, role: str, gradient: str, count: int):
        spec = run.family.small if role == "small" else run.family.target
        self.name = f"{run.choices['family']} {role}, {run.choices['task']}"
        self.gradient, self.pad = gradient, spec.tokenizer().pad_token_id
        self.samples: TokenizedSamples = run.tokenized[role].take(np.arange(count))
        self.model: Any = spec.load()
        if gradient == "all_lora":
            self.model = fresh_lora(self.model, run.settings.lora, seed=0)
        self.budget = run.scoring.batch_tokens or suited_batch_tokens(self.model)
        self.batches = batches_of(self.samples, self.budget, self.pad, self.model.device)

    def norms(self, one_at_a_time: bool) -> np.ndarray:
        how = {"batch_tokens": self.budget, "pad_token_id": self.pad, "one_at_a_time": one_at_a_time}
        return score_samples(self.model, self.samples, Asked(("effort",), self.gradient), **how)["effort"]

    def against_autograd(self, rounds: int) -> str:
        ways = {
            "alone": partial(self.norms, True),
            "ours": partial(self.norms, False),
            "floor": partial(floor, self.model, self.batches),
        }
        seconds, values = alternating(ways, rounds)
        return row(
            self.name,
            self.gradient,
            *(f"{len(self.samples) / seconds[name]:.3g}" for name in ("alone", "ours")),
            f"{seconds['alone'] / seconds['ours']:.2f} x",
            f"{flops(ways['alone']) / flops(ways['ours']):.2f} x",
            f"{seconds['ours'] / seconds['floor']:.2f} x",
            f"{np.max(np.abs(values['ours'] / values['alone'] - 1)):.0e}",
        )

    @property
    def layers(self) -> dict[str, nn.Linear]:
        head = self.model.get_output_embeddings()
        return {
            name: layer for name, layer in gradient_layers(self.model, self.gradient).items() if layer is not head
        }

    def of_layers(self) -> np.ndarray:
        squares = []
        for ids, at in self.batches:
            labels = torch.full_like(ids, -100).flatten()
            labels[at.index + 1] = at.targets
            norms = layer_gradient_norms(self.model, self.layers, ids, None, labels.view_as(ids))
            squares.append(torch.stack(list(norms.values())).square().sum(0))
        return torch.cat(squares).sqrt().numpy()

    def by_bergson(self) -> np.ndarray:
        from bergson.collector.gradient_collectors import StreamingGradientCollector  # pyright: ignore

        squares: list[Tensor] = []

        class Norms(StreamingGradientCollector):
            def backward_hook(self, module: Any, g: Tensor) -> None:
                squares.append(self._compute_gradient(module, g).square().sum(1))

        self.model.requires_grad_(True)  # or it refuses; the weights' own gradients are not what is measured
        collector, totals = Norms(model=self.model, target_modules=set(self.layers), dtype=torch.float32), []
        self.model.requires_grad_(False)
        embedding = self.model.get_input_embeddings()
        wanted = embedding.register_forward_hook(lambda _, args, output: output.requires_grad_())
        for ids, at in self.batches:
            squares.clear()
            with collector.with_batch(None):
                loss_of(self.model, ids, at).backward()
            totals.append(torch.stack(squares).sum(0))
        wanted.remove()
        return torch.cat(totals).sqrt().numpy()

    def against_bergson(self, rounds: int) -> str:
        seconds, values = alternating({"bergson": self.by_bergson, "ours": self.of_layers}, rounds)
        return row(
            self.name,
            self.gradient,
            *(f"{len(self.samples) / seconds[name]:.3g}" for name in ("bergson", "ours")),
            f"{seconds['bergson'] / seconds['ours']:.2f} x",
            f"{np.max(np.abs(values['ours'] / values['bergson'] - 1)):.0e}",
        )


def flops(way: Callable[[], Any]) -> int:
    """Of matrix products, which is where attention's count as well when it is written out."""
    with sdpa_kernel(SDPBackend.MATH), torch.profiler.profile(with_flops=True) as profile:
        way()
    return sum(event.flops for event in profile.key_averages())


def loss_of(model: Any, ids: Tensor, at: Positions) -> Tensor:
    """The sum of the samples' own mean losses, with logits everywhere."""
    logits = at.gather(model(input_ids=ids, use_cache=False).logits)[0]
    return at.mean(token_losses(logits, at.targets)).sum()


def main() -> None:
    asked, cases = arguments(__doc__, samples=64, rounds=3, bergson="")
    sys.path.append(asked.bergson)
    header = "model, data", "parameters", "one at a time", "ours", "ours / one at a time"
    lines = table(*header, "FLOPs bound", "of the floor", "error")
    others = table("model, data", "parameters", "bergson", "ours", "ours / bergson", "error")
    for settings in cases:
        run = configured(*settings, f"task.train_limit={asked.samples}")
        for role in ("small", "target"):
            for gradient in ("all_lora", "all_linear"):
                case = Case(run, role, gradient, asked.samples)
                lines.append(case.against_autograd(asked.rounds))
                print(lines[-1], flush=True)
                if asked.bergson:
                    others.append(case.against_bergson(asked.rounds))
                    print(others[-1], flush=True)
    write(asked.name or "gradients", __doc__, lines, *([others] if asked.bergson else []))


if __name__ == "__main__":
    main()
