"""Metrics of answers against counts by hand and other libraries; a choice by likelihood is that of transformers."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import sacrebleu
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments import measure as measuring
from staff.data.task import Sample, Task
from staff.errors import UserError
from staff.evaluation import metrics
from staff.evaluation.metrics import NAMED, check_metrics, named_metric
from staff.evaluation.metrics import measure as measured
from staff.evaluation.metrics.metric import Choices
from staff.evaluation.metrics.numbers import final_number

# ---------------------------------------------------------------- metrics of texts


PREDICTIONS = ["The cats sat on the mats.", "", "He paid 12 dollars."]
REFERENCES = [("A cat is here.", "The cat sat on the mat."), ("something",), ("He paid 12 dollars.",)]
OF_ANSWERS = [name for name in NAMED if named_metric(name).needs == "answers"]


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


@settings(max_examples=40)
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


def test_checking_metrics_loads_no_model_library():
    code = (
        "import sys; from staff.evaluation.metrics import NAMED, check_metrics; check_metrics(['rougeL', 'bleu']);"
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


# ---------------------------------------------------------------- choices


MODEL = Path(__file__).resolve().parents[1] / "staff/assets/tiny/target"
OF_CHOICES = ["choice_accuracy", "choice_accuracy_norm", "choice_macro_f1", "choice_macro_f1_norm"]
TASK = Task("t", "{q}", " {a}", OF_CHOICES, 4, data_dir="x", choices=("yes", "no"))
ROWS = [
    {"q": f"Does {name} like to {what}?\nAnswer:", "a": answer, "list": choices}
    for (name, what), answer, choices in zip(
        [("Tom", "swim"), ("Ann", "eat"), ("Joe", "read"), ("Kim", "run"), ("Bob", "go to the meeting")],
        ["no", "the meeting tomorrow", "yes", "no", "maybe"],
        [
            ["yes", "no"],
            ["a walk", "the meeting tomorrow", "I"],
            ["yes", "no"],
            ["no", "not at all"],
            ["maybe", "no"],
        ],
    )
]


@cache
def loaded() -> tuple[Any, Any]:
    return AutoTokenizer.from_pretrained(MODEL), AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


def by_transformers(prompt: str, choice: str) -> float:
    """The sum of log-likelihoods of the tokens of " choice" after the prompt, in nats."""
    tokenizer, model = loaded()
    read = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (prompt, f" {choice}")]
    ids = torch.tensor([[tokenizer.bos_token_id, *read[0], *read[1]]])
    with torch.no_grad():
        logs = model(ids).logits[0, :-1].log_softmax(-1)
    return float(logs.gather(1, ids[0, 1:, None])[-len(read[1]) :].sum())


def write(folder: Path, rows: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    train = [{"q": f"{i} + 1 =", "a": str(i + 1)} for i in range(24)]
    for name, of in (("train", train), ("test", rows)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, of)), encoding="utf-8")
    return folder


def test_the_choice_of_a_run_is_the_one_that_transformers_finds_likeliest(run: Callable[..., Any], tmp_path: Path):
    data = write(tmp_path / "data", ROWS)
    record = run(
        *("task=file", "task.prompt='{q}'", "task.answer=' {a}'", f"task.data_dir={data}", "task.test_limit=9"),
        *("task.choices_field=list", f"task.metrics=[{','.join(OF_CHOICES)}]", "method=raw", "pruning_rate=1"),
    )
    table = pd.read_parquet(record["folder"] / "predictions.parquet")
    sums = [[by_transformers(row["q"], text) for text in row["list"]] for row in ROWS]
    for found, expected, row in zip(table["log_likelihoods"], sums, ROWS, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4)
        assert len(found) == len(row["list"])
    best = [row["list"][int(np.argmax(values))] for row, values in zip(ROWS, sums)]
    by_length = [[v / len(t) for v, t in zip(values, row["list"])] for row, values in zip(ROWS, sums)]
    longest = [row["list"][int(np.argmax(values))] for row, values in zip(ROWS, by_length)]
    assert best != longest, "the example tells the two apart"
    for name, chosen in (("choice_accuracy", best), ("choice_accuracy_norm", longest)):
        right = [100.0 * (text == row["a"]) for text, row in zip(chosen, ROWS)]
        assert table[name].tolist() == right and record["metrics"][name] == np.mean(right)
    run("method=random", "evaluation=none")
    again = measuring.measure_again(tmp_path / "results", ["choice_macro_f1", "exact"])
    assert again == 1, "stored choices are measured again without a model; a run without answers is not counted"
    after = json.loads((record["folder"] / "metrics.json").read_text())["metrics"]
    assert after["choice_macro_f1"] == record["metrics"]["choice_macro_f1"] and "exact" in after


def test_raw_and_normalised_choices_accuracy_and_f1_of_a_case_counted_by_hand():
    choices = Choices([("yes", "never again")] * 4, [np.array([-2.0, -3.0])] * 3 + [np.array([-2.0, -9.0])])
    references = [("never again",), ("yes",), ("Yes.",), ("yes",)]
    headline, table = measured([*map(named_metric, OF_CHOICES)], [""] * 4, references, choices=choices)
    # Raw: always yes. By character: -0.67 against -0.27, thrice "never again", and once -0.67 against -0.82, "yes".
    assert table["choice_accuracy"].tolist() == [0, 100, 100, 100] and headline["choice_accuracy"] == 75
    assert table["choice_accuracy_norm"].tolist() == [100, 0, 0, 100] and headline["choice_accuracy_norm"] == 50
    assert headline["choice_macro_f1"] == pytest.approx((0 + 100 * 6 / 7) / 2)
    assert headline["choice_macro_f1_norm"] == pytest.approx((100 * 2 / 4 + 100 * 2 / 4) / 2)
    with pytest.raises(UserError, match="choice_accuracy needs the model that answered"):
        measured([named_metric("choice_accuracy")], [""], [("yes",)])


def samples(rows: list[dict[str, Any]], **settings: Any) -> Any:
    from dataclasses import replace

    return replace(TASK, **settings).samples([(f"line {i}", row) for i, row in enumerate(rows, 1)], "test")


def test_choices_belong_to_test_samples_and_the_same_prompt_with_other_choices_is_another_sample():
    assert [sample.choices for sample in samples(ROWS[:2])] == [("yes", "no")] * 2
    twice = [{"q": "q", "a": "a", "list": ["a", "b"]}, {"q": "q", "a": "c", "list": ["c", "d"]}]
    assert len(samples(twice, choices=(), choices_field="list")) == 2 and len(samples(twice)) == 1
    (sample,) = TASK.samples([("line 1", ROWS[0])], "train")
    assert sample.choices == ()
    asked = TASK.choice_samples(samples(ROWS[:1]))
    assert [(s.answer, s.prompt) for s in asked] == [(" yes", ROWS[0]["q"]), (" no", ROWS[0]["q"])]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"choices": ()}, "set one of them"),
        ({"choices": ("yes", "never")}, r"'no' of sample '\w+' is not among its choices \(yes, never\)"),
        ({"choices": ("yes", "no"), "choices_field": "list"}, "both list the choices"),
        ({"choices": (True, False)}, r"task.choices=\(True, False\) must be a list of two or more different texts"),
        ({"choices": ("yes",)}, "two or more different texts"),
        ({"choices": ("yes", " yes")}, "two or more different texts"),
        ({"choices": "yes"}, "task.choices='yes' must be a list"),
        ({"choices": (), "choices_field": 3}, "must be null or name a field"),
        ({"choices": (), "choices_field": "other"}, r"line 1: .*other"),
        ({"choices": (), "choices_field": "a"}, "line 1: the list of task.choices_field must have two or more"),
    ],
    ids=str,
)
def test_choices_that_cannot_be_chosen_among_are_one_sentence(settings: dict[str, Any], sentence: str):
    with pytest.raises(UserError, match=sentence):
        check_metrics(OF_CHOICES, samples(ROWS[:1], **settings))


def test_a_choice_beyond_the_window_is_refused_before_a_model_loads(run: Callable[..., Any], tmp_path: Path):
    data = write(tmp_path / "data", [{"q": "q", "a": "yes", "list": ["yes", "no " * 2000]}])
    with pytest.raises(UserError, match=r"with one of its choices, more than the target's window of \d+: shorten"):
        run(
            *("task=file", "task.prompt='{q}'", "task.answer=' {a}'", f"task.data_dir={data}", "method=raw"),
            *("task.choices_field=list", "task.metrics=[choice_accuracy]", "pruning_rate=1"),
        )
    assert not [*(tmp_path / "results").rglob("evaluation")]
