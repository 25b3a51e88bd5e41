"""Answers: greedy decoding in batches is that of one prompt after the other; and answers in context."""

from __future__ import annotations

import copy
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.any_pool import AnyPool
from support.tiny import ARCHITECTURES as IN_CONTEXT
from support.tiny import planted_pool, random_model
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.models.llama import LlamaConfig, LlamaForCausalLM

from baselines.within_groups import GroupPool
from staff.errors import UserError
from staff.evaluation.behind import answers_behind, before
from staff.evaluation.decoding import can_decode
from staff.evaluation.generator import generate
from staff.evaluation.in_context import AnswersInContext
from staff.evaluation.metrics import named_metric
from staff.models.flops import forward_flops
from staff.models.spec import ARCHITECTURES
from staff.store.cost import Meter

# ---------------------------------------------------------------- greedy decoding


CONFIG = LlamaConfig(
    vocab_size=97,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=128,
    initializer_range=0.3,
)
PROMPTS = [[(7 * i + j) % 90 + 5 for j in range(3 + 5 * (i % 4))] for i in range(11)]
TOKENIZER = SimpleNamespace(eos_token_id=2, pad_token_id=0)


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(copy.deepcopy(CONFIG))


@torch.no_grad()
def one_at_a_time(model: Any, prompt: list[int], stop: set[int], max_new_tokens: int) -> list[int]:
    """Greedy decoding as the textbook has it: no cache, no padding, no batch."""
    tokens = list(prompt)
    for _ in range(max_new_tokens):
        token = int(model(torch.tensor([tokens])).logits[0, -1].argmax())
        if token in stop:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
def test_generation_equals_greedy_decoding_one_at_a_time_whatever_the_batch_size(model, batch_tokens):
    expected = [one_at_a_time(model, prompt, {2}, 12) for prompt in PROMPTS]
    assert generate(model, TOKENIZER, PROMPTS, max_new_tokens=12, batch_tokens=batch_tokens) == expected


def test_generation_stops_at_the_end_tokens_of_tokenizer_and_model_and_leaves_them_out(model):
    free = one_at_a_time(model, PROMPTS[1], set(), 12)
    first, second = free[3], free[6]
    tokenizer = SimpleNamespace(eos_token_id=second, pad_token_id=None)
    assert second not in free[:6] and first not in free[:3]
    assert generate(model, tokenizer, PROMPTS[1:2], max_new_tokens=12, batch_tokens=100) == [free[:6]]
    model.generation_config.eos_token_id = [first, 95]
    assert generate(model, tokenizer, PROMPTS[1:2], max_new_tokens=12, batch_tokens=100) == [free[:3]]


def test_a_token_that_pads_stays_where_the_model_wrote_it_and_goes_behind_the_end(model):
    free = {i: one_at_a_time(model, PROMPTS[i], set(), 12) for i in range(len(PROMPTS))}
    written = free[1][2]
    expected = [one_at_a_time(model, prompt, {2}, 12) for prompt in PROMPTS]
    assert any(written in answer for answer in expected)
    tokenizer = SimpleNamespace(eos_token_id=2, pad_token_id=written)
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=12, batch_tokens=10_000) == expected
    # As the end token, or as padding behind the end of a batch's shorter answers, it is no part of an answer.
    end = next(token for answer in free.values() for token in answer[3:9] if token not in answer[:3])
    expected = [one_at_a_time(model, prompt, {end, 2}, 12) for prompt in PROMPTS]
    assert len({len(answer) for answer in expected}) > 1
    for pad in (end, written):
        tokenizer = SimpleNamespace(eos_token_id=end, pad_token_id=pad)
        assert generate(model, tokenizer, PROMPTS, max_new_tokens=12, batch_tokens=10_000) == expected


def test_sampling_settings_of_a_model_change_nothing_warn_of_nothing_and_are_kept(model, caplog, recwarn):
    expected = generate(model, TOKENIZER, PROMPTS, max_new_tokens=8, batch_tokens=200)
    own = GenerationConfig(
        do_sample=True, temperature=0.6, top_p=0.9, top_k=20, repetition_penalty=1.3, max_length=4, num_beams=2
    )
    model.generation_config = own
    model.train()
    transformers_log = logging.getLogger("transformers")
    transformers_log.addHandler(caplog.handler)
    try:
        assert generate(model, TOKENIZER, PROMPTS, max_new_tokens=8, batch_tokens=200) == expected
    finally:
        transformers_log.removeHandler(caplog.handler)
    assert not caplog.records and not recwarn.list
    assert model.generation_config is own and model.training


def test_adapters_take_part_in_generation(model):
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    expected = [one_at_a_time(adapted, prompt, {2}, 8) for prompt in PROMPTS]
    assert generate(adapted, TOKENIZER, PROMPTS, max_new_tokens=8, batch_tokens=100) == expected
    with adapted.disable_adapter():
        assert generate(adapted, TOKENIZER, PROMPTS, max_new_tokens=8, batch_tokens=100) != expected


