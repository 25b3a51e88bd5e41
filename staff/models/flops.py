"""FLOPs of a model, from its shapes: by formula for decoders with gated MLPs, by torch's counter for others."""

import copy
import json
import logging
from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np

from staff.errors import UserError
from staff.models.spec import ARCHITECTURES

log = logging.getLogger(__name__)


def forward_flops(config: Any, lengths: Iterable[int], label_positions: int | Iterable[int] | None = None) -> float:
    """FLOPs of one forward pass of a causal language model; NaN where they cannot be counted.

    Two to a multiply-add of every linear layer and of both attention products, each over the full T x T of a
    sample, as torch's FlopCounterMode counts them (causal masks and sliding windows save nothing there);
    norms, activations, rotary embeddings and softmax are left out, as they are there. Of a mixture of experts,
    those count through which a token passes.

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
) -> tuple[float, float]:
    """Forward FLOPs of the linear layers and of the attention products."""
    config = config.get_text_config()
    lengths = [int(length) for length in lengths]
    if label_positions is None:
        label_positions = sum(lengths)
    elif not isinstance(label_positions, int):
        label_positions = sum(int(count) for count in label_positions)
    per_sample, per_token, per_pair = block_flops(config)
    linear = per_sample * len(lengths) + per_token * sum(lengths) + head_flops(config) * label_positions
    return linear, per_pair * sum(length**2 for length in lengths)


def head_flops(config: Any) -> float:
    """Forward FLOPs of the output embedding per position; NaN where they cannot be counted."""
    if config.model_type in ARCHITECTURES:
        return 2 * config.hidden_size * config.vocab_size
    return _of(config)[3]


def block_flops(config: Any) -> tuple[float, float, float]:
    """Forward FLOPs of all blocks, and of projections beside them: per sample (the padding of a convolution), per
    token, and per pair of tokens (attention); NaN where they cannot be counted."""
    if config.model_type not in ARCHITECTURES:
        return _of(config)[:3]
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_value_heads = getattr(config, "num_key_value_heads", None) or heads
    projections = config.hidden_size * head_dim * 2 * (heads + key_value_heads)
    block = projections + 3 * config.hidden_size * config.intermediate_size
    return 0, 2 * config.num_hidden_layers * block, 4 * config.num_hidden_layers * heads * head_dim


def _of(config: Any) -> tuple[float, float, float, float]:
    return _counted(json.dumps(config.to_dict(), sort_keys=True, default=str), _Hidden(config))


class _Hidden:
    """A value that the cache of `_counted` does not look at."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hidden)

    def __hash__(self) -> int:
        return 0


LENGTHS = (16, 32, 48, 64)
BEYOND = 300
"""Tokens beyond one chunk of the recurrent layers that work by chunks, whose padding is no polynomial."""
NAN = float("nan")
UNKNOWN = (NAN, NAN, NAN, NAN)


@cache
def _counted(known: str, config: _Hidden) -> tuple[float, float, float, float]:
    """`block_flops` and `head_flops` by torch's counter on the meta device, where a pass is a polynomial in its
    length."""
    lengths = LENGTHS
    try:
        try:
            counts = [_count(config.value, length) for length in lengths]
        except RuntimeError:  # hybrids look into the mask, which has no values there
            lengths = (*LENGTHS[:3], BEYOND)
            with _ones():
                counts = [_count(config.value, length) for length in lengths]
    except Exception as error:  # whatever a model's code may raise without weights
        log.warning("FLOPs of model type %r cannot be counted (%s): unknown", config.value.model_type, error)
        return UNKNOWN
    *first, last = (blocks for blocks, _ in counts)
    powers = np.vander(lengths, 3, increasing=True)
    law = np.linalg.solve(powers[:3], first).round(6)
    if abs(powers[3] @ law - last) > 1e-6 * last:
        log.warning("FLOPs of model type %r are no polynomial of the length: unknown", config.value.model_type)
        return UNKNOWN
    return float(law[0]), float(law[1]), float(law[2]), float(counts[0][1])


def _ones() -> Any:
    """A mode in which `all` of a tensor without values is true and `any` is false, as for a mask of ones."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Ones(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            asked = {torch.ops.aten.all.default: True, torch.ops.aten.any.default: False}
            return torch.tensor(asked[func]) if func in asked else func(*args, **(kwargs or {}))

    return Ones()


def _count(config: Any, length: int) -> tuple[float, float]:
    """FLOPs of the blocks for one sample of `length` tokens, and of the head for one of them."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    config = copy.deepcopy(config)
    config.use_cache = False
    # The grouped product of experts counts as nothing on a processor, and raises on the meta device.
    config._experts_implementation = "batched_mm"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        ids = torch.ones(1, length, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids))
    head = model.get_output_embeddings()
    if head is None:
        raise UserError("the model has no output embedding.")
    of_head = 2 * head.weight.numel()
    return counter.get_total_flops() - of_head * length, of_head
