"""Greedy decoding in which the next prompt replaces each answer that has ended.

`model.generate` pads a batch to its longest prompt, runs it until its longest answer ends, and copies the whole
cache in every step. Here every row of the cache is a slot with its own length. A step runs the slots in use, writes
each key and value in place, and attention reads no further than the longest row.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import Cache, DynamicLayer

from staff.models.spec import ARCHITECTURES, is_sharded
from staff.models.weights import attention_of
from staff.scoring.positions import Positions, last_block_at

PREFILL_SHARE = 4
"""Prompts start in groups of a quarter of the token budget: large enough for full matrix products, and small enough
that few slots wait for a group."""


class Answer(NamedTuple):
    """Token ids without end and padding tokens, and the number of generated tokens with the end token."""

    tokens: list[int]
    generated: int


@dataclass
class Row:
    """A prompt in a slot, and its answer so far."""

    name: int
    prompt: Sequence[int]
    answer: list[int] = field(default_factory=list)

    @property
    def cached(self) -> int:
        """Tokens in the cache: all but the last one of the answer."""
        return len(self.prompt) + len(self.answer) - 1


class Slots(DynamicLayer):
    """Keys and values of one layer, (slots, heads, capacity, head_dim); the rows in use come first.

    Attributes:
        shape: slots and capacity.
        rows: slots that the running pass writes.
        at: the column that each of them writes, (rows,); None: the pass is of prompts, from column 0.
        width: columns that the attention of a step reads.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shape, self.rows, self.width = (0, 0), slice(0), 0
        self.at: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            self.device, self.is_initialized = key_states.device, True
            self.keys, self.values = self._allocated(key_states), self._allocated(value_states)
        if self.at is None:
            width = key_states.shape[2]
            self.keys[self.rows, :, :width], self.values[self.rows, :, :width] = key_states, value_states
            return key_states, value_states
        at = self.at.to(self.device)
        every = torch.arange(len(at), device=self.device)
        self.keys[every, :, at], self.values[every, :, at] = key_states[:, :, 0], value_states[:, :, 0]
        return self.keys[self.rows, :, : self.width], self.values[self.rows, :, : self.width]

    def _allocated(self, like: Tensor) -> Tensor:
        """Zeros: a masked NaN would still be one."""
        slots, capacity = self.shape
        return like.new_zeros(slots, like.shape[1], capacity, like.shape[3])

    def reshape(self, slots: int, capacity: int, used: int) -> None:
        """Room for `slots` rows of `capacity` tokens; the first `used` rows are kept."""
        before, self.shape = self.shape, (slots, capacity)
        if self.keys is not None and self.values is not None and before != self.shape:
            width = min(before[1], capacity)
            keys, values = self._allocated(self.keys), self._allocated(self.values)
            keys[:used, :, :width], values[:used, :, :width] = (
                self.keys[:used, :, :width],
                self.values[:used, :, :width],
            )
            self.keys, self.values = keys, values

    def move(self, sources: list[int], targets: list[int]) -> None:
        """Copy rows over others."""
        if self.keys is not None and self.values is not None:
            self.keys[targets], self.values[targets] = self.keys[sources], self.values[sources]

    def get_seq_length(self) -> int:
        """0, since masks are built from it for passes over prompts alone."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0


def can_decode(model: Any, longest: int) -> bool:
    """Whether `decode` is exact for rows of up to `longest` tokens: plain decoders with PyTorch's attention, whose
    sliding window, if any, is longer. Processes that share a model's weights must run equally many steps, which
    `generate` sees to."""
    config = model.config
    window = getattr(config, "sliding_window", None)
    return (
        config.model_type in ARCHITECTURES
        and attention_of(config) == "sdpa"
        and not getattr(config, "use_bidirectional_attention", False)
        and (window is None or longest <= window)
        and not is_sharded(model)
    )


def decode(
    model: Any, prompts: Mapping[int, Sequence[int]], *, max_new_tokens: int, stop: set[int], batch_tokens: int
) -> Iterator[tuple[int, Answer]]:
    """The greedy answer to each prompt, with the prompt's key, as soon as it ends.

    Args:
        model: one that `can_decode`, without the wrapper of its adapters, in eval mode.
        prompts: token ids by any key, the longest first, so that memory runs out at the start, if at all.
        stop: end tokens.
        batch_tokens: the limit of slots x (longest prompt in use + max_new_tokens); a longer prompt goes alone.
    """
    waiting = [Row(name, prompt) for name, prompt in prompts.items()][::-1]
    running: list[Row] = []
    loop = _Loop(model)
    while waiting or running:
        rows = running
        if group := _next_group(running, waiting, max_new_tokens, batch_tokens):
            rows, running = group, running + group
            capacity = max(len(row.prompt) for row in running) + max_new_tokens
            loop.make_room(max(1, batch_tokens // capacity), capacity, len(running) - len(group))
            tokens = loop.start(group, len(running) - len(group))
        else:
            tokens = loop.step(running)
        for row, token in zip(rows, tokens, strict=True):
            row.answer.append(token)
        ended = [
            at for at, row in enumerate(running) if row.answer[-1] in stop or len(row.answer) == max_new_tokens
        ]
        for at in ended:
            answer = running[at].answer
            yield running[at].name, Answer(answer[:-1] if answer[-1] in stop else answer, len(answer))
        running = loop.without(running, ended)


def _next_group(running: list[Row], waiting: list[Row], max_new_tokens: int, batch_tokens: int) -> list[Row]:
    """The next prompts to start, taken from `waiting`; none while there is no room for a whole group."""
    if not waiting:
        return []
    longest = len(waiting[-1].prompt)
    capacity = max([longest, *(len(row.prompt) for row in running)]) + max_new_tokens
    size = min(len(waiting), max(1, batch_tokens // (PREFILL_SHARE * longest)))
    free = batch_tokens // capacity - len(running)
    if free < size and running:
        return []
    size = max(1, min(size, free))
    group = waiting[: -size - 1 : -1]
    del waiting[-size:]
    return group


def cache_argument(model: Any, cache: Cache) -> dict[str, Any]:
    """The arguments by which a model's forward pass reads and fills a cache."""
    # transformers before 5.24 calls it by another name.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    return {name: cache, "use_cache": True}


