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
import pandas as pd
import pytest

from experiments.configuration import check_size
from staff.data import duplicates as duplicates_module
from staff.data import splits as splits_module
from staff.data import stored
from staff.data.duplicates import duplicates, normalised
from staff.data.samples import Sample, data_digest, several_answers
from staff.data.splits import Splits, load_splits
from staff.data.task import Task
from staff.errors import UserError
from staff.models.spec import ModelSpec
from staff.selection import Coreset, budget_of

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


def test_duplicates_are_told_apart_by_what_they_share():
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
    found = duplicates(pool, [sample(asked([*apart[0], "more"]))])
    assert found.repeated.tolist() == [] and found.held_out.tolist() == []
    assert found.near_repeated is not None and found.near_repeated.tolist() == [7]
    assert found.near_held_out is not None and found.near_held_out.tolist() == [1]
    assert found.to_drop("exact").tolist() == [] and found.to_drop("near").tolist() == [1, 7]


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


# Without evaluation, and a budget as a count


def test_a_run_without_evaluation_ends_with_the_coreset_and_its_costs_and_reads_no_test_split(run, tmp_path: Path):
    task_of(tmp_path, [row(number) for number in range(24)])
    (tmp_path / "test.jsonl").unlink()
    data = ["task=file", f"task.data_dir={tmp_path}", "task.prompt='{question}'", "task.answer=' {answer}'"]
    record = run(*data, "method=staff", "evaluation=none", "task.deduplicate=exact")
    assert record["coreset"]["size"] == 6 and record["overhead"]["flops"] > 0
    assert record["metrics"] == {} and record["finetuning"] is None and record["evaluation"] is None
    assert record["counts"]["test"] == record["counts"]["trained"] == 0
    assert record["duplicates"]["repeated"] == 0
    names = {path.name for path in record["folder"].iterdir()}
    assert {"coreset.csv", "samples.parquet", "metrics.json"} <= names and "predictions.parquet" not in names
    assert record["run"]["fingerprint"] in record["folder"].joinpath("metrics.json").read_text()
    assert "nll" in record["config"]["task"]["metrics"], "which is not asked, since it reads references"
    made = {path.name for path in (tmp_path / "results/artifacts").iterdir()}
    assert "evaluation" not in made and "coreset" in made
    with pytest.raises(UserError, match=r"test.jsonl does not exist"):
        run(*data, "method=staff")


def test_a_select_only_record_is_printed_and_exported_and_left_out_of_the_report(run, tmp_path: Path):
    from experiments.export import export
    from experiments.report import overview
    from experiments.report.records import collect

    folder = run("method=random", "evaluation=none")["folder"]
    assert "random" in overview([folder])
    exported = export(folder, "trl", tmp_path / "out")
    assert len((exported / "train.jsonl").read_text().splitlines()) == 6
    assert collect(tmp_path / "results").empty


def test_exported_rows_are_those_of_the_file_with_all_fields_and_their_numbers(run, tmp_path: Path):
    from experiments.export import export

    rows = [
        {**row(number // 2), "source": f"book {number}", "nested": {"n": [number, None]}} for number in range(40)
    ]
    task_of(tmp_path, rows)
    data = [
        f"task.data_dir={tmp_path}",
        "task.prompt='{question}'",
        "task.answer=' {answer}'",
        "task.train_limit=40",
    ]
    more = ["task.deduplicate=exact", "task.dev_size=5", "pruning_rate=0.5", "evaluation=none"]
    folder = run("task=file", *data, *more, "method=random")["folder"]
    out = export(folder, "rows", tmp_path / "out")
    table = pd.read_csv(out / "rows.csv")
    exported = [json.loads(line) for line in (out / "train.jsonl").read_text("utf-8").splitlines()]
    assert len(table) == 7 and exported == [rows[number - 1] for number in table["row"]]
    chosen = pd.read_csv(folder / "coreset.csv")
    assert table["id"].tolist() == chosen["id"].tolist()


def test_exported_conversations_are_messages(run, tmp_path: Path):
    from experiments.export import export

    turns = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}] for n in range(12)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"messages": some}) + "\n" for some in turns))
    run_folder = run("task=file", f"task.data_dir={tmp_path}", "evaluation=none", "method=random")["folder"]
    out = export(run_folder, "trl", tmp_path / "out")
    exported = [json.loads(line) for line in (out / "train.jsonl").read_text("utf-8").splitlines()]
    assert len(exported) == 3 and all(row["messages"] in turns for row in exported)


