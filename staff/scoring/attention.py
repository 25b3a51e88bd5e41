"""The attention of a block with queries at some positions only."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from staff.models.weights import attention_of

if TYPE_CHECKING:
    from staff.scoring.positions import Positions

NARROWED = ("sdpa", "eager")
"""Attention implementations whose queries run at some positions only."""

WEIGHTS_BYTES = 2**29
"""Attention weights are kept for the backward pass up to this size in float32."""


@contextmanager
def attention_at(attention: Any, positions: Positions, narrowed: bool = True) -> Iterator[None]:
    """Queries of this attention at these positions only: its output is (1, L, D); keys and values are of all.

    Attention kernels other than PyTorch's and the plain products run in full, and so does attention that is not
    `narrowed`: their output is gathered.
    """
    if not narrowed or attention_of(attention.config) not in NARROWED:
        with attention.o_proj.register_forward_pre_hook(lambda _, args: (positions.gather(args[0]),)):
            yield
        return
    # A forward of the instance, such as one that moves inputs to the layer's device, is put back afterwards.
    own = attention.__dict__.get("forward")
    attention.forward = lambda **inputs: (_attended(attention, positions, **inputs), None)
    try:
        yield
    finally:
        if own is None:
            del attention.forward
        else:
            attention.forward = own


def _attended(
    attention: Any,
    at: Positions,
    *,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None = None,
    cache: Any = None,
    **others: Any,
) -> Tensor:
    """As `forward` of Llama's attention and its kin, with queries at these positions: (B, T, D) -> (1, L, D)."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    module = sys.modules[type(attention).__module__]
    batch, length = hidden_states.shape[:2]
    rotate = module.apply_rotary_pos_emb
    cos, sin = (each.expand(batch, -1, -1) for each in position_embeddings)
    keys = _heads(attention, "k", hidden_states)
    values = _heads(attention, "v", hidden_states)
    queries = _heads(attention, "q", at.gather(hidden_states))
    # It rotates queries and keys by the same angles: none of the others, since their positions differ here.
    keys = rotate(keys[:, :0], keys, cos, sin)[1]
    queries = rotate(queries, queries[:, :0], at.gather(cos), at.gather(sin))[0]
    if (cache := others.get("past_key_values", cache)) is not None:
        keys, values = cache.update(keys, values, attention.layer_idx)
    heads, width = queries.shape[1], queries.shape[3]
    queries = at.spread(queries.transpose(1, 2).flatten(2)).unflatten(2, (heads, width)).transpose(1, 2)
    seen = _seen(at, attention_mask, length)
    way = attention_of(attention.config)
    # Where only values need a gradient it is one product with the weights, of which PyTorch's kernels compute five.
    of_values_alone = values.requires_grad and not (queries.requires_grad or keys.requires_grad)
    if way == "eager" or (of_values_alone and 4 * heads * seen.numel() <= WEIGHTS_BYTES):
        attend = module.eager_attention_forward
        if seen.dtype == torch.bool:
            seen = torch.zeros_like(seen, dtype=queries.dtype).masked_fill(~seen, torch.finfo(queries.dtype).min)
    else:
        attend = ALL_ATTENTION_FUNCTIONS[way]
    cap = getattr(attention, "attn_logit_softcapping", None)
    caps = {} if cap is None else {"softcap": cap}
    dropout = attention.attention_dropout if attention.training else 0.0
    output = attend(attention, queries, keys, values, seen, dropout=dropout, scaling=attention.scaling, **caps)[0]
    return attention.o_proj(at.gather_spread(output.flatten(2)))


def _heads(attention: Any, kind: str, hidden: Tensor) -> Tensor:
    """Queries "q", keys "k" or values "v": (B, T, D) -> (B, heads, T, head_dim)."""
    heads = getattr(attention, f"{kind}_proj")(hidden).unflatten(-1, (-1, attention.head_dim))
    norm = getattr(attention, f"{kind}_norm", None)
    return (heads if norm is None else norm(heads)).transpose(1, 2)


def _seen(at: Positions, mask: Tensor | None, length: int) -> Tensor:
    """The rows of an attention mask that belong to the queries, (B, 1, max counts, T); without a mask, a causal
    one."""
    columns = at.spread((at.index % length)[None, :, None])[..., 0]
    if mask is None:
        return (torch.arange(length, device=columns.device) <= columns[..., None])[:, None]
    rows = torch.arange(len(columns), device=columns.device)[:, None]
    return mask.expand(len(columns), -1, -1, -1)[:, 0][rows, columns][:, None]
