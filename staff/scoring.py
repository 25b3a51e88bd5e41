"""A score for every sample from one model: length-sorted batches under a token budget, original order restored."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from staff import distributed
from staff.cost import Meter, scoring_flops
from staff.errors import UserError
from staff.gradients import (
    GRADIENTS,
    IGNORED,
    Positions,
    gradient_parameters,
    last_block_at,
    per_sample_gradient_norms,
    scoring_mode,
    token_losses,
)
from staff.models import is_sharded
from staff.progress import progress
from staff.tokens import TokenizedSamples

log = logging.getLogger(__name__)

SIGNALS = ("effort", "el2n", "loss", "embedding")
EL2N_VARIANTS = ("standard", "official")
EL2N_CHUNK = 256  # label positions whose probabilities are held at once


@dataclass(frozen=True)
class Asked:
    """What one pass over the samples is to give.

    Attributes:
        signals: "effort", the gradient norm of the sample's own mean answer cross-entropy (STAFF, GraNd); "el2n";
            "loss", that mean cross-entropy; "embedding", the mean over the answer tokens of the hidden state after
            the final norm. All come from one forward pass, and "effort" from the backward pass through it.
        gradient: what "effort" differentiates by, see `staff.gradients.per_sample_gradient_norms`.
        variant: of "el2n", see `el2n_scores`.
    """

    signals: Sequence[str]
    gradient: str = "last_v_b"
    variant: str = "standard"

    def __post_init__(self) -> None:
        for signal in self.signals:
            if signal not in SIGNALS:
                raise UserError(f"signal={signal!r} is unknown: choose one of {', '.join(SIGNALS)}.")
        if self.gradient not in GRADIENTS:
            raise UserError(f"gradient={self.gradient!r} is unknown: choose {', '.join(GRADIENTS)}.")
        if self.variant not in EL2N_VARIANTS:
            raise UserError(f"variant={self.variant!r} is unknown: choose one of {', '.join(EL2N_VARIANTS)}.")

    def at_answers(self, signal: str) -> bool:
        """Whether the signal is read where the answer tokens stand, not where they are predicted."""
        return signal == "embedding" or (signal == "el2n" and self.variant == "official")

    @property
    def at_both(self) -> bool:
        """Whether some signals are read where the answer tokens stand and some where they are predicted."""
        return len({self.at_answers(signal) for signal in self.signals}) == 2

    def positions(self, labels: Tensor) -> Positions:
        """Where the last block has to run: (B, T) labels, -100 where there is none."""
        if self.at_both:
            return Positions.of_both(labels)
        return (
            Positions.of_answers(labels) if self.at_answers(self.signals[0]) else Positions.of_predictions(labels)
        )


def score_samples(
    model: Any,
    samples: TokenizedSamples,
    asked: Asked,
    *,
    batch_tokens: int | None,
    pad_token_id: int,
    one_at_a_time: bool = False,
    meter: Meter | None = None,
) -> dict[str, np.ndarray]:
    """Signals of `model` for every sample, in the samples' order; the model is left as it was. Processes of one run
    share the samples out.

    Args:
        batch_tokens: padded tokens of a batch, None for `suited_batch_tokens`; a longer sample goes alone. Halved
            when memory runs out.
        one_at_a_time: plain autograd on single samples: slow, and exact for every architecture.
        meter: is told FLOPs and tokens (without padding).

    Returns:
        By signal: (N,) float64, or (N, hidden) float32 for "embedding".

    Raises:
        UserError: a model that cannot be scored exactly, a sample that does not fit in memory alone or whose score
            is not finite (by its id).
    """
    scores = {
        signal: np.zeros((len(samples), model.config.get_text_config().hidden_size), np.float32)
        if signal == "embedding"
        else np.zeros(len(samples))
        for signal in asked.signals
    }
    # Longest first: if memory runs out it does so at once.
    order = distributed.share(np.argsort(-samples.lengths, kind="stable"))
    budget = 1 if one_at_a_time else batch_tokens or suited_batch_tokens(model)
    how = partial(_score_alone if one_at_a_time else _score_batch, model, asked=asked, pad_token_id=pad_token_id)
    scored = (_in_step if is_sharded(model) else _at_own_pace)(samples, order, budget, how)
    spent = np.zeros(3)
    with (
        distributed.agreed(apart=not is_sharded(model)),
        scoring_mode(model),
        progress(len(order), ", ".join(asked.signals)) as bar,
    ):
        for rows, batch, values in scored:
            for signal, value in values.items():
                scores[signal][rows] = value
                if not np.isfinite(value).all():
                    _refuse(value, batch, signal)
            tokens = int(batch.lengths.sum())
            flops = scoring_flops(model, batch.lengths, batch.answer_lengths, asked)
            spent += (flops, tokens, tokens if "effort" in asked.signals else 0)
            bar.update(len(rows))
    if meter is not None:
        meter.add(*distributed.total(spent))
    return {signal: distributed.total(values) for signal, values in scores.items()}


def suited_batch_tokens(model: Any) -> int:
    """Enough to keep a GPU busy; on a processor not more than its caches hold: with four times as many, norms over
    all LoRA parameters of the tiny target took 1.4 times as long."""
    return 2048 if model.device.type == "cpu" else 8192


Scored = Iterator[tuple[np.ndarray, TokenizedSamples, dict[str, np.ndarray]]]
How = Callable[[TokenizedSamples], dict[str, Tensor]]


def _at_own_pace(samples: TokenizedSamples, order: np.ndarray, budget: int, how: How) -> Scored:
    """Positions, samples and values of batch after batch; the budget is halved where memory runs out."""
    start = 0
    while start < len(order):
        longest = int(samples.lengths[order[start]])
        rows = order[start : start + max(1, budget // longest)]
        batch = samples.take(rows)
        values = _unless_out_of_memory(how, batch)
        if values is None:
            budget = _halved_budget(batch, longest)
            continue
        yield rows, batch, values
        start += len(rows)


def _in_step(samples: TokenizedSamples, order: np.ndarray, budget: int, how: How) -> Scored:
    """The same of a model that the processes share out: all run it as often, with the shortest sample where there
    is no other left."""
    batches, start = [], 0
    while start < len(order):
        batches.append(order[start : start + max(1, budget // int(samples.lengths[order[start]]))])
        start += len(batches[-1])
    for turn in range(max(distributed.gather(len(batches)))):
        rows = batches[turn] if turn < len(batches) else np.argsort(samples.lengths)[:1]
        batch = samples.take(rows)
        values = _unless_out_of_memory(how, batch)
        if values is None:
            raise UserError(f"out of memory with {budget} tokens a batch: lower scoring.batch_tokens.")
        if turn < len(batches):
            yield rows, batch, values


def _unless_out_of_memory(how: How, batch: TokenizedSamples) -> dict[str, np.ndarray] | None:
    try:
        return {signal: value.cpu().numpy() for signal, value in how(batch).items()}
    except (RuntimeError, MemoryError) as error:
        # torch names it differently: OutOfMemoryError on a GPU, a plain RuntimeError of its allocator on a CPU.
        exhausted = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)
        if not exhausted and "out of memory" not in str(error):
            raise
    # Only now is the exception gone, and with it the frames that held the batch's tensors.
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
    said = "out of memory with %d samples of up to %d tokens: going on with %d tokens a batch"
    log.warning(said, len(batch), longest, budget)
    return budget


def _refuse(scores: np.ndarray, batch: TokenizedSamples, signal: str) -> None:
    bad = int(np.flatnonzero(~np.isfinite(scores.reshape(len(batch), -1)).all(1))[0])
    raise UserError(
        f"sample {batch.ids[bad]!r}: its {signal} score is not finite; take it out, or score in float32 if the "
        f"model runs in a narrower precision."
    )


def _score_batch(model: Any, batch: TokenizedSamples, *, asked: Asked, pad_token_id: int) -> dict[str, Tensor]:
    input_ids, labels = _padded(batch, pad_token_id, model.device)
    at, values, hidden = asked.positions(labels), {}, []

    def observe(logits: Tensor) -> None:
        values.update(_from_logits(logits, labels, at, asked))

    # No attention mask: padding to the right lies after every label, where a causal model does not look.
    with _hidden_states(model, hidden):
        if "effort" in asked.signals:
            norms = per_sample_gradient_norms(model, input_ids, None, labels, asked.gradient, at, observe)
            values["effort"] = norms
        else:
            with torch.no_grad(), last_block_at(model, at):
                if tuple(asked.signals) == ("embedding",):
                    model.get_decoder()(input_ids=input_ids, use_cache=False)
                else:
                    observe(model(input_ids=input_ids, use_cache=False).logits[0])
    if "embedding" in asked.signals:
        answers = Positions.of_answers(labels)
        values["embedding"] = answers.mean(answers.out_of(at, hidden[0][0].detach()).float())
    return values


def _score_alone(model: Any, sample: TokenizedSamples, *, asked: Asked, pad_token_id: int) -> dict[str, Tensor]:
    """The same of one sample by the model's own forward and backward pass."""
    input_ids, labels = _padded(sample, pad_token_id, model.device)
    at, hidden = asked.positions(labels), []
    weights = gradient_parameters(model, asked.gradient) if "effort" in asked.signals else []
    for weight in weights:
        weight.requires_grad_()
    with _hidden_states(model, hidden), torch.set_grad_enabled(bool(weights)):
        logits = model(input_ids=input_ids, use_cache=False).logits
        values = _from_logits(at.gather(logits.detach())[0], labels, at, asked)
        if weights:
            predictions = Positions.of_predictions(labels)
            losses = token_losses(predictions.gather(logits)[0], predictions.targets)
            gradients = torch.autograd.grad(losses.mean(), weights)
            values["effort"] = torch.stack([g.float().square().sum() for g in gradients]).sum().sqrt()[None]
    for weight in weights:
        weight.requires_grad_(False)
    if "embedding" in asked.signals:
        answers = Positions.of_answers(labels)
        values["embedding"] = answers.mean(answers.gather(hidden[0].detach())[0].float())
    return values


