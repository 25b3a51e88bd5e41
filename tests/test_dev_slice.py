"""The splits of a run: the validation slice, duplicates, selection without evaluation, and a budget as a count."""

import importlib.util
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from staff.data import duplicates as duplicates_module
from staff.data import splits as splits_module
from staff.data import stored
from staff.data.duplicates import duplicates, normalised
from staff.data.samples import Sample, data_digest, several_answers
from staff.data.splits import Splits, load_splits
from staff.data.task import Task
from staff.errors import UserError
from staff.selection import Coreset

TASK = Task("t", "{question}", " {answer}", ["rougeL"], 8, data_dir="x")
Row = dict[str, Any]


def row(number: int) -> Row:
    return {"question": f"What is {number} plus {number}?", "answer": f"It is {2 * number}.", "id": f"r{number}"}


def task_of(folder: Path, train: list[Row], test: list[Row] | None = None, **settings: Any) -> Task:
    files = {"train": train, "test": [row(900)] if test is None else test, "dev": settings.pop("dev", [])}
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), "utf-8")
    return replace(TASK, data_dir=str(folder), **settings)


def ids(samples: Sequence[Sample]) -> list[str]:
    return [sample.id for sample in samples]


# The validation slice


def test_settings_can_be_chosen_on_the_slice_without_a_look_at_the_test_split(tmp_path: Path):
    rows = [row(number) for number in range(12)]
    task = task_of(tmp_path, rows, dev_size=4, choices=["yes", "no"])
    carved = load_splits(task)
    (tmp_path / "test.jsonl").unlink()
    chosen = load_splits(replace(task, evaluate_on="dev"))
    assert ids(chosen.test) == ids(carved.dev) and ids(chosen.pool) == ids(carved.pool)
    assert chosen.dev == [], "no method may read what it is judged by"
    assert all(sample.choices == ("yes", "no") for sample in chosen.test)
    assert load_splits(replace(task, evaluate_on="dev"), evaluated=False).test == []


def test_an_evaluation_on_a_slice_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="needs a validation slice"):
        replace(TASK, evaluate_on="dev")
    with pytest.raises(UserError, match="evaluate_on='train' is unknown"):
        replace(TASK, evaluate_on="train")


def test_a_carved_slice_is_not_in_the_pool_and_depends_on_ids_alone(tmp_path: Path):
    rows = [row(number) for number in range(40)]
    first = load_splits(task_of(tmp_path, rows, dev_size=10, id_field="id"))
    assert len(first.dev) == 10 and len(first.pool) == 30
    assert not set(ids(first.dev)) & set(ids(first.pool))
    assert ids(first.pool) == [r["id"] for r in rows if r["id"] in ids(first.pool)], "in the order of the rows"
    again = load_splits(task_of(tmp_path, rows[::-1], dev_size=10, id_field="id"))
    assert set(ids(again.dev)) == set(ids(first.dev))
    fewer = load_splits(task_of(tmp_path, rows, dev_size=4, id_field="id"))
    assert set(ids(fewer.dev)) < set(ids(first.dev)), "a larger slice has the samples of a smaller"
    without = [r for r in rows if r["id"] != ids(first.pool)[0]]
    assert ids(load_splits(task_of(tmp_path, without, dev_size=10, id_field="id")).dev) == ids(first.dev)


