"""FLOPs of scoring samples, computed from shapes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from staff.models.flops import forward_flops
from staff.scoring.signal import Signal, gradient_of


def scoring_flops(model: Any, lengths: np.ndarray, answer_lengths: np.ndarray, signals: Sequence[Signal]) -> float:
    """FLOPs of one pass over samples without padding: forward, and backward if a signal needs gradients.

    The backward pass through frozen linear layers costs as much as the forward pass, through attention twice as
    much. "last_v_b" needs only the gradient of the values, which costs half the forward pass of attention.
    Recomputation in fused kernels is not counted.

    Args:
        model: only its shapes are used, so it may be on the meta device.
        lengths, answer_lengths: tokens of each sample and of its answer, shape (N,).
        signals: the signals of the pass.
    """
    config = model.config.get_text_config()
    tokens, labels = int(lengths.sum()), int(answer_lengths.sum())
    reads = {signal.reads for signal in signals}
    at = tokens if "tokens" in reads else labels + (len(lengths) if len(reads) == 2 else 0)
    attention_width = config.num_attention_heads * (
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    attention = 4 * attention_width * int(np.square(lengths).sum())
    after_attention = 2 * config.hidden_size * (attention_width + 3 * config.intermediate_size)
    adapters = 2 * tokens * sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    gradient = gradient_of(signals)
    head_positions = at if gradient or any(signal.logits for signal in signals) else 0
    forward = forward_flops(config, lengths, head_positions) - after_attention * (tokens - at)
    own = sum(signal.flops(model, lengths, answer_lengths) for signal in signals)
    if gradient is None:
        return forward + adapters + own
    if gradient.parameters == "last_v_b":
        head = 2 * config.hidden_size * config.vocab_size
        return forward + adapters + labels * (after_attention + head) + attention // 2 + own
    backward = forward + 2 * adapters + config.num_hidden_layers * attention
    return forward + adapters + backward + own


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
