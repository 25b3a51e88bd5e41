"""Answers and their metrics."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
from collections.abc import Sequence
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import pytest
import sacrebleu
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.models.llama import LlamaConfig, LlamaForCausalLM

from staff.data.samples import Sample
from staff.errors import UserError
from staff.evaluation import metrics
from staff.evaluation.decoding import can_decode
from staff.evaluation.generator import generate
from staff.evaluation.metrics import NAMED, check_metrics, named_metric
from staff.evaluation.metrics.numbers import final_number
from staff.models.flops import forward_flops
from staff.models.spec import ARCHITECTURES
from staff.store.cost import Meter

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

OF_ANSWERS = [name for name in NAMED if named_metric(name).needs == "answers"]


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


PREDICTIONS = ["The cats sat on the mats.", "", "He paid 12 dollars."]
REFERENCES = [("A cat is here.", "The cat sat on the mat."), ("something",), ("He paid 12 dollars.",)]


def measure(names: Sequence[str], predictions: Sequence[str], references: Any) -> Any:
    return metrics.measure([named_metric(name) for name in names], predictions, references)


def test_rouge_is_stemmed_and_takes_the_best_reference_and_the_headline_is_the_mean():
    headline, table = measure(["rouge1", "rouge2", "rougeL"], PREDICTIONS, REFERENCES)
    assert table.shape == (3, 3)
    assert table["rougeL"].tolist() == pytest.approx([100, 0, 100])  # cats -> cat, mats -> mat
    assert headline == pytest.approx(dict.fromkeys(table, 200 / 3))


def test_rouge_l_of_a_case_counted_by_hand():
    # common subsequence "police the" or "police gunman": 2 of 4 words on both sides
    headline, _ = measure(["rougeL"], ["police kill the gunman"], [("the gunman killed police",)])
    assert headline["rougeL"] == pytest.approx(50)
    headline, _ = measure(["rouge1", "rouge2"], ["a b c d"], [("a b x",)])
    assert headline == pytest.approx({"rouge1": 100 * 4 / 7, "rouge2": 100 * 2 / 5})


def test_the_headline_of_bleu_and_chrf_is_the_corpus_value_over_all_references():
    headline, table = measure(["bleu", "chrf"], PREDICTIONS, REFERENCES)
    streams = [[r[0] for r in REFERENCES], [r[1] if len(r) > 1 else None for r in REFERENCES]]
    assert headline["bleu"] == pytest.approx(sacrebleu.corpus_bleu(PREDICTIONS, streams).score)
    assert headline["chrf"] == pytest.approx(sacrebleu.corpus_chrf(PREDICTIONS, streams).score)
    assert table.loc[1].tolist() == [0, 0]
    assert table.loc[2].tolist() == pytest.approx([100, 100])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("She has 3 + 4 = <<3+4=7>>7 apples.\n#### 7", "7"),
        ("#### $1,234.50.", "1234.5"),
        ("#### 18\n\nQuestion: what is 5?", "18"),
        ("The answer is 1,200.", "1200"),
        ("10-4 leaves 6, so 10-4", "4"),
        ("it fell to -$3.", "-3"),
        ("it fell to $-3", "-3"),
        ("half is .5", "0.5"),
        ("####", None),
        ("", None),
    ],
)
def test_the_final_number_is_found(text, number):
    assert final_number(text) == (None if number is None else Decimal(number))


def test_macro_f1_weighs_every_class_alike_and_a_constant_answer_scores_little():
    classes = [("yes",), ("yes",), ("yes",), ("no",), ("maybe",)]
    answers = ["Yes.", "yes", "no", "no", "of course"]
    headline, table = measure(["accuracy", "macro_f1"], answers, classes)
    assert table["accuracy"].tolist() == table["macro_f1"].tolist() == [100, 100, 0, 100, 0]
    assert headline["accuracy"] == 60
    assert headline["macro_f1"] == pytest.approx((2 * 2 / (3 + 2) + 2 * 1 / (1 + 2) + 0) / 3 * 100)
    headline, _ = measure(["accuracy", "macro_f1"], ["yes"] * 5, classes)
    assert headline == {"accuracy": 60, "macro_f1": pytest.approx(2 * 3 / (3 + 5) / 3 * 100)}


def test_exact_match_compares_numbers_not_text():
    headline, table = measure(
        ["exact_match"],
        ["It is 1200.00.", "#### 5", "none", ""],
        [("#### 1,200",), ("#### 6",), ("#### 7",), ("#### 8",)],
    )
    assert table["exact_match"].tolist() == [100, 0, 0, 0]
    assert headline == {"exact_match": 25}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.text(max_size=20), st.lists(st.text(max_size=20), min_size=1, max_size=3)), min_size=1)
)
def test_every_metric_takes_any_text_and_stays_between_0_and_100(pairs):
    predictions, references = [p for p, _ in pairs], [tuple(r) for _, r in pairs]
    headline, table = measure(OF_ANSWERS, predictions, references)
    assert list(headline) == list(table) == OF_ANSWERS
    assert len(table) == len(pairs)
    assert table.stack().between(0, 100.0001).all()
    assert all(0 <= value <= 100.0001 for value in headline.values())


def test_every_metric_of_empty_predictions_is_zero():
    headline, table = measure(OF_ANSWERS, ["", ""], [("a b 1",), ("c 2", "d 3")])
    assert set(headline.values()) == {0.0}
    assert (table == 0).all(axis=None)


@pytest.mark.parametrize("names", [["rougeL", "rogue1"], [], "rougeL"])
def test_a_metric_that_is_not_there_is_refused_with_the_choices(names):
    with pytest.raises(
        UserError, match=r"task\.metrics.*rouge1, rouge2, rougeL, bleu, chrf, exact, accuracy, macro_f1"
    ):
        check_metrics(names)


def test_exact_match_is_refused_where_a_reference_has_no_number():
    good, bad = Sample("a", "?", "#### 3", ("#### 3",)), Sample("b7", "?", "three", ("three",))
    check_metrics(["exact_match"], [good])
    check_metrics(["rougeL"], [good, bad])
    with pytest.raises(UserError, match=r"'b7'.*no number"):
        check_metrics(["exact_match"], [good, bad])


@pytest.mark.parametrize(
    ("metric", "text", "instead"),
    [
        ("rougeL", "Бүгін ауа райы жылы болады.", "rougeL_intl"),
        ("rouge1", "今天天气很暖和。", "rouge1_zh"),
        ("rouge2", "नमस्ते दुनिया", "rouge2_intl"),
        ("rougeL", "Café crème: ça va très bien", "rougeL_intl"),
        ("rougeL_zh", "今日はとても暖かいです。", "rougeL_char"),
        ("rougeL_intl", "วันนี้อากาศอบอุ่น", "rougeL_char"),
        ("rougeL", "The café in Zürich opens early in the morning.", None),
        ("rougeL", "3.5 + 4 = 7.5 (42 %)", None),
        ("rougeL", "SHOUTING ABOUT NOTHING", None),
        ("rougeL_zh", "今天天气 很暖和 in Paris 吗", None),
        ("rougeL_intl", "오늘은 날씨가 매우 따뜻합니다", None),
        ("bleu", "今天天气很暖和。", "chrf"),
        ("bleu", "今日はとても暖かいです。", "chrf"),
        ("bleu", "コーヒー", "chrf"),
        ("bleu", "วันนี้อากาศอบอุ่น", "chrf"),
        ("bleu", "Бүгін ауа райы жылы болады.", None),
        ("bleu", "오늘은 날씨가 매우 따뜻합니다", None),
        ("chrf", "今天天气很暖和。", None),
        ("chrf", "Бүгін ауа райы жылы болады.", None),
    ],
)
def test_a_metric_that_cannot_read_the_references_script_is_refused_with_one_that_can(metric, text, instead):
    samples = [Sample("a", "?", "y", ("y",)), Sample("b7", "?", text, ("y", text))]
    if instead is None:
        check_metrics([metric], samples)
        if len(text.split()) > 3:
            assert measure([metric], [text], [(text,)])[0][metric] == pytest.approx(100)
        return
    with pytest.raises(UserError, match=rf"task\.metrics {metric} cannot compare .*'b7': take {instead} instead"):
        check_metrics([metric], samples)
    check_metrics([instead], samples)
    assert measure([instead], [text], [(text,)])[0][instead] == pytest.approx(100)


def test_a_metric_is_refused_by_all_letters_of_the_references_and_not_by_one_name_in_one_of_them():
    samples = [Sample(f"{i}", "?", "in the morning", ("in the morning",)) for i in range(9)]
    check_metrics(["rougeL"], [*samples, Sample("b7", "?", "Zoë", ("Zoë",))])
    check_metrics(["rougeL"], [])


def test_checking_metrics_loads_no_model_library():
    code = (
        "import sys; from staff.evaluation.metrics import check_metrics; check_metrics(['rougeL', 'bleu']);"
        "assert not {'torch', 'transformers', 'sacrebleu', 'rouge_score'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_rouge_by_a_tokenizer_of_sacrebleu_of_cases_counted_by_hand():
    cases = [
        ("rougeL_zh", "今天很冷。", "今天很热！", 75),  # three of four characters, no punctuation
        ("rouge1_intl", "Бүгін жылы.", "Бүгін, БҮГІН суық", 40),  # one of two and one of three words
        ("rouge2_intl", "Running cats", "run cat", 0),  # without stemming
        ("rougeL_char", "ภาษา", "ภาษา", 100),
    ]
    for metric, prediction, reference, value in cases:
        assert measure([metric], [prediction], [(reference,)])[0][metric] == pytest.approx(value), metric
