"""Templates over the fields of a row: nested fields and lists, references, and Jinja."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from staff.data.task import Task
from staff.errors import UserError

TASK = Task("t", "Q: {question}\nA:", " {answer}", ["rougeL"], 8, data_dir="x")
ROW = {"question": "one?", "answer": "eins"}


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def test_a_template_reaches_into_lists(tmp_path: Path):
    row = {"question": "?", "answers": {"text": ["a", "b"], "start": [3, 4]}}
    (tmp_path / "train.jsonl").write_bytes(lines([row]))
    task = replace(TASK, data_dir=str(tmp_path), answer="{answers[text][1]} {answers[start][0]}")
    assert [sample.answer for sample in task.load("train")] == ["b 3"]
    for field in ("answers[text][2]", "answers[text][-1]", "answers[text][x]"):
        with pytest.raises(UserError, match=r"line 1: no field 'answers\[text\]"):
            replace(task, answer=f"{{{field}}}").load("train")


def test_references_may_be_nested_and_may_be_lists(tmp_path: Path):
    rows = [{"question": "?", "answers": {"text": ["a", "b"]}, "other": "c"}]
    (tmp_path / "test.jsonl").write_bytes(lines(rows))
    task = replace(TASK, data_dir=str(tmp_path), references=["answers[text]", "other"])
    (sample,) = task.load("test")
    assert sample.references == ("a", "b", "c") and sample.answer == "a"
    (tmp_path / "test.jsonl").write_bytes(lines([{"question": "?", "answers": {"text": []}}]))
    with pytest.raises(UserError, match=r"line 1: the lists of task.references are empty"):
        replace(task, references=["answers[text]"]).load("test")


OPTIONAL = "{{ instruction }}{% if input %}\n\n{{ input }}{% endif %}\n"


def test_a_jinja_template_has_optional_parts_and_keeps_its_white_space(tmp_path: Path):
    rows = [{"instruction": "Add.", "input": input, "answer": "x"} for input in ("1, 2", "", None, 0)]
    (tmp_path / "train.jsonl").write_bytes(lines(rows))
    task = replace(TASK, data_dir=str(tmp_path), prompt=OPTIONAL, answer="{{ answer }}")
    prompts = [sample.prompt for sample in task.load("train")]
    assert prompts == ["Add.\n\n1, 2\n", "Add.\n", "Add.\n", "Add.\n"]


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (
            "{{ quest }}",
            r"line 1: task.prompt fails with \"'quest' is undefined\"; the row has answer, n",
        ),
        ("{{ question.x }}", r"line 1: task.prompt fails with .*has no attribute 'x'"),
        ("{% if quest %}a{% endif %}", r"line 1: task.prompt fails with .*'quest' is undefined"),
        ("{{ n }}", r"line 1: task.prompt fails with 'a value is NoneType, not text'"),
        ("{{ [1] }}", r"line 1: task.prompt fails with 'a value is list, not text'"),
        ("{{ 1 / 0 }}", r"line 1: task.prompt fails with 'division by zero'"),
        ("{{ ''.__class__.__mro__ }}", r"line 1: task.prompt fails with .*unsafe"),
        ("{{ row.update({'a': 1}) }}", r"line 1: task.prompt fails with .*is unsafe"),
        ("{{ question", r"^task.prompt='{{ question' is not a Jinja template \(unexpected end"),
        ("{% if question %}a", r"^task.prompt='.*' is not a Jinja template \(Unexpected end of template"),
        ("{{ question | shout }}", r"^task.prompt='.*' is not a Jinja template \(No filter named 'shout'"),
    ],
)
def test_a_jinja_template_that_fails_is_one_sentence(tmp_path: Path, template: str, sentence: str):
    (tmp_path / "train.jsonl").write_bytes(lines([{**ROW, "n": None}]))
    with pytest.raises(UserError, match=sentence) as refused:
        replace(TASK, data_dir=str(tmp_path), prompt=template).load("train")
    assert "\n" not in str(refused.value)


def test_a_field_with_a_curious_name_is_reached_by_the_row(tmp_path: Path):
    (tmp_path / "train.jsonl").write_bytes(lines([{"the question?": "x", "answer": "y"}]))
    (sample,) = replace(TASK, data_dir=str(tmp_path), prompt="{{ row['the question?'] }}:").load("train")
    assert sample.prompt == "x:"