@pytest.mark.parametrize("window", [16, 64])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_answers_as_greedy_decoding_one_at_a_time(architecture, window):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 8, "vocab_size": 97}
    config = AutoConfig.for_model(
        architecture, **shape, num_hidden_layers=2, num_key_value_heads=2, pad_token_id=0, initializer_range=0.3
    )
    if getattr(config, "sliding_window", None):
        config.sliding_window = window  # shorter or longer than the longest prompt and answer
    torch.manual_seed(0)
    # Gemma 2 caps attention's logits, which PyTorch's kernels cannot.
    attention = "eager" if architecture == "gemma2" else "sdpa"
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    slides = window == 16 and architecture in ("mistral", "gemma3_text")
    assert can_decode(model, 30) == (not slides and architecture != "gemma2")
    expected = [one_at_a_time(model, prompt, {2}, 12) for prompt in PROMPTS[:6]]
    assert generate(model, TOKENIZER, PROMPTS[:6], max_new_tokens=12, batch_tokens=90) == expected


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_passes_keep_to_the_token_budget(model, attention):
    """Of our own loop, and of `model.generate`, which answers with attention that is not PyTorch's."""
    model.set_attn_implementation(attention)
    prefills, steps = [], []

    def watch(_: Any, args: Any, inputs: Any) -> None:
        rows, width = inputs["input_ids"].shape
        seen = width if inputs.get("attention_mask") is None else inputs["attention_mask"].shape[-1]
        (steps if width == 1 else prefills).append((rows, seen))

    model.register_forward_pre_hook(watch, with_kwargs=True)
    generate(model, TOKENIZER, PROMPTS, max_new_tokens=4, batch_tokens=50)
    assert sum(rows for rows, _ in prefills) == len(PROMPTS)
    assert all(rows * width <= 50 for rows, width in prefills + steps)
    assert max(rows for rows, _ in steps) > 1


def test_answers_that_have_ended_take_no_part_in_further_steps(model):
    end = one_at_a_time(model, PROMPTS[0], set(), 12)[5]
    expected = [one_at_a_time(model, prompt, {end, 2}, 12) for prompt in PROMPTS]
    generated = [min(len(answer) + 1, 12) for answer in expected]
    assert len(set(generated)) > 2
    rows = []
    model.register_forward_pre_hook(lambda _, args, inputs: rows.append(len(inputs["input_ids"])), with_kwargs=True)
    tokenizer = SimpleNamespace(eos_token_id=end, pad_token_id=0)
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=12, batch_tokens=100) == expected
    assert sum(rows) == sum(generated)


def test_the_meter_hears_of_real_tokens_only(model):
    meter = Meter()
    tokenizer = SimpleNamespace(eos_token_id=96, pad_token_id=0)
    written = generate(model, tokenizer, PROMPTS, max_new_tokens=5, batch_tokens=10_000, meter=meter)
    generated = [min(len(row) + 1, 5) for row in written]
    processed = [len(prompt) + n - 1 for prompt, n in zip(PROMPTS, generated, strict=True)]
    assert meter.cost.tokens_forward == sum(processed) and meter.cost.tokens_backward == 0
    assert meter.cost.flops == forward_flops(CONFIG, processed, generated)


def test_nothing_to_generate_is_no_error(model):
    assert generate(model, TOKENIZER, [], max_new_tokens=5, batch_tokens=100, meter=Meter()) == []


# ---------------------------------------------------------------- in context


# ---------------------------------------------------------------- answers and attention


