"""A score for every sample from one model: length-sorted batches under a token budget, original order restored."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from staff.cost import Meter, forward_flops
from staff.data import TokenizedSamples
from staff.errors import UserError
from staff.gradients import (
    IGNORED,
    Positions,
    last_block_at,
    per_sample_gradient_norms,
    scoring_mode,
    token_losses,
)

log = logging.getLogger(__name__)

SIGNALS = ("effort", "el2n", "loss", "embedding")
EL2N_VARIANTS = ("standard", "official")
EL2N_CHUNK = 256  # label positions whose probabilities are held at once


def score_samples(
    model: Any,
    samples: TokenizedSamples,
    signal: str,
    *,
    gradient: str = "last_v_b",
    variant: str = "standard",
    batch_tokens: int,
    pad_token_id: int,
    meter: Meter | None = None,
) -> np.ndarray:
    """One signal of `model` for every sample, in the samples' order; the model is left as it was.

    Args:
        signal: "effort", the gradient norm of the sample's own mean answer cross-entropy (STAFF, GraNd);
            "el2n"; "loss", that mean cross-entropy; "embedding", the mean over the answer tokens of the hidden
            state after the final norm.
        gradient: what "effort" differentiates by, see `staff.gradients.per_sample_gradient_norms`.
        variant: of "el2n", see `el2n_scores`.
        batch_tokens: padded tokens of a batch; a longer sample goes alone. Halved when memory runs out.
        meter: is told FLOPs and tokens (without padding).

    Returns:
        (N,) float64, or (N, hidden) float32 for "embedding".

    Raises:
        UserError: an unknown signal or variant, a model that cannot be scored exactly, a sample that does not
            fit in memory alone or whose score is not finite (by its id).
    """
    if signal not in SIGNALS:
        raise UserError(f"signal={signal!r} is unknown: choose one of {', '.join(SIGNALS)}.")
    if variant not in EL2N_VARIANTS:
        raise UserError(f"variant={variant!r} is unknown: choose one of {', '.join(EL2N_VARIANTS)}.")
    shape, dtype = (len(samples),), np.float64
    if signal == "embedding":
        shape, dtype = (len(samples), model.config.hidden_size), np.float32
    scores = np.empty(shape, dtype)
    # Longest first: if memory runs out it does so at once.
    order = np.argsort(-samples.lengths, kind="stable")
    start, budget = 0, batch_tokens
    with scoring_mode(model), tqdm(total=len(samples), desc=signal, unit="sample", disable=None) as bar:
        while start < len(order):
            longest = int(samples.lengths[order[start]])
            rows = order[start : start + max(1, budget // longest)]
            batch = samples.take(rows)
            values = _score_unless_out_of_memory(model, batch, signal, gradient, variant, pad_token_id)
            if values is None:
                budget = _halved_budget(batch, longest)
                continue
            scores[rows] = values
            if not np.isfinite(scores[rows]).all():
                _refuse(scores[rows], batch, signal)
            if meter is not None:
                tokens = int(batch.lengths.sum())
                backward = tokens if signal == "effort" else 0
                meter.add(_flops(model, batch, signal, gradient), tokens, backward)
            start += len(rows)
            bar.update(len(rows))
    return scores


def _score_unless_out_of_memory(model: Any, batch: TokenizedSamples, *how: Any) -> np.ndarray | None:
    try:
        return _score_batch(model, batch, *how).cpu().numpy()
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


def _score_batch(
    model: Any, batch: TokenizedSamples, signal: str, gradient: str, variant: str, pad_token_id: int
) -> Tensor:
    rows = [torch.tensor(row) for row in batch.input_ids]
    labels = [torch.tensor(batch.labels(i)) for i in range(len(batch))]
    input_ids = pad_sequence(rows, batch_first=True, padding_value=pad_token_id).to(model.device)
    labels = pad_sequence(labels, batch_first=True, padding_value=IGNORED).to(model.device)
    # No attention mask: padding to the right lies after every label, where a causal model does not look.
    if signal == "effort":
        return per_sample_gradient_norms(model, input_ids, None, labels, gradient)
    at_answers = signal == "embedding" or (signal == "el2n" and variant == "official")
    positions = Positions.of_answers(labels) if at_answers else Positions.of_predictions(labels)
    with torch.no_grad(), last_block_at(model, positions):
        if signal == "embedding":
            hidden = model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state[0]
            return positions.mean(hidden.float())
        logits = model(input_ids=input_ids, use_cache=False).logits[0]
        if signal == "el2n":
            return el2n_scores(logits, positions, variant)
        return positions.mean(token_losses(logits, positions.targets))


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


def _flops(model: Any, batch: TokenizedSamples, signal: str, gradient: str) -> float:
    """FLOPs of one batch without its padding, counted as `staff.cost` does; two for each multiply-add.

    A backward pass through frozen linear layers costs what their forward pass cost, through attention twice that;
    "last_v_b" wants of attention only the gradient of the values, half of it. What a fused kernel computes besides
    is not counted.
    """
    config = model.config.get_text_config()
    tokens, labels = int(batch.lengths.sum()), int(batch.answer_lengths.sum())
    attention_width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    attention = 4 * attention_width * int(np.square(batch.lengths).sum())
    after_attention = 2 * config.hidden_size * (attention_width + 3 * config.intermediate_size)
    adapters = 2 * tokens * sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    head_positions = 0 if signal == "embedding" else labels
    forward = forward_flops(config, batch.lengths, head_positions) - after_attention * (tokens - labels)
    if signal != "effort":
        return forward + adapters
    if gradient == "last_v_b":
        head = 2 * config.hidden_size * config.vocab_size
        return forward + adapters + labels * (after_attention + head) + attention // 2
    return 2 * forward + 3 * adapters + config.num_hidden_layers * attention
