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
    much. Weights get no gradients: signals count what they compute of the pairs whose products these are.

    The backward pass ends at the first layer that is differentiated by. "last_v_b" needs only the gradient of the
    last block's values, which costs half the forward pass of attention. Else q, k and v of the first block pass
    nothing on, except to an embedding that shares the head's weight. Recomputation in fused kernels is not counted.

    Args:
        model: its shapes count; it may lie on the meta device.
        lengths, answer_lengths: tokens of every sample and of its answer, shape (N,).
        signals: those of the pass.
        one_at_a_time: the pass runs in full on single samples. The backward pass for "last_v_b" is then counted as
            that of one whole block, since the shapes of its parts are not known.
    """
    config = model.config.get_text_config()
    tokens, gradient = int(lengths.sum()), gradient_of(signals)
    own = sum(signal.flops(model, lengths, answer_lengths) for signal in signals)
    if one_at_a_time:
        adapters = 2 * tokens * sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
        return _in_full(config, lengths, gradient) + adapters * (1 if gradient is None else 3) + own
    labels = int(answer_lengths.sum())
    reads = {signal.reads for signal in signals}
    at = tokens if "tokens" in reads else labels + (len(lengths) if len(reads) == 2 else 0)
    width = _attention_width(config)
    attention = 4 * width * int(np.square(lengths).sum())
    after_attention = 2 * config.hidden_size * (width + 3 * config.intermediate_size)
    head_positions = at if gradient or any(signal.logits for signal in signals) else 0
    adapters = _adapters(model)
    at_last = 2 * adapters["last"] * at
    forward = forward_flops(config, lengths, head_positions) - after_attention * (tokens - at)
    forward += 2 * tokens * (adapters["first_a"] + adapters["others"]) + at_last
    if gradient is None:
        return forward + own
    if gradient.parameters == "last_v_b":
        head = 2 * config.hidden_size * config.vocab_size
        return forward + at * (after_attention + head) + at_last + attention // 2 + own
    backward = forward + config.num_hidden_layers * attention - 2 * tokens * adapters["first_a"]
    if not (gradient.parameters == "all_linear" and _is_tied(model)):
        backward -= 2 * tokens * config.hidden_size * _inputs_width(config)
    return forward + backward + own


def _attention_width(config: Any) -> int:
    """Features that attention hands to its output projection."""
    heads = config.num_attention_heads
    return heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)


def _inputs_width(config: Any) -> int:
    """Features of q, k and v together."""
    heads, width = config.num_attention_heads, _attention_width(config)
    return width + 2 * width // heads * (getattr(config, "num_key_value_heads", None) or heads)


def _is_tied(model: Any) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _adapters(model: Any) -> dict[str, int]:
    """Parameters of adapters: "last", those after the last block's attention, which run at few positions;
    "first_a", the first factors on q, k and v of the first block, which pass no gradient on; and "others"."""
    count = {"last": 0, "first_a": 0, "others": 0}
    last = f".layers.{model.config.get_text_config().num_hidden_layers - 1}."
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            of_inputs = any(f".{projection}." in name for projection in ("q_proj", "k_proj", "v_proj"))
            first = ".layers.0." in name and of_inputs and ".lora_A." in name
            part = "first_a" if first else "last" if last in name and not of_inputs else "others"
            count[part] += parameter.numel()
    return count


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


def contraction_flops(model: Any, lengths: np.ndarray, answer_lengths: np.ndarray, parameters: str) -> float:
    """FLOPs of the squared norms of the gradients of linear layers, without biases.

    The head, and what follows the last block's attention, run at answer tokens alone. A head that shares its weight
    with the embedding needs two more products.

    Args:
        parameters: one of `staff.scoring.signal.PARAMETERS`.
    """
    from staff.scoring.gradients import gradient_layers, gram_is_cheaper

    last, head = f".layers.{model.config.get_text_config().num_hidden_layers - 1}.", model.get_output_embeddings()
    total = 0.0
    for name, layer in gradient_layers(model, parameters).items():
        wide, tall = layer.in_features, layer.out_features
        inputs = any(f".{projection}" in name for projection in ("q_proj", "k_proj", "v_proj"))
        few = layer is head or (last in f".{name}" and not inputs)
        seen = (answer_lengths if few else lengths).astype(float)
        gram = gram_is_cheaper(int(seen.max()), wide, tall)
        total += 2 * float((np.square(seen) * (wide + tall) if gram else seen * wide * tall).sum())
    if parameters == "all_linear" and _is_tied(model):
        total += (
            2 * model.config.get_text_config().hidden_size * float((lengths * (lengths + answer_lengths)).sum())
        )
    return total
