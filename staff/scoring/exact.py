"""Whether models can be scored exactly in batches: by their modules, and by a test on a small instance.

The instance has the configuration's depth and kinds of layers, which may differ from one another, at small widths.
Its samples of different lengths are scored in one padded batch and one at a time.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from staff.data.tokens import TokenizedSamples
from staff.models.weights import attention_of
from staff.scoring.signal import GradientOf, Pass, Signal

log = logging.getLogger(__name__)

TOLERANCE = 1e-4
"""Largest difference between batched and single values, by the largest value. The instance is in float64, and
float32 inside norms and rotations leaves about 1e-6."""

NARROWED, WHOLE = "narrowed", "whole"
"""How the last block's attention runs in exact batches: its queries at the positions read, or in full."""

LENGTHS = ((5, 3), (9, 4), (2, 2))
"""Tokens of the prompt and of the answer of the instance's samples."""

SMALL = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 16}
SMALL |= {"sliding_window": 4, "attention_chunk_size": 4, "lru_width": 64, "moe_intermediate_size": 48}
LARGEST = 50_000_000
"""Parameters of an instance; one with more is not built."""

_found: dict[str, str | None] = {}


def batches(config: Any) -> str | None:
    """How models of this configuration are scored exactly in batches; None: only one sample at a time.

    A configuration is tested when it is first met in a process, which takes about a second or less.
    """
    if way := getattr(config, "_tested_way", None):  # an instance, during its test
        return way
    small, own = reduced(config), attention_of(config)
    attentions = [own] if own in ("sdpa", "eager") else ["sdpa", "eager"]
    known = json.dumps([type(config).__qualname__, attentions, small.to_dict()], sort_keys=True, default=str)
    if known not in _found:
        try:
            with by_itself(), torch.enable_grad():
                _found[known] = _tested(small, attentions)
        except Exception as error:  # whatever a model's code may raise at sizes that it does not expect
            _found[known] = None
            reason = (str(error).splitlines() or [""])[0][:100] or type(error).__name__
            log.info("model type %r is scored and trained without exact batches: %s", config.model_type, reason)
    return _found[known]


@contextmanager
def by_itself() -> Iterator[None]:
    """Computing as nothing around it does: no inference mode or autocast, and random numbers from a seed."""
    with (
        torch.inference_mode(False),
        torch.autocast("cpu", enabled=False),
        torch.random.fork_rng(devices=[]),
        torch.device("cpu"),
    ):
        torch.manual_seed(0)
        yield


def reduced(config: Any) -> Any:
    """The same configuration at small widths, without names of files and versions."""
    small = copy.deepcopy(config)
    heads, shared = (getattr(config, f"num_{kind}_heads", None) for kind in ("attention", "key_value"))
    for name, width in SMALL.items():
        if isinstance(getattr(small, name, None), int):
            with suppress(AttributeError):  # a property
                setattr(small, name, width)
    if shared is not None:
        small.num_key_value_heads = 4 if shared == heads else min(2, shared)
    if "dynamic" in str(getattr(small, "rope_parameters", None)):
        small.max_position_embeddings = 8  # frequencies change behind this position
    small.bos_token_id, small.eos_token_id, small.pad_token_id = 1, 2, 0
    small.use_cache, small.dtype, small.architectures, small._name_or_path = False, None, None, ""
    return small


def _tested(config: Any, attentions: list[str]) -> str:
    """How the instance of this configuration is scored exactly.

    Raises:
        ValueError: it is not, with the reason; or any error of its code.
    """
    from peft import LoraConfig, get_peft_model

    apart = float("inf")
    for way in (NARROWED, WHOLE):
        model = small_instance(config, attentions, _check_blocks)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["v_proj"]))
        randomise(model)
        model.config._tested_way = way
        try:
            apart = _difference(model)
        except Exception:
            if way == WHOLE:
                raise
        if apart <= TOLERANCE:
            return way
    raise ValueError(f"values of a small instance differ by {apart:.1g} in a batch")


def small_instance(config: Any, attentions: Sequence[str], check: Callable[[Any], None] | None = None) -> Any:
    """A model of this configuration, with the first of these attentions that it has.

    Args:
        check: raises an error for a model, given without its weights, that is not to be built.
    """
    from transformers import AutoModelForCausalLM

    build, attention = partial(AutoModelForCausalLM.from_config, dtype=torch.float64), attentions[0]
    for attention in attentions:
        try:
            with torch.device("meta"):
                shape = build(copy.deepcopy(config), attn_implementation=attention)
        except ValueError:
            if attention == attentions[-1]:
                raise
            continue
        if check is not None:
            check(shape)
        if shape.num_parameters() > LARGEST:
            raise ValueError("a small instance would be large")
        break
    return build(copy.deepcopy(config), attn_implementation=attention)


def randomise(model: Any) -> None:
    """Give a model random weights by which activations are of order one."""
    for weight in model.parameters():
        spread = weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.2
        nn.init.normal_(weight, 0 if weight.ndim > 1 else float(weight.detach().mean()), spread)


def _check_blocks(model: Any) -> None:
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = getattr(model.get_decoder(), "layers", None)
    attention = getattr(layers[-1], "self_attn", None) if layers else None
    if not all(isinstance(getattr(attention, f"{kind}_proj", None), nn.Linear) for kind in "qkvo"):
        raise ValueError("no separate linear q_proj, k_proj, v_proj and o_proj")
    assert layers is not None
    linear = {id(m.weight) for m in layers.modules() if isinstance(m, nn.Linear)}
    if any(p.ndim > 1 and id(p) not in linear for p in layers.parameters()):
        raise ValueError("weights outside linear layers")
    if not isinstance(layers[-1], GradientCheckpointingLayer):
        raise ValueError("blocks that cannot be run again")


@dataclass(frozen=True)
class _Both(Signal):
    """A sample's loss and the norm of its gradient, (B, 2)."""

    name = "both"
    gradient: GradientOf | None = None

    def compute(self, batch: Pass) -> Tensor:
        from staff.scoring.gradients import SquaredNorm
        from staff.scoring.positions import token_losses

        at = batch.positions("predictions")
        losses = at.mean(token_losses(batch.logits_at(at), at.targets))
        return torch.stack([losses, batch.gradients.reduce(SquaredNorm()).sqrt()], 1)


def _difference(model: Any) -> float:
    """The largest difference of losses and gradient norms in a batch from those one at a time, relative."""
    from staff.scoring.passes import runner
    from staff.scoring.positions import scoring_mode

    drawn, largest = np.random.default_rng(0), 0.0
    rows = [drawn.integers(3, SMALL["vocab_size"], prompt + answer).tolist() for prompt, answer in LENGTHS]
    samples = TokenizedSamples.of_rows([*"abc"], rows, [prompt for prompt, _ in LENGTHS])
    for parameters in ("last_v_b", "all_lora", "all_linear"):
        if parameters == "all_linear":
            model = model.merge_and_unload()
        signals = [_Both(gradient=GradientOf(parameters))]
        with scoring_mode(model):
            together = runner(model, signals, 0)(samples)["both"]
            run = runner(model, signals, 0, one_at_a_time=True)
            alone = torch.cat([run(samples.take([i]))["both"] for i in range(len(rows))])
        apart = ((together - alone).abs().amax(0) / alone.abs().amax(0).clamp_min(1e-30)).max()
        largest = max(largest, float(apart.nan_to_num(torch.inf)))
    return largest