def test_a_text_that_comes_twice_is_never_carved(tmp_path: Path):
    rows = [row(number // 2) for number in range(20)] + [row(number) for number in range(10, 14)]
    splits = load_splits(task_of(tmp_path, rows, dev_size=4))
    assert {sample.prompt for sample in splits.dev} == {row(number)["question"] for number in range(10, 14)}
    with pytest.raises(
        UserError, match=r"task.dev_size=5 leaves no pool: 4 of the 24 training samples can be drawn"
    ):
        load_splits(task_of(tmp_path, rows, dev_size=5))


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"dev_size": 10}, r"task.dev_size=10 leaves no pool: 10 of the 10 training samples"),
        ({"dev_size": 99}, r"task.dev_size=99 leaves no pool"),
        ({"dev_size": 0}, r"task.dev_size=0 must be a whole number of at least 1"),
        ({"dev_size": 3, "dev_file": "a.jsonl"}, r"task.dev_file and task.dev_size both name the validation slice"),
        ({"dev_file": "a.jsonl"}, r"a.jsonl does not exist: task.data_dir must be a folder with a.jsonl"),
        ({"dev_split": "validation"}, r"validation.jsonl does not exist: .* or set task.dev_file"),
    ],
)
def test_a_slice_that_cannot_be_is_one_sentence(tmp_path: Path, settings: Row, sentence: str):
    with pytest.raises(UserError, match=sentence):
        load_splits(task_of(tmp_path, [row(number) for number in range(10)], **settings))


@pytest.mark.parametrize("how", [{"dev_file": "dev.jsonl"}, {"dev_split": "dev"}])
def test_a_slice_of_its_own_is_read_and_one_that_shares_samples_is_refused(tmp_path: Path, how: Row):
    rows = [row(number) for number in range(10)]
    splits = load_splits(task_of(tmp_path, rows, dev=[row(100), row(101)], **how))
    assert [sample.prompt for sample in splits.dev] == [row(100)["question"], row(101)["question"]]
    assert len(splits.pool) == 10
    shouted = {**row(3), "question": row(3)["question"].upper()}
    task = task_of(tmp_path, rows, dev=[row(100), shouted], **how)
    with pytest.raises(
        UserError, match=r"1 of the 2 samples of the validation slice are also in the pool, such as '"
    ):
        load_splits(task)
    splits = load_splits(replace(task, deduplicate="exact"))
    assert len(splits.pool) == 9 and len(splits.dev) == 2 and splits.dropped == 1


@dataclass(frozen=True)
class AsksTheSlice:
    """Selects the first samples, and keeps what the slice answers."""

    view: str = "dev"

    def select(self, pool: Any, budget: int, rng: Any) -> Coreset:
        losses = pool.ask("loss", of="small_raw", view=self.view)
        slice = pool.slices["dev"]
        own = sum(group == id for group, id in zip(slice.groups, slice.target.ids, strict=True))
        counts = f"{len(losses)} losses, {len(pool.ids)} in the pool, slice by group: {own} of {len(losses)}"
        return Coreset(np.arange(budget), notes=(counts,))


def test_a_run_with_a_slice_asks_it_charges_for_it_and_records_it(run: Callable, tmp_path: Path):
    task_of(tmp_path, [row(number) for number in range(24)])
    data = ["task=file", f"task.data_dir={tmp_path}", "task.prompt='{question}'", "task.answer=' {answer}'"]
    method = ["method=random", f"method._target_={__name__}.AsksTheSlice"]
    record = run(*data, *method, "task.dev_size=6", "task.id_field=id", "task.group_field=id")
    assert record["counts"]["dev"] == 6 and record["counts"]["pool"] == 18
    assert record["coreset"]["notes"] == ["6 losses, 18 in the pool, slice by group: 6 of 6"]
    labels = [stage["label"] for stage in record["overhead"]["stages"]]
    assert any(label.startswith("loss of 6 samples") for label in labels), "asking it is charged"
    assert record["overhead"]["flops"] > 0 and len(record["identity"]["data"]["dev"]) == 64
    with pytest.raises(UserError, match=r"there is no dev slice: make a validation slice with task.dev_size=200"):
        run(*data, *method)


# Duplicates


def sample(prompt: str, answer: str = " x", id: str = "a") -> Sample:
    return Sample(id, prompt, answer, (answer.strip(),))


def test_duplicates_are_distinguished_by_what_they_share():
    pool = [sample("One?"), sample("two?"), sample("ONE?\n"), sample("one?", " y"), sample("three?")]
    found = duplicates(pool, [sample("Three?", " z"), sample("four?")], near=False)
    assert found.repeated.tolist() == [2], "the earlier one stays"
    assert found.held_out.tolist() == [4]
    assert found.counts() == {"repeated": 1, "held_out": 1, "near_repeated": None, "near_held_out": None}
    assert found.to_drop("none").tolist() == [] and found.to_drop("exact").tolist() == [2, 4]
    assert found.words() == "1 repeat an earlier one, 1 have the prompt of a test or validation sample"
    assert duplicates([sample("One?")], [], near=False).words() == ""


