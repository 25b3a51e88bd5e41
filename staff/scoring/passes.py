"""A pass over samples, which computes signals in batches of similar length under a token budget."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from staff.data.tokens import TokenizedSamples
from staff.errors import UserError
from staff.models.spec import is_sharded
from staff.runtime import processes
from staff.runtime.machine import without_cudnn_attention
from staff.runtime.progress import progress
from staff.scoring.gradients import (
    Gradients,
    SampleGradients,
    batch_gradients,
    gradient_layers,
    gradient_parameters,
)
from staff.scoring.positions import (
    Positions,
    hidden_states,
    last_block_at,
    model_name,
    padded,
    scoring_mode,
    token_losses,
)
from staff.scoring.projection import Moments
from staff.scoring.signal import Signal, gradient_of

log = logging.getLogger(__name__)


@dataclass
class Pass:
    """The outputs of a model for one batch, from which signals are computed.

    Attributes:
        labels: (B, T), -100 where there is none, unshifted.
        lengths: (B,) tokens of each sample.
        at: the positions that any of the signals reads.
        logits: (S, V) at `at`; None where no signal reads them.
        states: by layer, hidden states (S, D) at `at`.
        gradients: None where no signal needs them.
        moments: the optimiser's, by parameter; None where no signal reads them.
    """

    labels: Tensor
    lengths: Tensor
    at: Positions
    logits: Tensor | None = None
    states: dict[int, Tensor] = field(default_factory=dict)
    gradients: Gradients | None = None
    moments: Moments | None = None

    def positions(self, reads: str) -> Positions:
        """The positions that a signal reads; `reads` as in `Signal`."""
        return Positions.of((reads,), self.labels, self.lengths)

    def logits_at(self, positions: Positions) -> Tensor:
        """Logits at these positions: (L, V)."""
        assert self.logits is not None
        return positions.out_of(self.at, self.logits)

    def states_at(self, layer: int, positions: Positions) -> Tensor:
        """Hidden states of a layer at these positions: (L, D)."""
        return positions.out_of(self.at, self.states[layer])


def score_samples(
    model: Any,
    samples: TokenizedSamples,
    signals: Sequence[Signal],
    *,
    batch_tokens: int | None,
    pad_token_id: int,
    one_at_a_time: bool = False,
    moments: Moments | None = None,
) -> dict[str, np.ndarray]:
    """Signals of every sample, in the samples' order, computed in one pass. The model is not changed.

    In a run of several processes each scores a shard of the samples, and all return all values.

    Args:
        signals: with distinct names, computed in one pass.
        batch_tokens: padded tokens of a batch, None for `default_batch_tokens`; a longer sample goes alone. Halved
            when memory runs out.
        one_at_a_time: plain autograd on single samples: slow, and exact for every architecture.
        moments: the optimiser's, for signals that read them.

    Returns:
        Values by the signal's name, each (N, *shape) in the signal's dtype.

    Raises:
        UserError: a model that cannot be scored exactly; or, by its id, a sample that alone does not fit in memory,
            or whose value is not finite.
    """
    config, count = model.config.get_text_config(), len(samples)
    values = {signal.name: np.zeros((count, *signal.shape(config)), signal.dtype) for signal in signals}
    # Longest first, so that memory runs out in the first batch, if at all.
    order = processes.shard(np.argsort(-samples.lengths, kind="stable"))
    budget = 1 if one_at_a_time else batch_tokens or default_batch_tokens(model)
    run = runner(model, signals, pad_token_id, moments, one_at_a_time)
    batches = (_in_step if is_sharded(model) else _independently)(samples, order, budget, run)
    with (
        processes.raise_on_all_ranks(apart=not is_sharded(model)),
        scoring_mode(model),
        without_cudnn_attention(),
        progress(len(order), ", ".join(values)) as bar,
    ):
        for rows, batch, of_batch in batches:
            for name, value in of_batch.items():
                _check_finite(value, batch, name)
                values[name][rows] = value
            bar.update(len(rows))
    return {name: processes.all_reduce_sum(value) for name, value in values.items()}


def default_batch_tokens(model: Any) -> int:
    """The default token budget: enough to keep a GPU busy, and on a processor few enough for its caches.

    With four times as many on a processor, norms over all LoRA parameters of the tiny target took 1.4 times as
    long.
    """
    return 2048 if model.device.type == "cpu" else 8192


Batches = Iterator[tuple[np.ndarray, TokenizedSamples, dict[str, np.ndarray]]]
Run = Callable[[TokenizedSamples], dict[str, Tensor]]


def _independently(samples: TokenizedSamples, order: np.ndarray, budget: int, run: Run) -> Batches:
    """Positions, samples and values of each batch. The budget is halved when memory runs out."""
    start = 0
    while start < len(order):
        longest = int(samples.lengths[order[start]])
        rows = order[start : start + max(1, budget // longest)]
        batch = samples.take(rows)
        values = _unless_out_of_memory(run, batch)
        if values is None:
            budget = _halved_budget(batch, longest)
            continue
        yield rows, batch, values
        start += len(rows)


def _in_step(samples: TokenizedSamples, order: np.ndarray, budget: int, run: Run) -> Batches:
    """The same for a model whose weights are sharded over the processes.

    All processes must run it equally often; one without samples left runs the shortest sample again.
    """
    batches, start = [], 0
    while start < len(order):
        batches.append(order[start : start + max(1, budget // int(samples.lengths[order[start]]))])
        start += len(batches[-1])
    for turn in range(max(processes.all_gather(len(batches)))):
        rows = batches[turn] if turn < len(batches) else np.argsort(samples.lengths)[:1]
        batch = samples.take(rows)
        values = _unless_out_of_memory(run, batch)
        if values is None:
            raise UserError(f"out of memory with {budget} tokens per batch: lower scoring.batch_tokens.")
        if turn < len(batches):
            yield rows, batch, values


def _unless_out_of_memory(run: Run, batch: TokenizedSamples) -> dict[str, np.ndarray] | None:
    try:
        return {signal: value.cpu().numpy() for signal, value in run(batch).items()}
    except (RuntimeError, MemoryError) as error:
        # torch raises OutOfMemoryError on a GPU, and a plain RuntimeError of its allocator on a CPU.
        exhausted = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)
        if not exhausted and "out of memory" not in str(error):
            raise
    # Outside the handler the exception is gone, and with it the frames that held the batch's tensors.
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def _halved_budget(batch: TokenizedSamples, longest: int) -> int:
    if len(batch) == 1:
        raise UserError(
            f"sample {batch.ids[0]!r} ({longest} tokens) does not fit in memory by itself: remove it, or use a "
            f"smaller model or precision."
        )
    budget = len(batch) * longest // 2
    said = "out of memory with %d samples of up to %d tokens: continuing with %d tokens per batch"
    log.warning(said, len(batch), longest, budget)
    return budget


def _check_finite(values: np.ndarray, batch: TokenizedSamples, signal: str) -> None:
    finite = np.isfinite(values.reshape(len(batch), -1)).all(1)
    if not finite.all():
        raise UserError(
            f"sample {batch.ids[int(finite.argmin())]!r}: its {signal} is not finite; remove it, or score in "
            "float32 if the model has a lower precision."
        )


def runner(
    model: Any,
    signals: Sequence[Signal],
    pad_token_id: int,
    moments: Moments | None = None,
    one_at_a_time: bool = False,
) -> Run:
    """What computes the signals of a batch, or of a single sample, with gradients by the weights that they name."""
    outputs, find = (_run_alone, gradient_parameters) if one_at_a_time else (_run_batch, gradient_layers)
    gradient, layers = gradient_of(signals), {signal.layer for signal in signals}
    weights: Any = find(model, gradient.parameters) if gradient else {}

    def run(batch: TokenizedSamples) -> dict[str, Tensor]:
        input_ids, labels, lengths = padded(batch, pad_token_id, model.device)
        at = Positions.of({signal.reads for signal in signals}, labels, lengths)
        this = Pass(labels, lengths, at, moments=moments)
        with hidden_states(model, layers, at, this.states):
            outputs(model, weights, signals, input_ids, this)
        with torch.no_grad():
            return {signal.name: signal.compute(this) for signal in signals}

    return run


def _run_batch(
    model: Any, layers: Mapping[str, nn.Linear], signals: Sequence[Signal], input_ids: Tensor, this: Pass
) -> None:
    """Logits and gradients by these layers, as far as signals read them. The last block runs only where they do."""
    reads_logits = any(signal.logits for signal in signals)

    def observe(logits: Tensor) -> None:
        this.logits = logits

    # No attention mask: padding is on the right of all labels, and a causal mask hides it from them.
    if layers:
        observed = observe if reads_logits else None
        this.gradients = batch_gradients(model, layers, input_ids, this.labels, this.at, observed)
        return
    with torch.no_grad(), last_block_at(model, this.at):
        if reads_logits:
            observe(model(input_ids=input_ids, use_cache=False).logits[0])
        else:
            model.get_decoder()(input_ids=input_ids, use_cache=False)


def _run_alone(
    model: Any, weights: Mapping[str, nn.Parameter], signals: Sequence[Signal], input_ids: Tensor, this: Pass
) -> None:
    """Logits of a single sample and gradients by these weights, from the model's own forward and backward pass."""
    for weight in weights.values():
        weight.requires_grad_()
    with torch.set_grad_enabled(bool(weights)):
        logits = model(input_ids=input_ids, use_cache=False).logits
        this.logits = this.at.gather(logits.detach())[0]
        if weights:
            predictions = Positions.of_predictions(this.labels)
            losses = token_losses(predictions.gather(logits)[0], predictions.targets)
            if (gradient := gradient_of(signals)) and not losses.requires_grad:
                raise UserError(
                    f"gradient={gradient.parameters}: these weights of {model_name(model)} take no part in its "
                    "forward pass; choose gradient=all_lora."
                )
            # The gradient of a weight that the model does not use (an adapter on Mamba's dt_proj) is zero.
            found = torch.autograd.grad(losses.mean(), list(weights.values()), materialize_grads=True)
            this.gradients = SampleGradients(dict(zip(weights, found, strict=True)))
    for weight in weights.values():
        weight.requires_grad_(False)