@pytest.mark.parametrize("view", ["pool", "dev"])
def test_answers_and_attention_are_those_of_single_prompts(view: str, tmp_path: Path):
    planted = planted_pool(tmp_path, size=6, dev=3)
    shown, asked = np.array([[0, 4], [5, -1]]), np.array([[1, 2], [7, -1]])
    found = planted.ask("in_context", of="target", view=view, demonstrations=shown, queries=asked, metric="rougeL")
    assert found.shape == (2, 4) and np.isnan(found[1, 1]) and np.isnan(found[1, 3])
    spec = planted.family.target
    target, tokenizer = spec.load(), spec.tokenizer()
    eager = replace(spec, attention="eager").load()
    blank = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    samples, of = planted.slices["pool"].target, planted.slices[view].target
    for e, demonstrations in enumerate([[0, 4], [5]]):
        attention = []
        for i, query in enumerate(asked[e][asked[e] >= 0] % len(of)):
            row, prompt = [samples.row(0)[0]], []
            for j in demonstrations:
                start = len(row)
                row += [*samples.row(j)[1:-1], *blank]
                prompt.append(range(start, len(row)))
            row += of.row(query)[1 : of.prompt_lengths[query]].tolist()
            tokens = torch.tensor([row])
            new = int(max(of.answer_lengths[q] for q in asked[asked >= 0] % len(of)))
            answer = target.generate(tokens, do_sample=False, max_new_tokens=new)[0, len(row) :].tolist()
            answer = answer[: answer.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in answer else answer
            text = tokenizer.decode(before(answer, blank)).strip()
            reference = tokenizer.decode(of.row(query)[of.prompt_lengths[query] : -1]).strip()
            assert found[e, 2 + i] == pytest.approx(named_metric("rougeL").measure([text], [(reference,)])[0])
            answer = before(answer, blank)
            weights = eager(torch.tensor([[*row, *answer]]), output_attentions=True).attentions[2][0]
            received = weights[:, len(row) :].mean((0, 1)).detach().numpy()
            attention.append([received[span].mean() for span in prompt])
        np.testing.assert_allclose(found[e, : len(demonstrations)], np.mean(attention, axis=0), rtol=1e-4)


@pytest.mark.parametrize("architecture", IN_CONTEXT)
def test_queries_behind_one_prefix_are_answered_and_attend_as_if_each_stood_alone(architecture: str):
    model = random_model(architecture, attn_implementation="eager").eval()
    prefixes = [[5, 6, 7, 8, 9], [10, 11, 12, 13, 14, 15, 16, 17, 18]]
    queries = [[[20, 21], [22]], [[23, 24, 25, 26]]]
    alone = []
    for prefix, of in zip(prefixes, queries):
        alone += [
            (len(prefix), [*prefix, *query], one_at_a_time(model, [*prefix, *query], set(), 6)) for query in of
        ]
    stop, separator = {alone[0][2][3]}, alone[2][2][2:4]
    found = answers_behind(model, 1, prefixes, queries, 6, stop, separator)
    for (length, prompt, answer), ours in zip(alone, found, strict=True):
        end = next((at for at, token in enumerate(answer) if token in stop), len(answer))
        answer = before(answer[:end], separator)
        assert ours.tokens == answer
        if answer:
            weights = model(torch.tensor([[*prompt, *answer]]), output_attentions=True).attentions[1][0]
            received = weights[:, len(prompt) :, :length].mean((0, 1)).detach().numpy()
            np.testing.assert_allclose(ours.attention, received, rtol=1e-4, atol=1e-7)
    assert len({len(ours.tokens) for ours in found}) > 1


def test_a_prefix_is_read_once_for_all_its_queries_and_the_meter_hears_of_what_is_read(tmp_path: Path, monkeypatch):
    planted, read = planted_pool(tmp_path / "store", size=6, dev=3), []
    (state,) = planted.states("target")
    model = state.load()
    model.register_forward_pre_hook(
        lambda _, args, inputs: read.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    monkeypatch.setattr(type(state), "load", lambda self: model)
    samples, of = planted.slices["pool"].target, planted.slices["dev"].target
    for queries in ([[1, -1, -1]], [[1, 1, 1]]):
        read.clear()
        asked = np.array([[0, 4]]), np.array(queries), named_metric("exact"), [30]
        stage = AnswersInContext(state, samples, of, *asked)
        with Meter() as ran, Meter() as planned:
            stage.run(tmp_path, ran)
            stage.estimate(tmp_path, planned)
        assert ran.cost.tokens_forward == sum(read)
        assert read[0] == samples.lengths[[0, 4]].sum() - samples.begin
        assert read[1] == (of.prompt_lengths[1] - of.begin) * (np.array(queries) >= 0).sum()
        assert ran.cost.flops <= planned.cost.flops and sum(read) <= planned.cost.tokens_forward


def test_an_answer_ends_where_the_next_sample_would_begin():
    assert before([5, 6, 30, 31, 7], [30, 31]) == [5, 6] and before([30, 31], [30, 31]) == []
    assert before([5, 30], [30, 31]) == [5, 30] and before([5], None) == [5]


def test_what_cannot_be_read_in_context_is_refused_before_a_model_loads(tmp_path: Path):
    planted = planted_pool(tmp_path)
    plan: dict[str, Any] = {"demonstrations": np.array([[0]]), "queries": np.array([[1]])}
    with pytest.raises(UserError, match=r"metric='nll' measures no answers"):
        planted.ask("in_context", of="target", metric="nll", **plan)
    for layer in (4, -1, "last"):
        with pytest.raises(UserError, match=r"is not a block of target: choose 0 to 3, or null"):
            planted.ask("in_context", of="target", layer=layer, **plan)
    assert {folder.name for folder in tmp_path.iterdir()} <= {"locks", "tmp", "attempts"}


def test_evaluations_inside_a_group_are_of_its_samples():
    whole, members = AnyPool(6), np.array([4, 1, 5])
    shown, asked = np.array([[0, 2], [1, -1]]), np.array([[3], [-1]])
    part = GroupPool(whole, members)  # type: ignore[arg-type]
    for view, queries in (("pool", [[4], [-1]]), ("dev", [[3], [-1]])):
        ours = part.ask("in_context", "target", view=view, demonstrations=shown, queries=asked)
        same = {"demonstrations": np.array([[4, 5], [1, -1]]), "queries": np.array(queries)}
        np.testing.assert_array_equal(ours, whole.ask("in_context", "target", view=view, **same))
