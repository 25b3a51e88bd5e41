"""Label positions of a padded batch, and a last block that runs at these positions only.

Only the keys and values of the last block are read at all positions. Its queries, output projection and MLP, the
final norm and the head can run only where their outputs are read, with the same results.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from staff.data.tokens import IGNORED, TokenizedSamples
from staff.errors import UserError
from staff.scoring.attention import attention_at
from staff.scoring.exact import NARROWED, batches

READS = ("predictions", "answers", "tokens")
"""Where a signal can read: at the positions that predict answer tokens, at the answer tokens, or at all tokens."""


def padded(batch: TokenizedSamples, pad_token_id: int, device: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids and labels, both (B, T) and padded on the right, and lengths (B,)."""
    columns = np.arange(int(batch.lengths.max()))
    real = columns < batch.lengths[:, None]
    ids = np.full(real.shape, pad_token_id, np.int64)
    ids[real] = batch.tokens
    if batch.labelled is None:
        labelled = real & (columns >= batch.prompt_lengths[:, None])
    else:
        labelled = np.zeros_like(real)
        labelled[real] = batch.labelled
    host = (torch.from_numpy(array) for array in (ids, np.where(labelled, ids, IGNORED), batch.lengths))
    if torch.device(device).type == "cuda":  # from pinned memory the copies do not hold up the host
        host = (tensor.pin_memory() for tensor in host)
    input_ids, labels, lengths = (tensor.to(device, non_blocking=True) for tensor in host)
    return input_ids, labels, lengths


@dataclass(frozen=True)
class Positions:
    """L positions of a padded batch (B, T), sorted by sample.

    Attributes:
        index: positions in the flattened batch, increasing, (L,).
        targets: the label of each position, (L,).
        counts: the number of positions of each sample, (B,).
    """

    index: Tensor
    targets: Tensor
    counts: Tensor

    @classmethod
    def where(cls, mask: Tensor, labels: Tensor) -> Positions:
        """The positions where `mask` (B, T) is true, with their labels from `labels` (B, T)."""
        index = mask.flatten().nonzero()[:, 0]
        return cls(index, labels.flatten().index_select(0, index), mask.sum(1))

    @classmethod
    def of_answers(cls, labels: Tensor) -> Positions:
        """The positions of the labelled tokens; labels (B, T), -100 where there is none."""
        return cls.where(labels != IGNORED, labels)

    @classmethod
    def of_predictions(cls, labels: Tensor) -> Positions:
        """The positions that predict the labelled tokens, one before each."""
        return cls.of_answers(F.pad(labels[:, 1:], (0, 1), value=IGNORED))

    @classmethod
    def of_tokens(cls, labels: Tensor, lengths: Tensor) -> Positions:
        """The positions of all tokens except padding; lengths (B,)."""
        return cls.where(torch.arange(labels.shape[1], device=labels.device) < lengths[:, None], labels)

    @classmethod
    def of(cls, reads: Collection[str], labels: Tensor, lengths: Tensor) -> Positions:
        """The union of the positions that are read; `reads` are from `READS`."""
        if "tokens" in reads:
            return cls.of_tokens(labels, lengths)
        if len(set(reads)) == 2:
            labelled = labels != IGNORED
            return cls.where(labelled | F.pad(labelled[:, 1:], (0, 1)), labels)
        return cls.of_answers(labels) if "answers" in reads else cls.of_predictions(labels)

    def out_of(self, others: Positions, values: Tensor) -> Tensor:
        """The rows of values (S, ...) at `others`, which include these positions, that belong to them: (L, ...)."""
        if len(self.index) == len(others.index):
            return values
        return values.index_select(0, torch.searchsorted(others.index, self.index))

    def gather(self, hidden: Tensor) -> Tensor:
        """The values at these positions: (B, T, D) -> (1, L, D)."""
        return hidden.flatten(0, 1).index_select(0, self.index)[None]

    def spread(self, gathered: Tensor) -> Tensor:
        """Gathered values by sample, padded with zeros: (1, L, D) -> (B, max counts, D)."""
        zeros = gathered.new_zeros(len(self.counts) * self._width, gathered.shape[-1])
        spread = zeros.index_copy(0, self._slots, gathered.squeeze(0))
        return spread.unflatten(0, (len(self.counts), self._width))

    def gather_spread(self, spread: Tensor) -> Tensor:
        """The values that `spread` put in their places: (B, max counts, D) -> (1, L, D)."""
        return spread.flatten(0, 1).index_select(0, self._slots)[None]

    # Integer places instead of masks: a mask has the host wait for the device in every use.

    @cached_property
    def samples(self) -> Tensor:
        """The sample of each position, (L,)."""
        samples = torch.arange(len(self.counts), device=self.counts.device)
        return samples.repeat_interleave(self.counts, output_size=len(self.index))

    @cached_property
    def _width(self) -> int:
        # At least one, for the batch of a process that has nothing to do: kernels refuse an empty axis.
        return max(1, int(self.counts.max()))

    @cached_property
    def _slots(self) -> Tensor:
        """The place of each position in (B x max counts), (L,)."""
        before = (
            self.counts.cumsum(0)
            - self.counts
            - self._width * torch.arange(len(self.counts), device=self.counts.device)
        )
        return torch.arange(len(self.index), device=self.index.device) - before.index_select(0, self.samples)

    def by_sample(self, hidden: Tensor) -> Tensor:
        """`spread` of a layer's values at these positions; values of the whole batch (B, T, D) stay as they are."""
        return self.spread(hidden) if len(hidden) < len(self.counts) else hidden

    def mean(self, values: Tensor) -> Tensor:
        """Mean over each sample's positions: (L, ...) -> (B, ...), NaN for a sample without any."""
        return torch.segment_reduce(values, "mean", lengths=self.counts, axis=0, unsafe=True)


