"""Floors under a metric: what a constant answer gives, and what another sample's reference gives."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from support.records import grid

from experiments.campaign import pack
from experiments.recorded import recorded_runs
from experiments.report import (
    floors,
    overview,
)
from experiments.report.__main__ import left_over, write
from experiments.report.floors import training_answers
from experiments.report.records import collect
from staff.data.task import Sample
from staff.errors import UserError
from staff.evaluation.floors import (
    ChooseConstant,
    best_constant,
    candidates,
    specificity,
    typical_count,
    warnings,
    with_floors,
)
from staff.evaluation.metrics import NAMED, check_metrics, measure, named_metric
from staff.evaluation.metrics.rouge import rouge_l_matrix

ROWS = [json.loads(line) for line in (ROOT / "staff/assets/dialogsum/test.jsonl").open()]
REFERENCES = [(row["summary1"], row["summary2"], row["summary3"]) for row in ROWS]
ANSWERS = [row["summary1"].split(".")[0] for row in ROWS]
IDS = [row["fname"] for row in ROWS]
TRAINING = [json.loads(line)["summary"] for line in (ROOT / "staff/assets/dialogsum/train.jsonl").open()]

WORDS = st.lists(
    st.sampled_from(["a", "ran", "running", "42", "#Person1#", "the", "café", "今天", "!", ""]), max_size=12
)
TEXTS = WORDS.map(" ".join)


@pytest.mark.parametrize("metric", ["rougeL", "rougeL_intl", "rougeL_zh", "rougeL_char"])
@settings(max_examples=30)
@given(st.lists(TEXTS, min_size=1, max_size=4), st.lists(st.lists(TEXTS, min_size=1, max_size=3), min_size=1))
def test_every_pair_scores_as_rouge_score_scores_it_to_the_last_digit(
    metric: str, answers: list[str], groups: list[list[str]]
):
    references = [tuple(group) for group in groups]
    expected = [named_metric(metric).measure([answer] * len(references), references)[1] for answer in answers]
    assert rouge_l_matrix(answers, references, metric).tolist() == expected


def test_real_answers_score_as_rouge_score_scores_them_to_the_last_digit():
    shown = rouge_l_matrix(ANSWERS, REFERENCES)
    assert np.diag(shown).tolist() == named_metric("rougeL").measure(ANSWERS, REFERENCES)[1]
    assert shown[3].tolist() == named_metric("rougeL").measure(ANSWERS[3:4] * len(ROWS), REFERENCES)[1]


def test_three_hundred_answers_meet_three_hundred_samples_in_seconds():
    answers, references = (ANSWERS * 2)[:300], (REFERENCES * 2)[:300]
    started = time.process_time()
    specificity("rougeL", answers, references, [f"{i}" for i in range(300)], shifts=20)
    assert time.process_time() - started < 3


@pytest.mark.parametrize("metric", ["rougeL", "rouge1", "chrf", "exact_match"])
def test_with_every_shift_the_shuffled_score_is_the_mean_over_all_other_samples(metric: str):
    answers = [f"{text} {i % 3}" for i, text in enumerate(ANSWERS[:9])]
    references = [tuple(f"{text} {i % 2}" for text in group) for i, group in enumerate(REFERENCES[:9])]
    pairs = [(i, j) for i in range(9) for j in range(9) if i != j]
    values = named_metric(metric).measure([answers[i] for i, _ in pairs], [references[j] for _, j in pairs])[1]
    found = specificity(metric, answers, references, IDS[:9], shifts=8)
    assert found.others == pytest.approx(np.reshape(values, (9, 8)).mean(axis=1)) and found.error == 0
    assert found.own.tolist() == named_metric(metric).measure(answers, references)[1]


def test_a_few_shifts_miss_the_mean_over_all_by_the_error_that_they_state():
    answers, references, ids = ANSWERS[:50], REFERENCES[:50], IDS[:50]
    every = specificity("rougeL", answers, references, ids).others.mean()
    keyed = [[f"{trial}-{id}" for id in ids] for trial in range(150)]  # other ids: another permutation
    found = [specificity("rougeL", answers, references, ids, shifts=10) for ids in keyed]
    standard = np.array([(f.others.mean() - every) / f.error for f in found])
    assert abs(standard.mean()) < 0.35 and 0.8 < standard.std() < 1.4, (standard.mean(), standard.std())


def test_the_order_of_the_samples_changes_nothing():
    turned = np.random.default_rng(0).permutation(len(ROWS))
    first = specificity("rouge2", ANSWERS, REFERENCES, IDS, shifts=3)
    again = specificity("rouge2", *([a[i] for i in turned] for a in (ANSWERS, REFERENCES, IDS)), shifts=3)
    assert (first.own[turned] == again.own).all() and first.others.mean() == pytest.approx(again.others.mean())


def test_a_template_says_nothing_of_its_prompt_and_a_right_answer_does():
    template = specificity("rougeL", ["#Person1# and #Person2# talk about the"] * len(ROWS), REFERENCES, IDS)
    right = specificity("rougeL", ANSWERS, REFERENCES, IDS)
    assert template.own.mean() > 20 and abs(template.specific.mean()) < 1e-9
    assert right.specific.mean() > 20


def test_one_sample_has_no_other_to_be_held_against():
    found = specificity("rougeL", ANSWERS[:1], REFERENCES[:1], IDS[:1])
    assert np.isnan(found.others).all() and np.isnan(found.error) and len(found.own) == 1


def test_the_constant_answer_is_chosen_on_training_answers_and_does_as_well_as_a_model():
    constant = best_constant("rougeL", TRAINING[:400])
    found = candidates("rougeL", TRAINING[:400])
    assert constant.kind == found[constant.text] and constant.text.startswith("#Person")
    judges = [(text,) for text in TRAINING[:400]]
    others = [named_metric("rougeL").measure([text] * 300, judges[:300])[0] for text in list(found)[:10]]
    assert constant.judged > max(others) - 1.5
    assert constant.scores("rougeL", REFERENCES).mean() > 20
    hindsight = best_constant("rougeL", TRAINING[:400], REFERENCES)
    assert hindsight.judged == pytest.approx(hindsight.scores("rougeL", REFERENCES).mean())
    assert hindsight.judged >= constant.scores("rougeL", REFERENCES).mean()


def test_where_test_samples_have_several_references_the_constant_is_chosen_by_as_many_training_answers():
    one, three = (best_constant("rougeL", TRAINING, references=count) for count in (1, typical_count(REFERENCES)))
    assert three.scores("rougeL", REFERENCES).mean() > one.scores("rougeL", REFERENCES).mean() + 2
    few = best_constant("exact", ["yes", "yes", "no"], references=5)
    assert (few.text, few.judged) == ("yes", 100)
    stages = [ChooseConstant(named_metric("exact"), TRAINING[:9], count) for count in (1, 3)]
    assert "references" not in stages[0].key() and stages[1].key()["references"] == 3


def test_the_constant_answer_to_sums_is_the_number_that_comes_up_most():
    answers = [f"step {i}\n#### {7 if i % 4 == 0 else 100 + i}" for i in range(40)]
    constant = best_constant("exact_match", answers)
    assert constant.kind.startswith("ending") and constant.text.endswith("7") and constant.judged == 25


def test_in_a_script_without_spaces_openings_and_endings_are_of_characters():
    answers = [f"两人在谈论{topic}。" for topic in ("天气", "工作", "学校", "旅行", "晚饭")]
    constant = best_constant("rougeL_char", answers)
    assert constant.text == "两人在谈论" and constant.kind == "opening of 5 characters"
    assert "opening of 2 words" in candidates("rougeL", ["we met " + answer for answer in ANSWERS]).values()


def test_a_metric_over_classes_is_held_against_its_own_value_of_a_constant_and_of_shuffles():
    references = [("yes",)] * 90 + [("no",)] * 10
    answers = ["yes"] * 75 + ["no"] * 25  # 85 of 100 right, and every "no" found
    ids = [str(number) for number in range(100)]
    split, constant = (
        specificity("macro_f1", answers, references, ids),
        best_constant("macro_f1", ["yes", "yes", "no"]),
    )
    headline = named_metric("macro_f1").measure(answers, references)[0]
    assert split.own.mean() == pytest.approx(headline) and 70 < headline < 75
    assert constant.text == "yes" and constant.scores("macro_f1", references).mean() == pytest.approx(100 * 9 / 19)
    assert abs(split.others.mean() - 47) < 5 and 0 < split.error < 2
    assert specificity("exact", answers, references, ids).own.mean() == 85


def test_candidates_do_not_depend_on_the_order_of_the_answers():
    assert candidates("rougeL", TRAINING[:200]) == candidates("rougeL", TRAINING[:200][::-1])


def test_every_metric_has_a_direction_and_an_unknown_one_is_refused():
    assert {named_metric(name).sign for name in NAMED if "nll" not in name} == {1}
    assert named_metric("nll").sign == -1 and named_metric("nll").margin < named_metric("rougeL").margin
    with pytest.raises(UserError, match="names 'speed', which is unknown"):
        named_metric("speed")


def test_a_run_records_its_floors_and_its_summary_warns_of_answers_below_them(
    run: Callable[..., Any], tmp_path: Path
):
    balanced = ("task.size=700", "task.test_limit=null", "task.test_per_skill=10")
    record = run("task=planted", "method=raw", "pruning_rate=1", "task.train_limit=null", *balanced)
    floors = record["floors"]["exact"]
    assert list(record["floors"]) == ["exact"], "a loss has no answers to be shuffled"
    assert floors["score"] == record["metrics"]["exact"] == 0 < floors["constant"] <= 12
    assert len(training_answers(record["config"]["task"], tmp_path)) == 700, "made again, without a file"
    (said,) = [text for text in record["warnings"] if "constant" in text]
    assert said.startswith(f"the raw target scores 0.00 exact, less than {floors['constant']:.2f} of the constant")
    assert f"warning: {record['run']['name']}: {said}" in overview([record["folder"]])
    page = write(tmp_path / "results", collect(tmp_path / "results")).read_text()
    assert "raw target <em>(below the constant answer)</em>" in page
    (table,) = (tmp_path / "results/tables").glob("specific-*.md")
    assert "below the constant answer" in table.read_text() and floors["constant_answer"] in table.read_text()


def test_warnings_name_the_model_and_stay_silent_above_the_floor():
    floor = {"score": 30.0, "constant": 26.65, "constant_answer": "#Person1#  and\n#Person2# talk"}
    assert warnings({"rougeL": floor}, ["a"] * 100, "the raw target") == []
    (said,) = warnings({"rougeL": {**floor, "score": 26.6}}, ["a"] * 95 + [" "] * 5, "the fine-tuned target")
    answer = '"#Person1# and #Person2# talk"'
    assert said == f"the fine-tuned target scores 26.60 rougeL, less than 26.65 of the constant answer {answer}."
    assert warnings({}, ["a"] * 94 + ["", "\n"] * 3, "the raw target") == [
        "6% of the answers of the raw target are empty."
    ]


def test_a_metric_of_ones_own_has_no_floors_since_it_may_be_slow():
    names = ["rougeL", "nll", "choice_accuracy", "staff.evaluation.metrics.exact.Exact"]
    assert [metric.name for metric in with_floors([*map(named_metric, names)])] == ["rougeL"]


def test_floors_with_nothing_to_show_say_so(real: Path, tmp_path: Path, monkeypatch):
    arguments = ["--results", str(tmp_path), "--data", str(ROOT / "staff/assets"), "--rate", "0.3"]
    monkeypatch.setattr(sys, "argv", ["floors", *arguments])
    with pytest.raises(SystemExit, match=r"runs holds no record: name another folder by --results\."):
        floors.main()
    grid(real, tmp_path, {"random": 0, "staff": 1}, seeds=1, rates=(0.5,))
    with pytest.raises(
        SystemExit, match=r"scored answers at pruning rate 0.3: choose another --rate or --metric\."
    ):
        floors.main()


def test_floors_split_the_score_of_each_method_and_name_the_best_constant(real: Path, tmp_path: Path, monkeypatch):
    grid(real, tmp_path, {"random": 0, "staff": 1}, seeds=2, rates=(0.5,))
    answers = pd.read_parquet(real / "predictions.parquet")
    for folder in tmp_path.glob("runs/*"):  # random answers with the next sample's reference, STAFF with its own
        shift = 1 if folder.name.startswith("random") else 0
        texts = np.roll([group[0] for group in answers["references"]], shift)
        answers.assign(prediction=texts).to_parquet(folder / "predictions.parquet")
    arguments = ["--results", str(tmp_path), "--data", str(ROOT / "staff/assets"), "--rate", "0.5"]
    monkeypatch.setattr(sys, "argv", ["floors", *arguments])
    floors.main()
    (file,) = tmp_path.glob("tables/floors-*.md")
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in file.read_text().splitlines() if "|" in line
    ]
    rows = {row[0].split(" (")[0]: row[1:] for row in cells[2:]}
    assert set(rows) == {"constant chosen on training answers", "constant in hindsight", "random", "staff"}
    assert rows["staff"][1] == "100.00" and float(rows["random"][3]) < 1 < 50 < float(rows["staff"][3])
    assert float(rows["constant in hindsight"][1]) >= float(rows["constant chosen on training answers"][1]) > 5
    assert rows["constant in hindsight"][3] == "0.00" and "--data DATA --rate 0.5`" in file.read_text()
    assert rows["staff"][5].startswith("+") and rows["random"][5] == "–"
    write(tmp_path, collect(tmp_path))
    assert left_over(tmp_path) == [], "the report knows that it has a command of its own"
    pack(recorded_runs(tmp_path), tmp_path / "packed")
    monkeypatch.setattr(sys, "argv", ["floors", *arguments, "--results", str(tmp_path / "packed")])
    floors.main()
    (packed,) = tmp_path.glob("packed/tables/floors-*.md")
    assert packed.read_text().splitlines()[:-1] == file.read_text().splitlines()[:-1], (
        "tables do as well as folders"
    )


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
            assert measure([named_metric(metric)], [text], [(text,)])[0][metric] == pytest.approx(100)
        return
    with pytest.raises(UserError, match=rf"task\.metrics {metric} cannot compare .*'b7': take {instead} instead"):
        check_metrics([metric], samples)
    check_metrics([instead], samples)
    assert measure([named_metric(instead)], [text], [(text,)])[0][instead] == pytest.approx(100)


@pytest.mark.parametrize(("metric", "text"), [("rougeL", "٣ ٤"), ("rouge1_char", "🙂"), ("rougeL_intl", "{} + []")])
def test_a_metric_of_words_is_refused_for_references_without_any(metric: str, text: str):
    samples = [Sample(f"{i}", "?", "x", ("a word",)) for i in range(8)] + [Sample("b7", "?", "x", (text,))]
    with pytest.raises(UserError, match=r"finds no word in .* of 1 of 9 test samples, such as 'b7': take chrf or"):
        check_metrics([metric], samples)
    check_metrics([metric], [*samples, *(Sample(f"c{i}", "?", "x", ("2",)) for i in range(8))])


def test_a_metric_is_refused_by_all_letters_of_the_references_and_not_by_one_name_in_one_of_them():
    samples = [Sample(f"{i}", "?", "in the morning", ("in the morning",)) for i in range(9)]
    check_metrics(["rougeL"], [*samples, Sample("b7", "?", "Zoë", ("Zoë",))])
    check_metrics(["rougeL"], [])
