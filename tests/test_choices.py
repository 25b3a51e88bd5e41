"""A choice by likelihood is that of transformers itself, scored as lm-evaluation-harness scores it."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from experiments import measure as measuring
from staff.data.task import Task
from staff.errors import UserError
from staff.evaluation.metrics import check_metrics, measure, named_metric
from staff.evaluation.metrics.metric import Choices

MODEL = Path(__file__).resolve().parents[1] / "staff/assets/tiny/target"
METRICS = ["choice_accuracy", "choice_accuracy_norm", "choice_macro_f1", "choice_macro_f1_norm"]
TASK = Task("t", "{q}", " {a}", METRICS, 4, data_dir="x", choices=("yes", "no"))
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
        *("task.choices_field=list", f"task.metrics=[{','.join(METRICS)}]", "method=raw", "pruning_rate=1"),
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
    headline, table = measure([*map(named_metric, METRICS)], [""] * 4, references, choices=choices)
    # Raw: always yes. By character: -0.67 against -0.27, thrice "never again", and once -0.67 against -0.82, "yes".
    assert table["choice_accuracy"].tolist() == [0, 100, 100, 100] and headline["choice_accuracy"] == 75
    assert table["choice_accuracy_norm"].tolist() == [100, 0, 0, 100] and headline["choice_accuracy_norm"] == 50
    assert headline["choice_macro_f1"] == pytest.approx((0 + 100 * 6 / 7) / 2)
    assert headline["choice_macro_f1_norm"] == pytest.approx((100 * 2 / 4 + 100 * 2 / 4) / 2)
    with pytest.raises(UserError, match="choice_accuracy needs the model that answered"):
        measure([named_metric("choice_accuracy")], [""], [("yes",)])


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
        check_metrics(METRICS, samples(ROWS[:1], **settings))


def test_a_choice_beyond_the_window_is_refused_before_a_model_loads(run: Callable[..., Any], tmp_path: Path):
    data = write(tmp_path / "data", [{"q": "q", "a": "yes", "list": ["yes", "no " * 2000]}])
    with pytest.raises(UserError, match=r"with one of its choices, more than the target's window of \d+: shorten"):
        run(
            *("task=file", "task.prompt='{q}'", "task.answer=' {a}'", f"task.data_dir={data}", "method=raw"),
            *("task.choices_field=list", "task.metrics=[choice_accuracy]", "pruning_rate=1"),
        )
    assert not [*(tmp_path / "results").rglob("evaluation")]
