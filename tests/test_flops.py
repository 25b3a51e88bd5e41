"""FLOPs are those of torch's counter, whatever the family, or unknown."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from support.families import FAMILIES, config_of
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from staff.models.flops import _counted, forward_flops

WIDTHS = ("hidden_size", "intermediate_size", "n_embd", "ffn_dim", "moe_intermediate_size", "word_embed_proj_dim")


def counted(config: Any, length: int) -> float:
    """FLOPs of a real forward pass; of experts, one token after the other."""
    config = copy.deepcopy(config)
    config._experts_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(5, 5 + length)[None], use_cache=False)
    return counter.get_total_flops()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_flops_of_every_family_are_those_of_a_real_pass(family: str):
    config = config_of(family)
    assert forward_flops(config, [37]) == pytest.approx(counted(config, 37), rel=1e-6)
    assert forward_flops(config, [20, 37]) == pytest.approx(counted(config, 20) + counted(config, 37), rel=1e-6)


@pytest.mark.parametrize("family", ["gpt2", "mixtral", "qwen3_moe", "mamba"])
def test_a_wider_model_takes_more_flops(family: str):
    before = forward_flops(config_of(family), [30])
    for width in WIDTHS:
        if width in FAMILIES[family]:
            wider = {width: 2 * FAMILIES[family][width]}
            assert forward_flops(config_of(family, **wider), [30]) > 1.02 * before, width


def test_flops_that_cannot_be_counted_are_unknown_and_not_a_number(monkeypatch: pytest.MonkeyPatch):
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("no meta kernel")

    _counted.cache_clear()
    monkeypatch.setattr(AutoModelForCausalLM, "from_config", fails)
    assert math.isnan(forward_flops(config_of("opt"), [30]))
    _counted.cache_clear()
