"""Reading a task: what is read, and the sentence for everything that is wrong with it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from staff.data import Sample, Task
from staff.errors import UserError
from staff.models import ModelSpec
from staff.tokens import fitting, tokenize

TASK = Task("t", "Q: {question}\nA:", " {answer}", ["rougeL"], 8, data_dir="x")
GOOD = {"question": "one?", "answer": "two"}


def task_of(folder: Path, *lines: object, **fields: object) -> Task:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    for name in ("train.jsonl", "test.jsonl"):
        (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    return replace(TASK, data_dir=str(folder), **fields)


def test_a_sample_is_the_rendered_prompt_and_answer(tmp_path: Path):
    (sample,) = task_of(tmp_path, GOOD).load("train")
    assert (sample.prompt, sample.answer, sample.references) == ("Q: one?\nA:", " two", ("two",))


def test_templates_reach_into_nested_fields(tmp_path: Path):
    row = {"translation": {"kk": "a", "en": "b"}}
    task = task_of(tmp_path, row, prompt="{translation[kk]}=", answer=" {translation[en]}")
    (sample,) = task.load("train")
    assert (sample.prompt, sample.answer) == ("a=", " b")


def test_braces_in_the_data_are_left_alone(tmp_path: Path):
    (sample,) = task_of(tmp_path, {"question": "{x} {", "answer": "{answer}"}).load("train")
    assert (sample.prompt, sample.answer) == ("Q: {x} {\nA:", " {answer}")


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        ("{not json", "line 2: not JSON"),
        ("[1, 2]", "line 2: a list, not an object"),
        ({"question": "one?"}, "line 2: no field 'answer' .wanted by task.answer.; it has question"),
        ({"question": "one?", "answer": None}, "line 2: field 'answer' is NoneType, not text"),
        ({"question": 3, "answer": "x"}, "line 2: field 'question' is int, not text"),
        ({"question": "one?", "answer": "  "}, "line 2: the answer is empty"),
        ("\udcff", "line 2: not UTF-8 .byte 0."),
    ],
)
def test_a_bad_line_is_refused_with_file_line_and_field(tmp_path: Path, bad: object, sentence: str):
    with pytest.raises(UserError, match=f"train.jsonl, {sentence}"):
        task_of(tmp_path, GOOD, bad).load("train")


def test_a_missing_file_an_empty_file_and_a_bad_template_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"train.jsonl is not there: task.data_dir must be a folder"):
        replace(TASK, data_dir=str(tmp_path)).load("train")
    with pytest.raises(UserError, match="the train split is empty"):
        task_of(tmp_path).load("train")
    with pytest.raises(UserError, match=r"task.prompt='{question' is not a template"):
        task_of(tmp_path, GOOD, prompt="{question").load("train")


def test_ids_come_from_their_field_or_from_the_text(tmp_path: Path):
    rows = [{**GOOD, "name": "a"}, {**GOOD, "name": "a"}]
    with pytest.raises(UserError, match="the id 'a' comes twice"):
        task_of(tmp_path, *rows, id_field="name").load("train")
    first, second = task_of(tmp_path, *rows).load("train")
    assert second.id == f"{first.id}-2"
    assert task_of(tmp_path, *reversed(rows)).load("train")[0].id == first.id


def test_test_rows_of_one_prompt_are_one_sample_with_the_references_of_all_and_training_rows_are_not(tmp_path):
    others = [{**GOOD, "answer": "deux"}, {**GOOD, "question": "three?"}, GOOD]
    task = task_of(tmp_path, GOOD, *others)
    assert [sample.references for sample in task.load("test")] == [("two", "deux"), ("two",)]
    assert len(task.load("train")) == 4


def test_the_test_split_has_all_its_references(tmp_path: Path):
    row = {**GOOD, "r1": "x", "r2": "y"}
    (sample,) = task_of(tmp_path, row, references=("r1", "r2")).load("test")
    assert sample.references == ("x", "y")


def test_a_sample_that_one_tokenizer_would_cut_is_refused_or_dropped_for_both(tmp_path: Path):
    tokenizer = ModelSpec("pkg://staff/assets/tiny/target").tokenizer()
    samples = task_of(tmp_path, GOOD, {"question": "why " * 40, "answer": "because"}).load("train")
    long = tokenize(samples, tokenizer)
    short = replace(tokenize([samples[0]] * 2, tokenizer), ids=long.ids)
    with pytest.raises(UserError, match=f"would cut the answer of 1 sample.*{samples[1].id}.*too_long=drop"):
        fitting([short, long], 30, "refuse")
    assert fitting([short, long], 30, "drop").tolist() == [0]


def test_a_training_sample_beyond_one_models_window_is_refused_or_dropped_for_all(tmp_path: Path):
    tokenizer = ModelSpec("pkg://staff/assets/tiny/target").tokenizer()
    samples = task_of(tmp_path, GOOD, {"question": "why " * 40, "answer": "because"}).load("train")
    both = [tokenize(samples, tokenizer)] * 2
    longest = both[0].lengths[1]
    windows = {"target": None, "small model": int(longest) - 1}
    sentence = f"the small model reads {longest - 1} tokens, too few for 1 training sample.*{samples[1].id}.*=drop"
    with pytest.raises(UserError, match=sentence):
        fitting(both, 1024, "refuse", windows)
    assert fitting(both, 1024, "drop", windows).tolist() == [0]
    windows["small model"] += 1
    assert fitting(both, 1024, "refuse", windows).tolist() == [0, 1]
    with pytest.raises(UserError, match="no training sample fits the 3 tokens that the target reads"):
        fitting(both, 1024, "drop", {"target": 3, "small model": None})


def test_labels_cover_the_answer_and_its_end_token_alone(tmp_path: Path):
    tokenizer = ModelSpec("pkg://staff/assets/tiny/target").tokenizer()
    tokens = tokenize(task_of(tmp_path, GOOD).load("train"), tokenizer)
    labels = tokens.labels(0)
    answer = [t for t in labels if t != -100]
    assert tokenizer.decode(answer[:-1]) == " two" and answer[-1] == tokenizer.eos_token_id
    assert len(labels) == len(tokens.input_ids[0]) == tokens.lengths[0]
    assert tokens.answer_lengths[0] == len(answer)


def test_a_large_pool_is_tokenised_some_at_a_time_and_comes_out_the_same():
    tokenizer = ModelSpec("pkg://staff/assets/tiny/target").tokenizer()
    samples = [Sample(f"s{i}", f"Say {i}" + " again" * (i % 3) + ":", f" {i * i}", ()) for i in range(2001)]
    whole, last = tokenize(samples, tokenizer), tokenize(samples[-1:], tokenizer)
    assert whole.ids == [sample.id for sample in samples]
    alone = [tokenize([samples[i]], tokenizer) for i in (0, 999, 1000, 1999)]
    assert [whole.take([i]) for i in (0, 999, 1000, 1999, 2000)] == [*alone, last]
