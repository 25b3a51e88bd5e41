"""Generators, which answer prompts with a model. Another engine is a class in a file of your own."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from staff.errors import UserError
from staff.models.spec import ARCHITECTURES, is_sharded
from staff.runtime import processes
from staff.runtime.machine import without_cudnn_attention
from staff.runtime.progress import progress

if TYPE_CHECKING:
    from staff.evaluation.decoding import Answer
    from staff.store.cost import Meter

log = logging.getLogger(__name__)


class Generator(Protocol):
    """Answers prompts. Implementations are frozen dataclasses."""

    def key(self) -> dict[str, Any]:
        """Everything that the answers depend on besides the arguments of `generate`, as JSON holds it."""
        ...

    def generate(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        end_tokens: Iterable[int] = (),
        meter: Meter | None = None,
    ) -> list[list[int]]:
        """The new token ids for each prompt, in the order of the prompts, without end and padding tokens.

        Args:
            prompts: token ids of each prompt.
            end_tokens: end tokens in addition to those of the tokenizer and the model.
            meter: FLOPs and tokens are added to it.
        """
        ...


@dataclass(frozen=True)
class Greedy:
    """Greedy decoding, so that evaluations of the same weights agree.

    Attributes:
        batch_tokens: as in `generate`.
    """

    version: ClassVar[int] = 1

    batch_tokens: int | None = None

    def __post_init__(self) -> None:
        tokens = self.batch_tokens
        if tokens is not None and (type(tokens) is not int or tokens < 1):
            raise UserError(f"evaluation.batch_tokens={tokens!r} must be null or a whole number of at least 1.")

    def key(self) -> dict[str, Any]:
        return {"greedy": self.version}

    def generate(self, model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], **how: Any) -> list[list[int]]:
        return generate(model, tokenizer, prompts, batch_tokens=self.batch_tokens, **how)


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    batch_tokens: int | None,
    end_tokens: Iterable[int] = (),
    meter: Meter | None = None,
) -> list[list[int]]:
    """Continue each prompt greedily until an end token or `max_new_tokens`.

    In float32 the answers do not depend on `batch_tokens`. Sampling, beam and penalty settings in the model's
    generation configuration are ignored; its end tokens are used in addition to the tokenizer's. In a run of
    several processes each answers a shard of the prompts, and all return all answers.

    Args:
        model: a causal language model, with or without adapters.
        prompts: token ids of each prompt.
        batch_tokens: the limit of (longest prompt + max_new_tokens) x batch size; a longer prompt goes alone. None:
            32768 on a GPU, 8192 on a processor (results/benchmarks/README.md).
        end_tokens: further end tokens, such as a chat template's end of turn.
        meter: tokens without padding, and FLOPs of a forward pass over prompts and answers with logits at the
            generated tokens, are added to it. This is exact for linear layers. Attention counts up to twice its
            FLOPs, as in training, because a decoding step attends only to the past.

    Returns:
        The new token ids for each prompt, in the order of the prompts, without end and padding tokens.
    """
    # Adapters are inside the base model, whose generation configuration is used.
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config, stop = _greedy(tokenizer, base.generation_config, max_new_tokens, end_tokens)
    answers: dict[int, Answer] = {}
    with _generating(base, config), progress(len(processes.shard(list(prompts))), "answers") as bar:
        budget = batch_tokens or default_batch_tokens(base)
        for i, answer in _answers(base, config, stop, prompts, budget):
            answers[i] = answer
            bar.update(1)
    for others in processes.all_gather(answers):
        answers |= others
    if meter is not None:
        _count(meter, base.config, prompts, answers)
    return [answers[i].tokens for i in range(len(prompts))]


def default_batch_tokens(model: Any) -> int:
    """Tokens of a batch on the model's device (results/benchmarks/README.md)."""
    return 8192 if model.device.type == "cpu" else 32768


def _count(meter: Meter, config: Any, prompts: Sequence[Sequence[int]], answers: Mapping[int, Answer]) -> None:
    from staff.models.flops import forward_flops

    # The last generated token is not processed.
    processed = [len(prompts[i]) + answer.generated - 1 for i, answer in answers.items()]
    generated = [answer.generated for answer in answers.values()]
    meter.add(forward_flops(config, processed, generated), tokens_forward=sum(processed))


@contextmanager
def _generating(base: Any, config: Any) -> Iterator[None]:
    """The model answers with this configuration in the block, and an error ends all processes."""
    import torch

    own, was_training = base.generation_config, base.training
    base.generation_config = config
    base.eval()
    try:
        with processes.raise_on_all_ranks(not is_sharded(base)), torch.inference_mode(), without_cudnn_attention():
            yield
    finally:
        base.generation_config = own
        base.train(was_training)


