"""What passes cost and how they attend: memory, FLOPs, and the choice of an attention."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny import FAMILIES, SETTINGS, config_of, drawn, told_and_peak
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from staff.data.tokens import TokenizedSamples
from staff.errors import UserError
from staff.evaluation.generator import generate
from staff.models.adapters import LoraSpec, fresh_lora
from staff.models.flops import _counted, forward_flops
from staff.models.spec import ModelSpec
from staff.scoring.passes import score_samples
from staff.scoring.positions import Positions, last_block_at, token_losses
from staff.signals.loss import Loss
from staff.store.store import Store
from staff.training import memory
from staff.training.memory import check_fits, finetuning_memory
from staff.training.settings import FinetuneSettings
from staff.training.stage import Finetune
from staff.training.trainer import checkpoint_blocks

# ---------------------------------------------------------------- memory


SAMPLES, TOKENS, ANSWERS = 2, 256, 8
LENGTHS = np.full(SAMPLES, TOKENS), np.full(SAMPLES, ANSWERS)


def kept_for_backward(spec: ModelSpec, settings) -> int:
    """Bytes that autograd keeps of one forward pass, but for the weights."""
    model = spec.load()
    model = fresh_lora(model, settings.lora, 0).train() if settings.kind == "lora" else model.float().train()
    if settings.gradient_checkpointing:
        checkpoint_blocks(model)
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    ids = torch.randint(3, 90, (SAMPLES, TOKENS))
    labels = torch.full_like(ids, -100)
    labels[:, -ANSWERS:] = ids[:, -ANSWERS:]
    at = Positions.of_predictions(labels)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bfloat16")
    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, autocast, last_block_at(model, at):
        loss = token_losses(model(input_ids=ids, use_cache=False).logits[0], at.targets).sum()
    assert loss.requires_grad
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma", "gemma2", "gemma3_text"])
def test_activations_are_what_autograd_keeps_within_a_fifth(architecture, dtype, kind, tmp_path):
    spec = drawn(architecture, dtype, tmp_path)
    settings = replace(SETTINGS, precision=dtype, kind=kind, batch_size=SAMPLES, device_batch_size=SAMPLES)
    told = finetuning_memory(spec, settings, *LENGTHS)
    copies = spec.shapes().num_parameters() * 2 if (kind, dtype) == ("full", "bfloat16") else 0
    assert told.activations == pytest.approx(kept_for_backward(spec, settings) - copies, rel=0.2)
    again = replace(settings, gradient_checkpointing=True)
    assert kept_for_backward(spec, again) - copies < finetuning_memory(spec, again, *LENGTHS).activations
    assert finetuning_memory(spec, again, *LENGTHS).activations < 0.5 * told.activations


@pytest.mark.parametrize(
    ("architecture", "dtype", "kind", "checkpointing"),
    [  # all others: tests/stress/test_methods.py
        ("llama", "bfloat16", "lora", False),
        ("llama", "float32", "full", True),
        ("qwen3", "float32", "lora", False),
        ("gemma2", "float32", "lora", False),
    ],
)
def test_the_estimate_is_the_measured_peak_within_a_tenth(
    architecture, dtype, kind, checkpointing, tmp_path, monkeypatch
):
    changes = {"kind": kind, "gradient_checkpointing": checkpointing}
    told, peak = told_and_peak(architecture, dtype, tmp_path, monkeypatch, **changes)
    assert told == pytest.approx(peak, rel=0.1)


def test_weights_adapters_and_optimiser_are_counted_from_shapes():
    target = ModelSpec("pkg://staff/assets/tiny/target")
    model = target.load()
    told = finetuning_memory(target, SETTINGS, *LENGTHS)
    assert told.weights == 4 * model.num_parameters()
    adapters = sum(p.numel() for p in fresh_lora(model, SETTINGS.lora, 0).parameters() if p.requires_grad)
    assert told.training == 12 * adapters, "gradients come when activations go"
    full = finetuning_memory(target, replace(SETTINGS, kind="full"), *LENGTHS)
    assert full.training == 8 * target.shapes().num_parameters()
    in_parts = replace(SETTINGS, batch_size=8, device_batch_size=4)
    assert finetuning_memory(target, in_parts, *LENGTHS).training == 16 * adapters, "of the earlier parts"
    four_bits = finetuning_memory(replace(target, quantization="nf4"), SETTINGS, *LENGTHS)
    assert 0.125 < four_bits.weights / told.weights < 0.5, "embeddings, which are much of so small a model, stay"


LONG = TokenizedSamples.of_rows(list("abcdefgh"), [[5] * 300] * 8, [250] * 8)
SMALLEST = {"gradient_checkpointing": True, "device_batch_size": 1}


@pytest.mark.parametrize(
    ("changes", "mend"),
    [
        ({"device_batch_size": 4}, "it would fit with finetune.device_batch_size=4"),
        (SMALLEST, "it would fit with finetune.gradient_checkpointing=true finetune.device_batch_size=1"),
        ({**SMALLEST, "max_length": 75}, r"it would fit with .*finetune.max_length=\d+"),
        (None, "and so would no other setting: choose a smaller model or a larger device"),
    ],
)
def test_what_does_not_fit_is_refused_with_settings_that_would(monkeypatch, changes, mend):
    spec, lengths = ModelSpec("pkg://staff/assets/tiny/target"), (LONG.lengths, LONG.answer_lengths)
    settings = replace(SETTINGS, batch_size=8, device_batch_size=8)
    available = 0 if changes is None else finetuning_memory(spec, replace(settings, **changes), *lengths).total
    monkeypatch.setattr(ModelSpec, "weights", lambda *args, **options: pytest.fail("a model was loaded"))
    monkeypatch.setattr(memory, "available_memory", lambda: available)
    with pytest.raises(UserError, match=rf"fine-tuning target needs about .* GiB are free: {mend}"):
        check_fits(spec, LONG, settings)


def test_what_fits_is_not_refused(monkeypatch):
    spec = ModelSpec("pkg://staff/assets/tiny/target")
    needed = finetuning_memory(spec, SETTINGS, LONG.lengths, LONG.answer_lengths).total
    monkeypatch.setattr(memory, "available_memory", lambda: needed)
    check_fits(spec, LONG, SETTINGS)


def test_a_run_that_does_not_fit_is_refused_before_a_model_loads(run, monkeypatch):
    monkeypatch.setattr(ModelSpec, "weights", lambda *args, **options: pytest.fail("a model was loaded"))
    monkeypatch.setattr(memory, "available_memory", lambda: 0)
    with pytest.raises(UserError, match="and so would no other setting"):
        run("method=random")


# ---------------------------------------------------------------- FLOPs


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


def test_the_flops_of_an_embedding_narrower_than_the_blocks_are_those_of_a_real_pass():
    """As OPT-350m has it: projections in and out, norms behind the blocks, and a head of the embedding's width."""
    config = config_of("opt", word_embed_proj_dim=12, do_layer_norm_before=False)
    assert forward_flops(config, [37]) == pytest.approx(counted(config, 37), rel=1e-6)
    head = 2 * 12 * config.vocab_size
    assert forward_flops(config, [37]) - forward_flops(config, [37], 5) == 32 * head