def _padded(batch: TokenizedSamples, pad_token_id: int, device: Any) -> tuple[Tensor, Tensor]:
    """Token ids and labels, (B, T) each, padded to the right."""
    rows = [torch.tensor(row) for row in batch.input_ids]
    labels = [torch.tensor(batch.labels(i)) for i in range(len(batch))]
    input_ids = pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
    return input_ids.to(device), pad_sequence(labels, batch_first=True, padding_value=IGNORED).to(device)


@contextmanager
def _hidden_states(model: Any, into: list[Tensor]) -> Iterator[None]:
    """Put what the decoder gives, after its final norm, into the list."""
    decoder = model.get_decoder()
    with decoder.register_forward_hook(lambda _, args, output: into.append(output.last_hidden_state)):
        yield


def _from_logits(logits: Tensor, labels: Tensor, at: Positions, asked: Asked) -> dict[str, Tensor]:
    """The signals that logits (S, V) at the positions `at` tell, by name: (B,) each."""
    values = {}
    for signal in set(asked.signals) & {"el2n", "loss"}:
        wanted = Positions.of_answers(labels) if asked.at_answers(signal) else Positions.of_predictions(labels)
        those = wanted.out_of(at, logits)
        if signal == "loss":
            values[signal] = wanted.mean(token_losses(those, wanted.targets))
        else:
            values[signal] = el2n_scores(those, wanted, asked.variant)
    return values


