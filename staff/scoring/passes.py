"""A pass over samples, which computes signals in batches of similar length under a token budget."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
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
from staff.scoring.flops import scoring_flops
from staff.scoring.gradients import (
    Gradients,
    SampleGradients,
    batch_gradients,
    gradient_layers,
    gradient_parameters,
)
from staff.scoring.positions import (
    Positions,
    last_block_at,
    model_name,
    padded,
    scoring_mode,
    token_losses,
)
from staff.scoring.projection import Moments
from staff.scoring.signal import Signal, gradient_of
from staff.store.cost import Meter

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
    meter: Meter | None = None,
) -> dict[str, np.ndarray]:
    """Signals of every sample, in the samples' order, computed in one pass. The model is not changed.

    In a run of several processes each scores a shard of the samples, and all return all values.

    Args:
        signals: with distinct names, computed in one pass.
        batch_tokens: padded tokens of a batch, None for `default_batch_tokens`; a longer sample goes alone. Halved
            when memory runs out.
        one_at_a_time: plain autograd on single samples: slow, and exact for every architecture.
        moments: the optimiser's, for signals that read them.
        meter: is told FLOPs and tokens, without padding.

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
    how = {"signals": signals, "pad_token_id": pad_token_id, "moments": moments}
    run = partial(run_alone, model, **how) if one_at_a_time else run_by_batches(model, **how)
    batches = (_in_step if is_sharded(model) else _independently)(samples, order, budget, run)
    with (
        processes.raise_on_all_ranks(apart=not is_sharded(model)),
        scoring_mode(model),
        without_cudnn_attention(),
        progress(len(order), ", ".join(signal.name for signal in signals)) as bar,
    ):
        for rows, batch, of_batch in batches:
            for name, value in of_batch.items():
                values[name][rows] = value
                if not np.isfinite(value).all():
                    _refuse(value, batch, name)
            bar.update(len(rows))
    if meter is not None:
        tokens = int(samples.lengths.sum())
        flops = scoring_flops(model, samples.lengths, samples.answer_lengths, signals, one_at_a_time)
        meter.add(flops, tokens, tokens if gradient_of(signals) else 0)
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
            f"sample {batch.ids[0]!r} ({longest} tokens) does not fit in memory by itself: take it out, or use a "
            f"smaller model or precision."
        )
    budget = len(batch) * longest // 2
    said = "out of memory with %d samples of up to %d tokens: continuing with %d tokens per batch"
    log.warning(said, len(batch), longest, budget)
    return budget


def _refuse(values: np.ndarray, batch: TokenizedSamples, signal: str) -> None:
    bad = int(np.flatnonzero(~np.isfinite(values.reshape(len(batch), -1)).all(1))[0])
    raise UserError(
        f"sample {batch.ids[bad]!r}: its {signal} is not finite; take it out, or score in float32 if the "
        f"model has a lower precision."
    )


def run_by_batches(model: Any, *, signals: Sequence[Signal], **how: Any) -> Run:
    gradient = gradient_of(signals)
    layers = gradient_layers(model, gradient.parameters) if gradient else None
    return partial(_run_batch, model, signals=signals, layers=layers, **how)


def _run_batch(
    model: Any,
    batch: TokenizedSamples,
    *,
    signals: Sequence[Signal],
    pad_token_id: int,
    moments: Moments | None,
    layers: Mapping[str, nn.Linear] | None = None,
) -> dict[str, Tensor]:
    """The signals of a batch, with gradients by these layers. The last block runs only at the positions read."""
    input_ids, labels, lengths = padded(batch, pad_token_id, model.device)
    at = Positions.of({signal.reads for signal in signals}, labels, lengths)
    this, logits_read = Pass(labels, lengths, at, moments=moments), any(signal.logits for signal in signals)

    def observe(logits: Tensor) -> None:
        this.logits = logits

    # No attention mask: padding is on the right of all labels, so a causal model does not attend to it.
    with _hidden_states(model, signals, this):
        if layers is not None:
            observed = observe if logits_read else None
            this.gradients = batch_gradients(model, layers, input_ids, None, labels, at, observed)
        else:
            with torch.no_grad(), last_block_at(model, at):
                if logits_read:
                    observe(model(input_ids=input_ids, use_cache=False).logits[0])
                else:
                    model.get_decoder()(input_ids=input_ids, use_cache=False)
        with torch.no_grad():
            return {signal.name: signal.compute(this) for signal in signals}


def run_alone(
    model: Any, sample: TokenizedSamples, *, signals: Sequence[Signal], pad_token_id: int, moments: Moments | None
) -> dict[str, Tensor]:
    """The signals of a single sample, from the model's own forward and backward pass."""
    input_ids, labels, lengths = padded(sample, pad_token_id, model.device)
    at, gradient = Positions.of({signal.reads for signal in signals}, labels, lengths), gradient_of(signals)
    this = Pass(labels, lengths, at, moments=moments)
    weights = gradient_parameters(model, gradient.parameters) if gradient else {}
    for weight in weights.values():
        weight.requires_grad_()
    with _hidden_states(model, signals, this), torch.set_grad_enabled(bool(weights)):
        logits = model(input_ids=input_ids, use_cache=False).logits
        this.logits = at.gather(logits.detach())[0]
        if weights:
            predictions = Positions.of_predictions(labels)
            losses = token_losses(predictions.gather(logits)[0], predictions.targets)
            if gradient and not losses.requires_grad:
                raise UserError(
                    f"gradient={gradient.parameters}: these weights of {model_name(model)} take no part in its "
                    "forward pass; choose gradient=all_lora."
                )
            # The gradient of a weight that the model does not use (an adapter on Mamba's dt_proj) is zero.
            found = torch.autograd.grad(losses.mean(), list(weights.values()), materialize_grads=True)
            this.gradients = SampleGradients(dict(zip(weights, found, strict=True)))
    for weight in weights.values():
        weight.requires_grad_(False)
    with torch.no_grad():
        return {signal.name: signal.compute(this) for signal in signals}


@contextmanager
def _hidden_states(model: Any, signals: Sequence[Signal], into: Pass) -> Iterator[None]:
    """Store the hidden states that the signals read in `into`, at its positions."""
    decoder = model.get_decoder()

    def keep(layer: int, output: Any) -> None:
        states = getattr(output, "last_hidden_state", output)
        states = (states[0] if isinstance(states, tuple) else states).detach()
        ran_everywhere = states.shape[:2] == into.labels.shape
        into.states[layer] = (into.at.gather(states) if ran_everywhere else states)[0]

    with ExitStack() as stack:
        for layer in {signal.layer for signal in signals} - {None}:
            assert layer is not None
            module = decoder if layer == -1 else decoder.layers[layer]
            hook = module.register_forward_hook(lambda _, args, output, layer=layer: keep(layer, output))
            stack.enter_context(hook)
        yield