def _answers(
    base: Any, config: Any, stop: set[int], prompts: Sequence[Sequence[int]], budget: int
) -> Iterator[tuple[int, Answer]]:
    """The answers to this process's prompts, by the prompts' positions: by our own loop where it is exact, else by
    `model.generate` on batches of similar length. The longest prompts come first, so that memory runs out at the
    start, if at all."""
    from staff.evaluation.decoding import can_decode, decode

    new, order = config.max_new_tokens, sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    if prompts and can_decode(base, len(prompts[order[0]]) + new):
        mine = {i: prompts[i] for i in processes.shard(order)}
        yield from decode(base, mine, max_new_tokens=new, stop=stop, batch_tokens=budget)
    else:
        unknown = base.config.model_type not in ARCHITECTURES and len(prompts) > 1
        # A number that is not finite is no answer either.
        if unknown and not _moved_by_padding(base, config, prompts[order[0]]) <= _tolerance(base):
            log.info("%s reads padding: prompts are answered one at a time", type(base).__name__)
            budget = 1
        for batch in _batches(prompts, order, new, budget, together=is_sharded(base)):
            yield from _answered(base, config, stop, {i: prompts[i] for i in batch}).items()


_reading: dict[str, bool] = {}


def reads_padding(config: Any) -> bool:
    """Whether models of this configuration read padding, by a small instance; False where none can be built."""
    if config.model_type in ARCHITECTURES:
        return False
    import torch
    from transformers import GenerationConfig

    from staff.scoring.exact import by_itself, randomise, reduced, small_instance

    small = reduced(config)
    known = json.dumps([type(config).__qualname__, small.to_dict()], sort_keys=True, default=str)
    if known not in _reading:
        try:
            with by_itself(), torch.no_grad():
                model = small_instance(small, ("sdpa", "eager")).float().eval()
                randomise(model)
                moved = _moved_by_padding(model, GenerationConfig(do_sample=False, pad_token_id=0), range(3, 9))
                _reading[known] = moved > _tolerance(model)
        except Exception as error:  # whatever a model's code may raise at sizes that it does not expect
            log.debug("no small instance of %s: %s", config.model_type, error)
            _reading[known] = False
    return _reading[known]


def _tolerance(base: Any) -> float:
    return 1e-3 if base.dtype.itemsize >= 4 else 0.1


def _moved_by_padding(base: Any, config: Any, prompt: Sequence[int]) -> float:
    """By how much the logits behind a prompt differ in a padded batch, by their spread: some recurrent models read
    padding."""
    import torch

    how = {"generation_config": copy.deepcopy(config), "output_logits": True, "return_dict_in_generate": True}
    how["generation_config"].max_new_tokens = 2
    prompt = prompt[:16]
    alone, beside = (
        torch.stack(base.generate(**_padded(base, config, rows), **how).logits)[:, 0].float()
        for rows in ([prompt], [prompt, [*prompt, *prompt[:3]]])
    )
    return float((alone[0] - beside[0]).abs().max() / alone[0].std())


def _padded(base: Any, config: Any, prompts: Collection[Sequence[int]]) -> dict[str, Any]:
    """Token ids and mask, padded on the left."""
    import torch

    width = max(len(prompt) for prompt in prompts)
    ids = torch.full((len(prompts), width), config.pad_token_id, device=base.device)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt, device=base.device)
        mask[row, width - len(prompt) :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _answered(base: Any, config: Any, stop: set[int], prompts: dict[int, Sequence[int]]) -> dict[int, Answer]:
    """The answers to a batch of prompts, by the prompts' keys."""
    from staff.evaluation.decoding import Answer

    read = _padded(base, config, prompts.values())
    width = read["input_ids"].shape[1]
    output = base.generate(**read, generation_config=config)
    answers = {}
    for i, row in zip(prompts, output[:, width:].tolist(), strict=True):
        # Padding comes only after an end token. Before one, the padding token is part of the answer.
        end = next((at for at, token in enumerate(row) if token in stop), len(row))
        answers[i] = Answer(row[:end], min(end + 1, len(row)))
    return answers


def _greedy(tokenizer: Any, own: Any, max_new_tokens: int, end_tokens: Iterable[int]) -> tuple[Any, set[int]]:
    """A configuration for greedy decoding, and all end tokens."""
    from transformers import GenerationConfig

    stop = end_tokens_of(tokenizer, own, end_tokens)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=sorted(stop), pad_token_id=pad
    )
    return config, stop


def end_tokens_of(tokenizer: Any, own: Any, others: Iterable[int]) -> set[int]:
    """All end tokens: the tokenizer's, those of the model's own generation configuration, and others."""
    ends = own.eos_token_id if isinstance(own.eos_token_id, list) else [own.eos_token_id]
    return {token for token in (tokenizer.eos_token_id, *ends, *others) if token is not None}


def _batches(
    prompts: Sequence[Sequence[int]], order: list[int], max_new_tokens: int, batch_tokens: int, together: bool
) -> list[list[int]]:
    """Positions of this process's prompts, in batches of similar length.

    With `together` all processes get the same number of batches; the last ones repeat the shortest prompt.
    """
    left, batches = processes.shard(order), []
    while left:
        size = max(1, batch_tokens // (len(prompts[left[0]]) + max_new_tokens))
        batches.append(left[:size])
        left = left[size:]
    most = max(processes.all_gather(len(batches))) if together else 0
    return batches + [order[-1:]] * (most - len(batches))
