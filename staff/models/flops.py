"""FLOPs of a model, from the shapes in its configuration."""

from collections.abc import Iterable
from typing import Any


def forward_flops(config: Any, lengths: Iterable[int], label_positions: int | Iterable[int] | None = None) -> float:
    """FLOPs of one forward pass of a decoder with gated MLPs (Llama, Mistral, Qwen2, Gemma 1 to 3).

    Two to a multiply-add of every linear layer and of both attention products, each over the full T x T of a
    sample, as torch's FlopCounterMode counts them (causal masks and sliding windows save nothing there);
    norms, activations, rotary embeddings and softmax are left out, as they are there.

    Args:
        config: a transformers configuration; a multimodal one counts by its text model.
        lengths: real tokens of every sample, shape (N,).
        label_positions: positions at which logits are computed, in all or for each sample; None: at all tokens.
    """
    linear, attention = _matrix_products(config, lengths, label_positions)
    return float(linear + attention)


def training_flops(
    config: Any,
    lengths: Iterable[int],
    label_positions: int | Iterable[int] | None = None,
    *,
    adapter_parameters: int | None = None,
) -> float:
    """FLOPs of one forward and backward pass over the samples: one epoch.

    Full fine-tuning: a backward pass costs two forward passes, one for the gradients of the activations and one
    for those of the weights (Kaplan et al. 2020, arXiv:2001.08361, section 2.1), so three in all. With LoRA the
    frozen weights need no gradient of their own: linear layers count twice, attention (no weights, both factors
    are activations) three times, and each adapter parameter 6 FLOPs a token. The gradients at the input of the
    first block, which a frozen embedding may save, are counted; recomputation by gradient checkpointing is not.

    Args:
        config, lengths, label_positions: as in ``forward_flops``; a trainer computes logits at all tokens.
        adapter_parameters: entries of all LoRA matrices A and B together; None: all weights are trained.
    """
    lengths = [int(length) for length in lengths]
    linear, attention = _matrix_products(config, lengths, label_positions)
    if adapter_parameters is None:
        return float(3 * (linear + attention))
    return float(2 * linear + 3 * attention + 6 * adapter_parameters * sum(lengths))


def _matrix_products(
    config: Any, lengths: Iterable[int], label_positions: int | Iterable[int] | None
) -> tuple[int, int]:
    """Forward FLOPs of the linear layers and of the attention products."""
    config = config.get_text_config()
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads
    projections = config.hidden_size * head_dim * 2 * (heads + key_value_heads)
    block = projections + 3 * config.hidden_size * config.intermediate_size

    lengths = [int(length) for length in lengths]
    if label_positions is None:
        label_positions = sum(lengths)
    elif not isinstance(label_positions, int):
        label_positions = sum(int(count) for count in label_positions)
    head = config.hidden_size * config.vocab_size * label_positions
    linear = 2 * (config.num_hidden_layers * block * sum(lengths) + head)
    attention = 4 * config.num_hidden_layers * heads * head_dim * sum(length**2 for length in lengths)
    return linear, attention