def el2n_scores(logits: Tensor, positions: Positions, variant: str = "standard") -> Tensor:
    """EL2N (Paul et al. 2021, arXiv:2107.07075) carried over to the answer tokens of a causal LM: (B,).

    Args:
        logits: (L, V) at `positions`.
        positions: for "standard" where the answer tokens are predicted, for "official" where they stand.
        variant: "standard", the mean over tokens of the L2 norm of softmax minus one-hot; "official", what the
            authors of STAFF released: the root mean square, over tokens and vocabulary, of raw and unshifted
            logits minus one-hot.
    """
    token = _error_norms if variant == "standard" else _mean_squared_errors
    chunks = zip(logits.split(EL2N_CHUNK), positions.targets.split(EL2N_CHUNK), strict=True)
    wide = torch.promote_types(logits.dtype, torch.float32)
    mean = positions.mean(torch.cat([token(z.to(wide), y) for z, y in chunks]))
    return mean if variant == "standard" else mean.sqrt()


def _error_norms(logits: Tensor, targets: Tensor) -> Tensor:
    """|| softmax - onehot || of each token, from the wrong tokens' probabilities alone.

    With s their sum, 1 - p of the label is s: sqrt(s^2 + sum of their squares), s taken out of the root so that
    no square underflows. The textbook sqrt(sum p^2 - 2 p_label + 1) cancels where p_label is near 1.
    """
    wrong = logits.softmax(-1).scatter(-1, targets[:, None], 0.0)
    total = wrong.sum(-1, keepdim=True)
    shares = wrong / total.clamp_min(torch.finfo(wrong.dtype).tiny)
    return total[:, 0] * (1 + shares.square().sum(-1)).sqrt()


def _mean_squared_errors(logits: Tensor, targets: Tensor) -> Tensor:
    label = logits.gather(-1, targets[:, None])[:, 0]
    return (logits.square().sum(-1) - label.square() + (label - 1).square()) / logits.shape[-1]