@pytest.mark.parametrize("text", ["Straße  1", "STRASSE\t1", "strasse\u00a01", "ｓtrasse １"])
def test_case_white_space_and_compatible_characters_make_no_other_text(text: str):
    assert normalised(text) == "strasse 1"


WORDS = [f"word{number}" for number in range(200)]
NEAR = importlib.util.find_spec("datasketch") is not None


@pytest.mark.skipif(not NEAR, reason="needs datasketch")
def test_near_duplicates_differ_in_a_word_and_what_the_template_says_is_no_likeness():
    def asked(words: list[str]) -> str:
        return (
            f"Summarise the following text in a few words, please: {' '.join(words)}\n\nSummary of the text above:"
        )

    other = [*WORDS[:30], "changed", *WORDS[31:]]
    apart = [[f"{letter}{number}" for number in range(80)] for letter in "abcdef"]
    pool = [sample(asked(words)) for words in (WORDS, *apart, other)]
    long = " ".join(f"own{number}" for number in range(80))
    pool += [sample(asked(["joke", letter]), f" {long}") for letter in "xy"]
    chinese = "".join(chr(0x4E00 + 7 * number) for number in range(120))
    pool += [sample(asked([chinese])), sample(asked([chinese.replace(chinese[30], "一")]), " y")]
    held_out = [sample(asked([*apart[0], "more"])), sample(asked([*apart[1], "more"]), f" other {long[::-1]}")]
    found = duplicates(pool, held_out)
    assert found.repeated.tolist() == [] and found.held_out.tolist() == []
    assert found.near_repeated is not None and found.near_repeated.tolist() == [7, 9, 11]
    assert found.near_held_out is not None and found.near_held_out.tolist() == [1, 2], "by prompt or as a whole"
    assert found.to_drop("exact").tolist() == [] and found.to_drop("near").tolist() == [1, 2, 7, 9, 11]


@pytest.mark.skipif(NEAR, reason="datasketch is installed")
def test_near_duplicates_without_their_library_are_not_counted_and_not_dropped_unasked():
    found = duplicates([sample("one?")], [])
    assert found.near_repeated is None and found.near_held_out is None
    with pytest.raises(UserError, match=r"task.deduplicate=near needs datasketch: pip install"):
        duplicates([sample("one?")], [], near=True)


def test_duplicates_are_counted_told_in_one_line_recorded_and_dropped_where_asked(tmp_path: Path, caplog):
    rows = [row(number % 8) for number in range(12)]
    task = task_of(tmp_path, rows, [row(7), row(900)])
    kept, dropped = (load_splits(replace(task, deduplicate=how)) for how in ("none", "exact"))
    said = [record.message for record in caplog.records]
    line = "duplicates among 12 training samples: 4 repeat an earlier one, 1 have the prompt of a test"
    assert len(said) == 2 and all(message.startswith(line) for message in said)
    assert len(kept.pool) == 12 and kept.test_prompts_in_pool == 1 and kept.dropped == 0
    assert [s.prompt for s in dropped.pool] == [row(number)["question"] for number in range(7)]
    assert dropped.test_prompts_in_pool == 0 and dropped.dropped == 5
    assert kept.duplicates is not None and dropped.duplicates is not None
    assert kept.duplicates.counts() == dropped.duplicates.counts(), "as found, before any was dropped"
    with pytest.raises(UserError, match=r"task.deduplicate=exact drops all 1 training samples: set it to none"):
        load_splits(task_of(tmp_path, [row(1)], [row(1)], deduplicate="exact"))
    with pytest.raises(UserError, match=r"task.deduplicate='some' is unknown: choose 'none', 'exact' or 'near'"):
        replace(TASK, deduplicate="some")