class _Loop:
    """The passes over a model, and its cache."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._layers = [Slots() for _ in range(model.config.num_hidden_layers)]
        self._cache = cache_argument(model, Cache(layers=list(self._layers)))

    def make_room(self, slots: int, capacity: int, used: int) -> None:
        for layer in self._layers:
            layer.reshape(slots, capacity, used)

    def start(self, group: list[Row], first: int) -> list[int]:
        """The first token of each answer. The group takes the slots from `first` on.

        Padding is on the right, where causal attention does not see it. The last block and the head run at the
        last token of each prompt alone.
        """
        device = self._model.device
        ids = pad_sequence([torch.tensor(row.prompt) for row in group], batch_first=True).to(device)
        last = torch.tensor(
            [at * ids.shape[1] + len(row.prompt) - 1 for at, row in enumerate(group)], device=device
        )
        for layer in self._layers:
            layer.rows, layer.at = slice(first, first + len(group)), None
        with last_block_at(self._model, Positions(last, last, torch.ones_like(last))):
            logits = self._model(input_ids=ids, **self._cache).logits[0]
        return logits.argmax(-1).tolist()

    def step(self, running: list[Row]) -> list[int]:
        """The next token of each answer."""
        ids, at = torch.tensor([[row.answer[-1], row.cached] for row in running], device=self._model.device).T
        width = max(row.cached for row in running) + 1
        for layer in self._layers:
            layer.rows, layer.at, layer.width = slice(len(running)), at, width
        seen = torch.arange(width, device=at.device) <= at[:, None]
        logits = self._model(
            input_ids=ids[:, None], position_ids=at[:, None], attention_mask=seen[:, None, None], **self._cache
        ).logits
        return logits[:, -1].argmax(-1).tolist()

    def without(self, running: list[Row], ended: list[int]) -> list[Row]:
        """The rows that go on; the last ones take the slots of those that ended."""
        if not ended:
            return running
        left = len(running) - len(ended)
        targets = [at for at in ended if at < left]
        gone = set(ended)
        sources = [at for at in range(left, len(running)) if at not in gone]
        kept = running[:left]
        for source, target in zip(sources, targets, strict=True):
            kept[target] = running[source]
        if sources:
            for layer in self._layers:
                layer.move(sources, targets)
        return kept
