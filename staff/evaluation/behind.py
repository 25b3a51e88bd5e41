"""Greedy answers to several queries behind one prefix, and the attention that they pay to it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from staff.evaluation.decoding import cache_argument
from staff.models.weights import attention_of
from staff.scoring.positions import Positions, last_block_at

NEVER = 2**40
"""The position of padding, behind all others."""


class Behind(NamedTuple):
    """An answer, the attention on each token of the prefix, mean over the answer's tokens and heads (NaN of an
    empty answer), and how many tokens the model read after the prompt."""

    tokens: list[int]
    attention: np.ndarray
    read: int


@torch.inference_mode()
def answers_behind(
    model: Any,
    block: int,
    prefixes: Sequence[Sequence[int]],
    queries: Sequence[Sequence[Sequence[int]]],
    max_new_tokens: int,
    stop: Collection[int],
    separator: Sequence[int] | None,
) -> list[Behind]:
    """The greedy answer to each query behind its prefix, in the order of the queries.

    The model reads a prefix once, and every query and answer on top of its keys and values. Each token of an answer
    is read in any case, for the next one, and its attention is kept.

    Args:
        block: the one whose attention is read.
        queries: those behind each prefix.
        stop: tokens that end an answer; a `separator` does, too. Neither belongs to it.
    """
    reader = Reader(model)
    with reader.attention("eager" if attention_of(model.config) == "eager" else "sdpa"):
        reader.read(prefixes)
        reader.keep(np.repeat(np.arange(len(prefixes)), [len(of) for of in queries]))
        following = reader.read([query for of in queries for query in of])
    lengths = [len(prefix) for prefix, of in zip(prefixes, queries) for _ in of]
    answers: list[list[int]] = [[] for _ in lengths]
    attention: list[list[np.ndarray]] = [[] for _ in lengths]
    running = np.arange(len(lengths))
    with reader.attention("eager"), weights_of(model, block) as weights:
        for _ in range(max_new_tokens):
            for k, token in zip(running, following):
                answers[k].append(token)
            going = [at for at, k in enumerate(running) if not _ended(answers[k], stop, separator)]
            if not going:
                break
            running = running[going]
            reader.keep(going)
            following = reader.read([answers[k][-1:] for k in running])
            for k, row in zip(running, weights.pop()[:, :, 0].float().mean(dim=1).cpu().numpy()):
                attention[k].append(row[: lengths[k]].astype(np.float64))
    found = []
    for answer, rows, length in zip(answers, attention, lengths):
        tokens = before(answer[:-1] if answer[-1] in stop else answer, separator)
        mean = np.mean(rows[: len(tokens)], axis=0) if tokens else np.full(length, np.nan)
        found.append(Behind(tokens, mean, len(rows)))
    return found


def _ended(answer: list[int], stop: Collection[int], separator: Sequence[int] | None) -> bool:
    return answer[-1] in stop or (bool(separator) and answer[-len(separator) :] == list(separator))


def before(answer: Sequence[int], separator: Sequence[int] | None) -> list[int]:
    """The tokens of an answer before the first separator in it."""
    mark = list(separator or [])
    for start in range(len(answer) - len(mark) + 1 if mark else 0):
        if list(answer[start : start + len(mark)]) == mark:
            return list(answer[:start])
    return list(answer)


class Reader:
    """Reads rows of tokens with a model, each on top of what the row has read before.

    Padding lies between the parts of a row; a mask by positions leaves it out.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._cache = model, DynamicCache()
        self._seen = torch.empty(0, 0, dtype=torch.int64, device=model.device)  # positions of the cache, (B, T)
        self._lengths = torch.empty(0, dtype=torch.int64, device=model.device)

    def keep(self, rows: Sequence[int] | np.ndarray) -> None:
        """Go on with these rows only, in this order; a row may come several times."""
        at = torch.as_tensor(rows, device=self._model.device)
        if torch.equal(at, torch.arange(len(self._lengths), device=at.device)):
            return
        self._cache.batch_select_indices(at)
        self._seen, self._lengths = self._seen[at], self._lengths[at]

    def read(self, rows: Sequence[Sequence[int]]) -> list[int]:
        """Read some more tokens of each row; returns the likeliest next token of each."""
        device = self._model.device
        ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True).to(device)
        counts = torch.tensor([len(row) for row in rows], device=device)
        if not len(self._lengths):
            self._seen, self._lengths = ids[:, :0], torch.zeros_like(counts)
        within = torch.arange(ids.shape[1], device=device)
        positions = torch.where(within < counts[:, None], self._lengths[:, None] + within, NEVER)
        self._seen, self._lengths = torch.cat([self._seen, positions], 1), self._lengths + counts
        last = torch.arange(len(ids), device=device) * ids.shape[1] + counts - 1
        one = ids.shape[1] == 1
        with nullcontext() if one else last_block_at(self._model, Positions(last, last, torch.ones_like(last))):
            logits = self._model(
                input_ids=ids,
                position_ids=positions.where(positions < NEVER, 0),
                attention_mask=self._masks(positions),
                **cache_argument(self._model, self._cache),
            ).logits
        return (logits[:, -1] if one else logits[0]).argmax(-1).tolist()

    def _masks(self, positions: Tensor) -> Any:
        """What is added to attention scores, (B, 1, S, T), by the kind of block where there are several."""
        behind = (positions[:, :, None] - self._seen[:, None])[:, None]
        config, dtype = self._model.config.get_text_config(), self._model.dtype
        window = getattr(config, "sliding_window", None) or NEVER

        def mask(hidden: Tensor) -> Tensor:
            return torch.zeros_like(hidden, dtype=dtype).masked_fill_(hidden, torch.finfo(dtype).min)

        near = mask((behind < 0) | (behind >= window))
        if getattr(config, "layer_types", None):
            return {"full_attention": mask(behind < 0), "sliding_attention": near}
        return near

    @contextmanager
    def attention(self, implementation: str) -> Iterator[None]:
        """Attention by "sdpa" or "eager" in the block: both take the masks, and only eager returns weights."""
        own = attention_of(self._model.config)
        self._model.set_attn_implementation(implementation)
        try:
            yield
        finally:
            self._model.set_attn_implementation(own)


@contextmanager
def weights_of(model: Any, block: int) -> Iterator[list[Tensor]]:
    """The attention weights of a block, (B, heads, S, T), of each pass by eager attention, as a list that grows."""
    found: list[Tensor] = []
    layer = model.get_decoder().layers[block].self_attn
    with layer.register_forward_hook(lambda module, args, output: found.append(output[1])):
        yield found