def test_beyond_the_limit_near_duplicates_are_looked_for_only_if_asked_and_a_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    caplog.set_level(logging.INFO)
    for module in (duplicates_module, splits_module):
        monkeypatch.setattr(module, "NEAR_LIMIT", 4)
        monkeypatch.setattr(module, "near_available", lambda: True)
    found = load_splits(task_of(tmp_path, [row(number) for number in range(5)])).duplicates
    assert found is not None and found.near_repeated is None
    assert "near duplicates are not looked for among 5 training samples, more than 4" in caplog.text


# Samples of large files, kept for other processes


SAMPLES = [
    Sample("a", "Wie geht's?", " gut 𝔘\n", ("gut 𝔘",)),
    Sample("b", "p", "a", ("one", "two"), (("system", "s"), ("user", "u"), ("assistant", "x")), "g", ("x", "y")),
    Sample("c", "p", "a", ("a",), (("user", "u"), ("assistant", "x"), ("user", "v"), ("assistant", "y"))),
    *(Sample(str(number), f"{number}?", str(number), (str(number),)) for number in range(30)),
]


@pytest.mark.parametrize("samples", [SAMPLES, SAMPLES[:2], []], ids=["all", "one answer each", "none"])
def test_kept_samples_are_those_that_were_read(samples: list[Sample], tmp_path: Path, monkeypatch):
    monkeypatch.setattr(stored, "ROWS", 7)
    stored.write_samples(samples, tmp_path / "pool.arrow")
    kept = stored.StoredSamples(tmp_path / "pool.arrow")
    assert list(kept) == samples and len(kept) == len(samples)
    assert [kept[at] for at in range(-len(samples), len(samples))] == samples * 2
    assert (kept[1:20], kept[::-2], kept[5:2]) == (samples[1:20], samples[::-2], samples[5:2])
    assert data_digest(kept) == data_digest(samples) and several_answers(kept) == several_answers(samples)
    with pytest.raises(IndexError):
        kept[len(samples)]


def test_samples_of_large_files_are_read_once_for_all_processes_and_again_when_a_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    rows = [row(number % 18) for number in range(20)]
    task = task_of(tmp_path, rows, [row(0), row(900)], dev_size=3, deduplicate="exact")
    read, keep = load_splits(task), tmp_path / "samples"
    monkeypatch.setattr(stored, "LARGE", 100)

    def in_a_new_process() -> Splits:
        monkeypatch.setattr(splits_module, "_last", {})
        caplog.clear()
        return load_splits(task, folder=keep)

    for turn in range(2):
        splits = in_a_new_process()
        assert (list(splits.pool), splits.dev, splits.test) == (read.pool, read.dev, read.test)
        assert splits.dropped == read.dropped == 3 and splits.test_prompts_in_pool == 0
        assert splits.duplicates is not None and read.duplicates is not None
        assert splits.duplicates.counts() == read.duplicates.counts()
        assert "2 repeat" in caplog.text, "every process says what was found"
        if turn == 0:
            monkeypatch.setattr(Task, "rows", lambda *_: pytest.fail("read again"))
    monkeypatch.undo()
    monkeypatch.setattr(stored, "LARGE", 100)
    task_of(tmp_path, [row(30), *rows], [row(0), row(900)])
    assert len(in_a_new_process().pool) == len(read.pool) + 1


def test_samples_that_cannot_be_kept_are_read_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stored, "LARGE", 1)
    task = task_of(tmp_path, [row(number) for number in range(5)])
    (tmp_path / "file").touch()
    assert len(load_splits(task, folder=tmp_path / "file").pool) == 5
    monkeypatch.setattr(splits_module, "_last", {})
    monkeypatch.setattr(stored, "write_samples", Mock(side_effect=OSError(28, "No space left on device")))
    assert len(load_splits(task, folder=tmp_path / "samples").pool) == 5
    assert [*(tmp_path / "samples").glob("*.lock")] == [*(tmp_path / "samples").iterdir()]