def test_the_same_selection_is_made_once_with_and_without_evaluation(run, tmp_path: Path):
    records = [run("method=staff", *more) for more in ([], ["evaluation=none"])]
    assert records[0]["coreset"]["fingerprint"] == records[1]["coreset"]["fingerprint"]
    assert records[0]["run"]["fingerprint"] != records[1]["run"]["fingerprint"]
    assert not any(stage["computed"] for stage in records[1]["overhead"]["stages"])


def test_a_budget_is_so_many_samples_and_the_rate_that_they_come_to(run):
    by_count, by_rate = run("method=random", "budget=6"), run("method=random", "pruning_rate=0.75")
    assert by_count["coreset"] == by_rate["coreset"] and by_count["run"]["pruning_rate"] == 0.75
    assert by_count["run"]["fingerprint"] == by_rate["run"]["fingerprint"]
    assert by_count["config"]["budget"] == 6


@pytest.mark.parametrize("budget", [0, -1, 25, "'1000'", 2.5, "true"])
def test_a_budget_that_the_pool_cannot_give_is_refused(run, budget: object):
    with pytest.raises(UserError, match=r"budget=.* must be a whole number of at least 1 and at most 24, the pool"):
        run("method=random", f"budget={budget}")


def test_a_method_with_a_size_of_its_own_needs_no_budget():
    from baselines.full import Full

    assert budget_of(Full(), 0.9, 10, 3) == 10 and budget_of(object(), 0.9, 10, 3) == 3  # type: ignore[arg-type]


def test_a_budget_in_tokens_is_not_exceeded_and_recorded(run):
    record = run("method=staff", "budget_tokens=900", "method.num_regions=3", "method.verification_budget=1")
    counts = record["counts"]
    assert 0 < counts["selected_tokens"] <= 900 < counts["pool_tokens"]
    assert counts["selected"] == counts["budget"] == counts["trained"] > 1
    assert "-staff-t900-s0-" in record["run"]["name"]
    assert record["run"]["pruning_rate"] == pytest.approx(1 - 900 / counts["pool_tokens"])
    asked = [stage["label"] for stage in record["overhead"]["stages"]]
    assert len(asked) == len(set(asked)) == 4, "every signal is computed and charged once"
    again = run("method=random", f"budget={counts['selected']}")
    assert again["counts"]["selected"] == counts["selected"]
    assert run("method=full", "budget_tokens=900")["counts"]["selected"] == counts["pool"], "it takes everything"


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["budget_tokens=0"], "budget_tokens=0 must be null or a whole number of at least 1"),
        (["budget_tokens=many"], "budget_tokens='many' must be null or a whole number"),
        (["budget_tokens=3"], r"budget_tokens=3 holds no sample: the shortest of the pool has \d+ tokens"),
        (["budget_tokens=900", "budget=3"], "budget=3 and budget_tokens=900 both set the size of the coreset"),
    ],
)
def test_a_budget_in_tokens_that_cannot_be_is_refused_before_a_model_loads(run, monkeypatch, overrides, sentence):
    monkeypatch.setattr(ModelSpec, "load", lambda self: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match=sentence):
        run("method=el2n", *overrides)


def test_a_job_sets_the_size_of_its_coreset_once():
    check_size(["method=staff", "pruning_rate=null", "budget_tokens=900", "budget=null"])
    with pytest.raises(UserError, match=r"pruning_rate=0.5 and budget_tokens=900 both set the size of the coreset"):
        check_size(["pruning_rate=0.5", "method=staff", "budget_tokens=900"])
