"""FLOPs of scoring samples, computed from shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from staff.models.flops import block_flops, forward_flops
from staff.scoring.signal import GradientOf, Signal, gradient_of


def scoring_flops(
    model: Any,
    lengths: np.ndarray,
    answer_lengths: np.ndarray,
    signals: Sequence[Signal],
    one_at_a_time: bool = False,
) -> float:
    """FLOPs of one pass over samples, without padding: a forward pass, and a backward pass for gradients.

    The backward pass through frozen linear layers costs as much as the forward pass, through attention twice as
    much. "last_v_b" needs only the gradient of the values, which costs half the forward pass of attention.
    Recomputation in fused kernels is not counted.

    Args:
        model: its shapes count; it may lie on the meta device.
        lengths, answer_lengths: tokens of every sample and of its answer, shape (N,).
        signals: those of the pass.
        one_at_a_time: the pass runs in full on single samples. The backward pass for "last_v_b" is then counted as
            that of one whole block, since the shapes of its parts are not known.
    """
    config = model.config.get_text_config()
    tokens, gradient = int(lengths.sum()), gradient_of(signals)
    adapters = 2 * tokens * sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    own = sum(signal.flops(model, lengths, answer_lengths) for signal in signals)
    if one_at_a_time:
        return _in_full(config, lengths, gradient) + adapters * (1 if gradient is None else 3) + own
    labels = int(answer_lengths.sum())
    reads = {signal.reads for signal in signals}
    at = tokens if "tokens" in reads else labels + (len(lengths) if len(reads) == 2 else 0)
    attention_width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    attention = 4 * attention_width * int(np.square(lengths).sum())
    after_attention = 2 * config.hidden_size * (attention_width + 3 * config.intermediate_size)
    head_positions = at if gradient or any(signal.logits for signal in signals) else 0
    forward = forward_flops(config, lengths, head_positions) - after_attention * (tokens - at)
    if gradient is None:
        return forward + adapters + own
    if gradient.parameters == "last_v_b":
        head = 2 * config.hidden_size * config.vocab_size
        return forward + adapters + labels * (after_attention + head) + attention // 2 + own
    backward = forward + 2 * adapters + config.num_hidden_layers * attention
    return forward + adapters + backward + own


def _in_full(config: Any, lengths: np.ndarray, gradient: GradientOf | None) -> float:
    """FLOPs of whole passes over single samples, without adapters."""
    forward = forward_flops(config, lengths)
    if gradient is None:
        return forward
    _, _, per_pair = block_flops(config)
    attention = per_pair * int(np.square(lengths).sum())
    if gradient.parameters != "last_v_b":
        return forward + forward + attention
    head = 2 * config.hidden_size * config.vocab_size * int(lengths.sum())
    return forward + head + (forward - head + attention) / config.num_hidden_layers


def contraction_flops(model: Any, lengths: np.ndarray, answer_lengths: np.ndarray) -> float:
    """FLOPs of the squared norms of all linear layers' gradients. The head runs at answer tokens alone."""
    from staff.scoring.gradients import gradient_layers, gram_is_cheaper

    total = 0.0
    for layer in gradient_layers(model, "all_linear").values():
        wide, tall = layer.in_features, layer.out_features
        seen = (answer_lengths if layer is model.get_output_embeddings() else lengths).astype(float)
        gram = gram_is_cheaper(int(seen.max()), wide, tall)
        total += 2 * float((np.square(seen) * (wide + tall) if gram else seen * wide * tall).sum())
    return total