def widened(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in its own type if that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each token, in float32 or wider: (L, V), (L,) -> (L,)."""
    return F.cross_entropy(widened(logits), targets, reduction="none")


@contextmanager
def scoring_mode(model: nn.Module) -> Iterator[None]:
    """Turn off dropout and gradients of all parameters, and restore both afterwards."""
    training, trainable = model.training, [p for p in model.parameters() if p.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for parameter in trainable:
            parameter.requires_grad_()


@contextmanager
def last_block_at(model: Any, positions: Positions) -> Iterator[None]:
    """Run the last block at these positions only, except for its keys and values. Logits are then (1, L, V).

    The block gets the gathered positions as its input. Its first norm, or the attention of a block without one,
    gets the whole sequence instead, so that attention sees all positions.
    """
    block = last_block(model)
    attention, norm = block.self_attn, getattr(block, "input_layernorm", None)
    whole: list[Tensor] = []

    def narrow(_, args: tuple) -> tuple:
        whole.append(args[0])
        return (positions.gather(args[0]), *args[1:])

    def widen(_, args: tuple, named: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if "hidden_states" in named:
            return args, {**named, "hidden_states": whole.pop()}
        return (whole.pop(), *args[1:]), named

    with (
        block.register_forward_pre_hook(narrow),
        (attention if norm is None else norm).register_forward_pre_hook(widen, with_kwargs=True),
        attention_at(attention, positions, batches(model.config) == NARROWED),
    ):
        yield


@contextmanager
def hidden_states(model: Any, layers: Collection[int | None], positions: Positions, into: dict) -> Iterator[None]:
    """Store the hidden states of these layers at these positions, (L, D), in `into`, as the model runs.

    Args:
        layers: as in `staff.scoring.signal.Signal.layer`.
    """
    decoder = model.get_decoder()

    def keep(layer: int, output: Any) -> None:
        states = getattr(output, "last_hidden_state", output)
        states = (states[0] if isinstance(states, tuple) else states).detach()
        narrowed = states.shape[:2] == (1, len(positions.index))  # by `last_block_at`
        into[layer] = (states if narrowed else positions.gather(states))[0]

    with ExitStack() as stack:
        for layer in layers:
            if layer is not None:
                module = decoder if layer == -1 else decoder.layers[layer]
                hook = module.register_forward_hook(lambda _, args, output, layer=layer: keep(layer, output))
                stack.enter_context(hook)
        yield


def last_block(model: Any) -> Any:
    """The last decoder block.

    Raises:
        UserError: a model that is not exact in batches (`staff.scoring.exact`).
    """
    config = model.config
    if batches(config) is None:
        raise UserError(
            f"{model_name(model)} (model type {config.model_type!r}) cannot be scored exactly in batches: set "
            "scoring.one_at_a_time=true, which scores single samples by plain autograd."
        )
    return model.get_decoder().layers[: config.num_hidden_layers][-1]


def model_name(model: Any) -> str:
    """The class name of the model without its adapters."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(base).__name__
