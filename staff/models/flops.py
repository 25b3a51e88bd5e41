"""FLOPs of a model, computed from its configuration."""

from collections.abc import Iterable
from typing import Any


def forward_flops(config: Any, lengths: Iterable[int], label_positions: int | Iterable[int] | None = None) -> float:
    """FLOPs of one forward pass of a decoder with gated MLPs (Llama, Mistral, Qwen2, Gemma 1 to 3).

    These are the matrix products of linear layers and attention; a multiply-add counts as two. Attention counts the
    full T x T of a sample, without savings by causal masks and sliding windows. Norms, activations, rotary
    embeddings and softmax are not counted. torch's FlopCounterMode counts in the same way.

    Args:
        config: a transformers configuration; of a multimodal one, the text model is counted.
        lengths: tokens of each sample without padding, shape (N,).
        label_positions: how many positions have logits, in total or for each sample; None: all tokens.
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
    """FLOPs of one epoch: a forward and a backward pass over the samples.

    In full fine-tuning the backward pass costs two forward passes, one for the gradients of the activations and one
    for those of the weights (Kaplan et al. 2020, arXiv:2001.08361, section 2.1). With LoRA the frozen weights need
    no gradients: linear layers count twice, attention three times (both factors are activations), and each adapter
    parameter 6 FLOPs per token. Gradients at the input of the first block are counted, though a frozen embedding
    may save them. Recomputation by gradient checkpointing is not counted.

    Args:
        config, lengths, label_positions: as in ``forward_flops``.
        adapter_parameters: number of parameters in all LoRA matrices; None: all weights are trained.
    """
    lengths = [int(length) for length in lengths]
    linear, attention = _matrix_products(config, lengths, label_positions)
    if adapter_parameters is None:
        return float(3 * (linear + attention))
    return float(2 * linear + 3 * attention + 6 * adapter_parameters * sum(lengths))


def _matrix_products(
    config: Any, lengths: Iterable[int], label_positions: int | Iterable[int] | None
) -> tuple[int, int]:
    """Forward FLOPs of linear layers and of attention."""
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
