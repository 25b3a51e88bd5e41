"""FLOPs of scoring samples, computed from shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from staff.data.tokens import TokenizedSamples
from staff.models.flops import block_flops, forward_flops, head_flops
from staff.models.weights import attention_of
from staff.scoring.signal import GradientOf, Signal, gradient_of
from staff.store.cost import Meter


def charge(
    meter: Meter, model: Any, samples: TokenizedSamples, signals: Sequence[Signal], one_at_a_time: bool = False
) -> None:
    """Tell the meter the FLOPs and tokens, without padding, of one pass over the samples (`scoring_flops`)."""
    tokens = int(samples.lengths.sum())
    flops = scoring_flops(model, samples.lengths, samples.answer_lengths, signals, one_at_a_time)
    meter.add(flops, tokens, tokens if gradient_of(signals) else 0)


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
    own = sum(signal.flops(model, lengths, answer_lengths) for signal in signals)
    if one_at_a_time:
        return _in_full(model, lengths, gradient_of(signals)) + own
    return _in_batches(model, lengths, answer_lengths, signals) + own


def _in_batches(model: Any, lengths: np.ndarray, answer_lengths: np.ndarray, signals: Sequence[Signal]) -> float:
    """FLOPs of passes whose last block runs only at the positions that are read."""
    config = model.config.get_text_config()
    tokens, gradient = int(lengths.sum()), gradient_of(signals)
    reads = {signal.reads for signal in signals}
    read = lengths if "tokens" in reads else answer_lengths + (len(reads) == 2)
    at, pairs = int(read.sum()), int(np.square(lengths).sum())
    # Queries of the last block, and what follows its attention, run at `at` positions.
    at_queries, read_pairs = (at, int((read * lengths).sum())) if _narrows(config) else (tokens, pairs)
    last, hidden = _Block.last_of(model), config.hidden_size
    width, after_attention = last.queries, 2 * last.after_attention
    head_positions = at if gradient or any(signal.logits for signal in signals) else 0
    adapters = _Adapters.of(model)
    forward = forward_flops(config, lengths, head_positions) - after_attention * (tokens - at)
    forward -= 2 * hidden * width * (tokens - at_queries) + 4 * width * (pairs - read_pairs)
    forward += 2 * (tokens * adapters.others + at_queries * adapters.last_queries + at * adapters.last)
    if gradient is None:
        return forward
    if gradient.parameters == "last_v_b":
        behind = after_attention + head_flops(config) + 2 * adapters.last
        return forward + at * behind + 2 * width * read_pairs
    first_queries = at_queries if config.num_hidden_layers == 1 else tokens
    backward = forward + 4 * width * ((config.num_hidden_layers - 1) * pairs + read_pairs)
    backward -= 2 * (first_queries * adapters.first_a_queries + tokens * adapters.first_a_others)
    if not (gradient.parameters == "all_linear" and _is_tied(model)):
        backward -= 2 * hidden * (first_queries * width + tokens * last.keys_and_values)
    return forward + backward


def _narrows(config: Any) -> bool:
    from staff.scoring.attention import NARROWED
    from staff.scoring.exact import NARROWED as QUERIES_NARROWED
    from staff.scoring.exact import batches

    return attention_of(config) in NARROWED and batches(config) == QUERIES_NARROWED


@dataclass(frozen=True)
class _Block:
    """Sizes of the last block without adapters.

    Attributes:
        queries, keys_and_values: features of q, and of k and v together.
        after_attention: weights of all other linear layers.
    """

    queries: int
    keys_and_values: int
    after_attention: int

    @classmethod
    def last_of(cls, model: Any) -> _Block:
        from torch import nn

        from staff.scoring.positions import last_block

        block, after = last_block(model), 0
        inputs = [getattr(block.self_attn, f"{kind}_proj") for kind in "qkv"]
        own = {id(part) for layer in inputs for part in layer.modules()}
        for name, layer in block.named_modules():
            if isinstance(layer, nn.Linear) and ".lora_" not in name and id(layer) not in own:
                after += layer.in_features * layer.out_features
        queries, keys, values = (layer.out_features for layer in inputs)
        return cls(queries, keys + values, after)


def _is_tied(model: Any) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


@dataclass
class _Adapters:
    """Parameters of adapters.

    Attributes:
        last_queries, last: those on queries and after the attention in the last block, which run at few positions.
        others: all others.
        first_a_queries, first_a_others: of all these, the first factors on q, and on k and v, of the first block,
            which pass no gradient on.
    """

    last_queries: int = 0
    last: int = 0
    others: int = 0
    first_a_queries: int = 0
    first_a_others: int = 0

    @classmethod
    def of(cls, model: Any) -> _Adapters:
        found, last = cls(), f".layers.{model.config.get_text_config().num_hidden_layers - 1}."
        for name, parameter in model.named_parameters():
            if ".lora_" not in name:
                continue
            count, queries = parameter.numel(), ".q_proj." in name
            of_inputs = queries or ".k_proj." in name or ".v_proj." in name
            if last in name and queries:
                found.last_queries += count
            elif last in name and not of_inputs:
                found.last += count
            else:
                found.others += count
            if ".layers.0." in name and of_inputs and ".lora_A." in name:
                if queries:
                    found.first_a_queries += count
                else:
                    found.first_a_others += count
        return found


def _in_full(model: Any, lengths: np.ndarray, gradient: GradientOf | None) -> float:
    """FLOPs of whole passes over single samples."""
    config, tokens = model.config.get_text_config(), int(lengths.sum())
    adapters = 2 * tokens * sum(p.numel() for name, p in model.named_parameters() if ".lora_" in name)
    forward = forward_flops(config, lengths)
    if gradient is None:
        return forward + adapters
    _, _, per_pair = block_flops(config)
    attention = per_pair * int(np.square(lengths).sum())
    if gradient.parameters != "last_v_b":
        return forward + forward + attention + 3 * adapters
    head = head_flops(config) * tokens
    return forward + head + (forward - head + attention) / config.num_hidden_layers + 3 * adapters


def contraction_flops(model: Any, lengths: np.ndarray, answer_lengths: np.ndarray, parameters: str) -> float:
    """FLOPs of the squared norms of the gradients of linear layers, without biases.

    The head, the last block's queries and what follows its attention run at answer tokens alone. A head that shares
    its weight with the embedding needs two more products.

    Args:
        parameters: one of `staff.scoring.signal.PARAMETERS`.
    """
    from staff.scoring.gradients import gradient_layers

    last, head = f".layers.{model.config.get_text_config().num_hidden_layers - 1}.", model.get_output_embeddings()
    narrows, total = _narrows(model.config.get_text_config()), 0.0
    for name, layer in gradient_layers(model, parameters).items():
        wide, tall = layer.in_features, layer.out_features
        whole = (".k_proj", ".v_proj") if narrows else (".q_proj", ".k_proj", ".v_proj")
        few = layer is head or (last in f".{name}" and not any(part in name for part in whole))
        seen = (answer_lengths if few else lengths).astype(float)
        total += 2 * float((seen * np.minimum(seen * (wide + tall), wide * tall)).sum())
    if parameters == "all_linear" and _is_tied(model):
        total += (
            2 * model.config.get_text_config().hidden_size * float((lengths * (lengths + answer_lengths)).sum())
        )
    return total