def hybrid(family: str, **fields: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 100}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}
    return AutoConfig.for_model(family, **sizes, **heads, **fields)


def test_the_flops_of_a_hybrid_are_those_of_a_real_pass_or_unknown():
    convolutions = hybrid("lfm2", layer_types=["conv", "full_attention"], block_multiple_of=8)
    assert forward_flops(convolutions, [37, 80]) == counted(convolutions, 37) + counted(convolutions, 80)
    by_chunks = hybrid("bamba", mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, attn_layer_indices=[1])
    assert math.isnan(forward_flops(by_chunks, [37]))  # whose last chunk is padded


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


# ---------------------------------------------------------------- attention


TINY = ModelSpec("pkg://staff/assets/tiny/small")
TWO_SAMPLES = TokenizedSamples.of_rows(["a", "b"], [[5, 6, 7, 8], [9, 10, 11]], [2, 1])


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> set[bool]:
    """Whether cuDNN's attention is enabled, asked in every forward pass of a model."""
    found: set[bool] = set()
    forward = torch.nn.Embedding.forward

    def asking(self: Any, ids: Any) -> Any:
        found.add(torch.backends.cuda.cudnn_sdp_enabled())
        return forward(self, ids)

    monkeypatch.setattr(torch.nn.Embedding, "forward", asking)
    return found


def test_scoring_leaves_it_out(seen: set[bool]):
    score_samples(TINY.load(), TWO_SAMPLES, [Loss()], batch_tokens=None, pad_token_id=0)
    assert seen == {False} and torch.backends.cuda.cudnn_sdp_enabled()


def test_fine_tuning_leaves_it_out(seen: set[bool], tmp_path: Path):
    settings = FinetuneSettings(lora=LoraSpec(2, 4), batch_size=2, device_batch_size=2)
    Store(tmp_path).get(Finetune(TINY, TWO_SAMPLES, settings, 1, 0))
    assert seen == {False} and torch.backends.cuda.cudnn_sdp_enabled()


def test_generation_leaves_it_out(seen: set[bool]):
    generate(TINY.load(), TINY.tokenizer(), [[5, 6], [7]], max_new_tokens=2, batch_tokens=None)
    assert seen == {False} and torch.backends.cuda.cudnn_sdp_enabled()


HOLDS = """
import mmap
from staff.store.cost import Meter

def hold(megabytes):
    with mmap.mmap(-1, megabytes << 20) as memory:
        for page in range(0, len(memory), mmap.PAGESIZE):
            memory[page] = 1

with Meter() as large:
    hold(120)
with Meter() as small, small.paused():
    hold(120)
print(large.cost.peak_memory_bytes - small.cost.peak_memory_bytes)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak can be reset on Linux only")
def test_peak_memory_is_that_of_the_block_without_its_pauses():
    """In a process of its own, and past its allocator: what others have left behind in either is no part of it."""
    difference = subprocess.run([sys.executable, "-c", HOLDS], capture_output=True, text=True, check=True).stdout
    assert 100e6 < int(difference) < 140e6
