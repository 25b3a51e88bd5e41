"""Speed of gradient norms over all LoRA parameters, and over all parameters of the linear layers.

    python -m experiments.benchmarks.gradients task=dialogsum task.data_dir=FOLDER -- task=gsm8k ...

takes settings of a run, with `--` between cases. The family's small model and its target score the first --samples
of each pool, in interleaved rounds:

- one at a time: plain autograd on single samples, as `scoring.one_at_a_time=true`;
- ours: one forward and one backward pass per batch, with norms from Gram matrices or from the gradient, whichever
  is cheaper.

"FLOPs bound" is what "ours / one at a time" would be if both ran at the same speed, by torch's own count of FLOPs.
Beyond it, batching saves the time between operations, of which small models have most. "of the floor" is our time
over that of a forward pass with logits at label positions alone.

The second table compares with bergson (github.com/EleutherAI/bergson): the squared norms of the per-sample
gradients that its collector gives, for the same batches and layers, without the head. --bergson names a folder of
site-packages that has it, since its pinned dependencies conflict with ours. "error" is the largest relative
difference. The third compares what LESS asks: those gradients, projected to 1,024 dimensions by random signs, which
each draws for itself; "cosines apart" is the root mean square difference of all cosines between samples, for which
chance alone gives up to 0.044 (the root of 2 / 1,024). Times are processor time.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from experiments.benchmarks.common import alternating, arguments, configured, row, table, write
from experiments.benchmarks.scoring import Batch, batches_of, floor
from experiments.single import Run
from staff.models.adapters import fresh_lora
from staff.scoring.gradients import gradient_layers, layer_gradient_norms
from staff.scoring.passes import default_batch_tokens, score_samples
from staff.scoring.positions import token_losses
from staff.signals.effort import Effort
from staff.signals.projected_gradient import ProjectedGradient

DIM = 1024


class Case:
    """One model, the parameters to differentiate by, and the samples to score."""

    def __init__(self, run: Run, which: str, parameters: str, count: int):
        spec = getattr(run.family, which)
        self.name = f"{run.choices['family']} {which}, {run.choices['task']}"
        self.parameters, self.pad = parameters, spec.tokenizer().pad_token_id
        self.samples = run.tokenized[which].take(np.arange(count))
        self.model: Any = spec.load()
        if parameters == "all_lora":
            self.model = fresh_lora(self.model, run.settings.lora, seed=0)
        self.budget = run.scoring.batch_tokens or default_batch_tokens(self.model)
        self.batches = batches_of(self.samples, self.budget, self.pad, self.model.device)

    def norms(self, one_at_a_time: bool) -> np.ndarray:
        return score_samples(
            self.model,
            self.samples,
            [Effort(self.parameters)],
            batch_tokens=self.budget,
            pad_token_id=self.pad,
            one_at_a_time=one_at_a_time,
        )["effort"]

    def against_autograd(self, rounds: int) -> str:
        ways = {
            "alone": partial(self.norms, True),
            "ours": partial(self.norms, False),
            "floor": partial(floor, self.model, self.batches),
        }
        seconds, values = alternating(ways, rounds)
        return row(
            self.name,
            self.parameters,
            *(len(self.samples) / seconds[name] for name in ("alone", "ours")),
            f"{seconds['alone'] / seconds['ours']:.2f} x",
            f"{flops(ways['alone']) / flops(ways['ours']):.2f} x",
            f"{seconds['ours'] / seconds['floor']:.2f} x",
            f"{np.max(np.abs(values['ours'] / values['alone'] - 1)):.0e}",
        )

    @property
    def layers(self) -> dict[str, nn.Linear]:
        """All layers with these parameters, except the head."""
        head, layers = self.model.get_output_embeddings(), gradient_layers(self.model, self.parameters)
        return {name: layer for name, layer in layers.items() if layer is not head}

    def of_layers(self) -> np.ndarray:
        squares = []
        for batch in self.batches:
            norms = layer_gradient_norms(self.model, self.layers, batch.ids, batch.labels)
            squares.append(torch.stack(list(norms.values())).square().sum(0))
        return torch.cat(squares).sqrt().numpy()

    def by_bergson(self, dim: int | None = None) -> np.ndarray:
        """Norms, or with `dim` the gradients projected to so many dimensions by its Rademacher projection."""
        from bergson import GradientProcessor  # pyright: ignore
        from bergson.collector.gradient_collectors import StreamingGradientCollector  # pyright: ignore

        squares: list[Tensor] = []

        class Collector(StreamingGradientCollector):
            def backward_hook(self, module: Any, g: Tensor) -> None:
                if dim is None:
                    squares.append(self._compute_gradient(module, g).square().sum(1))
                else:
                    self.accumulate_global_projection(module._name, self._module_gradient(module, g))

        # The collector refuses frozen weights, though it does not need their gradients.
        self.model.requires_grad_(True)
        processor = GradientProcessor(projection_dim=dim, projection_target="global", projection_seed=0)
        how = {"target_modules": set(self.layers), "dtype": torch.float32, "processor": processor}
        collector, found = Collector(model=self.model, **how), []
        self.model.requires_grad_(False)
        embedding = self.model.get_input_embeddings()
        wanted = embedding.register_forward_hook(lambda _, args, output: output.requires_grad_())
        for batch in self.batches:
            squares.clear()
            with collector.with_batch(None):
                loss_of(self.model, batch).backward()
            found.append(collector.mod_grads.pop("gradients") if dim else torch.stack(squares).sum(0).sqrt())
        wanted.remove()
        return torch.cat(found).detach().numpy()

    def projected(self) -> np.ndarray:
        how = {"batch_tokens": self.budget, "pad_token_id": self.pad}
        return score_samples(self.model, self.samples, [ProjectedGradient(DIM)], **how)["projected_gradient"]

    def projected_against_bergson(self, rounds: int) -> str:
        seconds, values = alternating({"bergson": lambda: self.by_bergson(DIM), "ours": self.projected}, rounds)
        order = np.argsort(-self.samples.lengths, kind="stable")  # of the batches
        return row(
            self.name,
            DIM,
            *(len(self.samples) / seconds[name] for name in ("bergson", "ours")),
            f"{seconds['bergson'] / seconds['ours']:.2f} x",
            np.sqrt(np.mean((cosines(values["ours"][order]) - cosines(values["bergson"])) ** 2)),
        )

    def against_bergson(self, rounds: int) -> str:
        seconds, values = alternating({"bergson": self.by_bergson, "ours": self.of_layers}, rounds)
        return row(
            self.name,
            self.parameters,
            *(len(self.samples) / seconds[name] for name in ("bergson", "ours")),
            f"{seconds['bergson'] / seconds['ours']:.2f} x",
            f"{np.max(np.abs(values['ours'] / values['bergson'] - 1)):.0e}",
        )


def cosines(gradients: np.ndarray) -> np.ndarray:
    unit = gradients / np.linalg.norm(gradients, axis=1, keepdims=True)
    return unit @ unit.T


def flops(way: Callable[[], Any]) -> int:
    """FLOPs of the matrix products; attention is written out, so that its products are counted too."""
    with sdpa_kernel(SDPBackend.MATH), torch.profiler.profile(with_flops=True) as profile:
        way()
    return sum(event.flops for event in profile.key_averages())


def loss_of(model: Any, batch: Batch) -> Tensor:
    """The sum of the samples' own mean losses, with logits at all positions."""
    logits = batch.at.gather(model(input_ids=batch.ids, use_cache=False).logits)[0]
    return batch.at.mean(token_losses(logits, batch.at.targets)).sum()


def main() -> None:
    options, cases = arguments(__doc__, samples=64, rounds=3, bergson="")
    sys.path.append(options.bergson)
    header = "model, data", "parameters", "one at a time", "ours", "ours / one at a time"
    lines = table(*header, "FLOPs bound", "of the floor", "error")
    others = table("model, data", "parameters", "bergson", "ours", "ours / bergson", "error")
    projected = table("model, data", "dimensions", "bergson", "ours", "ours / bergson", "cosines apart")
    for settings in cases:
        run = configured(*settings, f"task.train_limit={options.samples}")
        for which in ("small", "target"):
            for parameters in ("all_lora", "all_linear"):
                case = Case(run, which, parameters, options.samples)
                lines.append(case.against_autograd(options.rounds))
                print(lines[-1], flush=True)
                if options.bergson:
                    others.append(case.against_bergson(options.rounds))
                    print(others[-1], flush=True)
                if options.bergson and parameters == "all_lora":
                    projected.append(case.projected_against_bergson(options.rounds))
                    print(projected[-1], flush=True)
    write(options.name, __doc__, lines, *([others, projected] if options.bergson else []))


if __name__ == "__main__":
    main()
