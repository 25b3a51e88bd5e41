"""A recorded coreset is handed on, and what was handed on is what the run was fine-tuned on."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pytest
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st

from experiments.campaign import pack
from experiments.export import WRITERS, chosen_rows, export
from experiments.recorded import recorded_run
from staff.data.tokens import tokenize
from staff.errors import UserError
from staff.models.spec import ModelSpec
from staff.runtime.files import inert, original

TARGET = ModelSpec("pkg://staff/assets/tiny/target")


@pytest.fixture
def results(recorded: Path) -> Path:
    return recorded.parents[1]


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def test_a_coreset_goes_through_trl_as_the_tokens_that_the_run_was_fine_tuned_on(recorded: Path, tmp_path: Path):
    from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]

    folder = export(recorded, "trl", tmp_path / "coreset")
    data = datasets.load_dataset("json", data_files=str(folder / "train.jsonl"), split="train")
    assert isinstance(data, datasets.Dataset) and data.column_names == ["id", "prompt", "completion"]
    arguments = SFTConfig(
        str(tmp_path / "trl"),
        max_steps=1,
        per_device_train_batch_size=2,
        max_length=512,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
    )
    tokenizer = TARGET.tokenizer()
    trainer = SFTTrainer(TARGET.load(), arguments, train_dataset=data, processing_class=tokenizer)
    ours = tokenize([chosen.sample for chosen in chosen_rows(recorded_run(recorded))], tokenizer)
    assert trainer.train_dataset is not None and len(trainer.train_dataset) == 6
    for i, theirs in enumerate(trainer.train_dataset):
        assert [tokenizer.bos_token_id, *theirs["input_ids"]] == ours.row(i).tolist()
        assert [-100, *theirs["labels"]] == ours.labels(i).tolist()
    assert trainer.train().training_loss > 0


def read_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "train.jsonl").read_text("utf-8").splitlines()]


def test_every_format_holds_the_same_samples_and_a_card(results: Path, recorded: Path, tmp_path: Path):
    folders = {form: export(recorded, form, tmp_path / form) for form in WRITERS}
    lines = read_lines(folders["jsonl"])
    loaded = datasets.load_from_disk(folders["datasets"])
    assert isinstance(loaded, datasets.Dataset) and loaded.to_list() == lines
    assert pd.read_parquet(folders["parquet"] / "train.parquet").to_dict("records") == lines
    ids = [row["staff_id"] for row in lines]
    assert json.loads((folders["ids"] / "ids.json").read_text()) == ids
    assert [row["id"] for row in read_lines(folders["trl"])] == ids
    assert read_lines(folders["rows"]) == [
        {name: value for name, value in row.items() if not name.startswith("staff_")} for row in lines
    ]
    record = record_of(recorded)
    for folder in folders.values():
        card = (folder / "README.md").read_text()
        assert card.startswith("# 6 samples of dialogsum, chosen by random\n")
        for fact in (
            "6 of 24, pruning rate 0.75",
            record["run"]["fingerprint"],
            record["coreset"]["fingerprint"],
            f"rougeL {record['metrics']['rougeL']:.2f}",
            "**Licence**: the texts come from train.jsonl of dialogsum",
        ):
            assert fact in card
        assert str(results) not in card, "no folder of whoever made it"


def test_the_coreset_of_a_packed_run_is_that_of_its_folder(recorded: Path, tmp_path: Path):
    pack({recorded.name: recorded_run(recorded)}, tmp_path)
    first, again = export(recorded, "trl", tmp_path / "first"), export(tmp_path / "runs" / recorded.name, "trl")
    assert again == tmp_path / "runs" / recorded.name / "coreset-trl"
    for file in ("train.jsonl", "README.md"):
        assert (first / file).read_text() == (again / file).read_text()


def test_an_exported_list_of_ids_fine_tunes_as_the_run_did(run, results: Path, recorded: Path, tmp_path: Path):
    ids = export(recorded, "ids", tmp_path / "ids") / "ids.json"
    again, record = run("method=precomputed", f"method.path={ids}", results=results), record_of(recorded)
    assert again["finetuning"]["fingerprint"] == record["finetuning"]["fingerprint"]
    assert again["metrics"] == record["metrics"]


def test_what_cannot_be_exported_is_refused_in_a_sentence(results: Path, recorded: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"nothing holds no metrics.json .*: name the folder of a recorded run"):
        export(tmp_path / "nothing", "jsonl")
    (tmp_path / "here").mkdir()
    with pytest.raises(UserError, match=r"here exists: remove it, or name another folder with --output"):
        export(recorded, "jsonl", tmp_path / "here")

    data = results / "data/train.jsonl"
    kept = data.read_text()
    data.write_text(kept.replace("#Person1#", "#Person9#", 1))
    command = [sys.executable, "-m", "experiments.export", str(recorded), "--format", "datasets"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    data.write_text(kept)
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1
    assert "the training samples of task 'dialogsum' are no longer those that" in ended.stderr
    assert not (recorded / "coreset-datasets").exists(), "nothing half-written"


def test_an_empty_coreset_is_refused(run):
    with pytest.raises(UserError, match=r"selected no sample: export a run with a coreset"):
        export(run("method=raw", "task.test_limit=1")["folder"], "ids")


def test_rows_go_with_their_number_region_and_scores_and_lose_no_field(run, results: Path, tmp_path: Path):
    lines = (results / "data/train.jsonl").read_text("utf-8").splitlines()[:24]
    rows = [{**json.loads(line), "staff_row": f"mine {i}", "=1+1": [i]} for i, line in enumerate(lines)]
    del rows[3]["topic"]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [f"task.data_dir={tmp_path}", "evaluation=none", "pruning_rate=0.5"]
    run_folder = run("method=staff", "method.num_regions=3", "method.verification_budget=1", *data)["folder"]
    exported = read_lines(export(run_folder, "jsonl", tmp_path / "out"))
    pool = pd.read_parquet(run_folder / "samples.parquet").set_index("id")
    regions = pd.read_csv(run_folder / "regions.csv").set_index("region")
    assert {row["staff_staff_id"] for row in exported} == set(pool.index[pool["selected"]])
    for row in exported:
        own = {name: value for name, value in row.items() if not name.startswith("staff_staff_")}
        assert own == rows[row["staff_staff_row"] - 1]
        score = pool.loc[row["staff_staff_id"], "speculative"]
        assert row["staff_staff_speculative"] == score
        bounds = regions.loc[row["staff_staff_region"]]
        assert bounds["low"] - 1e-9 <= score <= bounds["high"] + 1e-9
        assert row["staff_staff_verified"] is None or row["staff_staff_verified"] > 0
    assert Counter(row["staff_staff_region"] for row in exported) == regions["picked"][lambda n: n > 0].to_dict()
    table = export(run_folder, "datasets", tmp_path / "table")
    assert "staff_staff_region" in datasets.load_from_disk(table).column_names  # type: ignore[operator]


def test_a_field_of_several_types_is_named_where_a_table_cannot_hold_it(run, tmp_path: Path):
    rows = [{"prompt": f"{i}?", "answer": f"{i}", "mixed": i if i % 2 else "text"} for i in range(24)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["task=file", f"task.data_dir={tmp_path}", "evaluation=none", "pruning_rate=0.25"]
    run_folder = run("method=random", *data)["folder"]
    with pytest.raises(UserError, match=r"field 'mixed' has no one type .*choose --format jsonl"):
        export(run_folder, "parquet", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert len(read_lines(export(run_folder, "jsonl", tmp_path / "out"))) == 18


@given(st.text())
def test_a_cell_is_a_number_or_no_formula_and_gives_its_text_back(text: str):
    cell = inert(text)
    if cell[:1] in ("=", "+", "-", "@", "\t", "\r"):
        float(cell)  # of what is no number it raises
    assert original(cell) == text


def row(number: int) -> dict[str, Any]:
    return {"question": f"What is {number} plus {number}?", "answer": f"It is {2 * number}.", "id": f"r{number}"}


def write(folder: Path, train: list[dict[str, Any]]) -> None:
    for name, rows in (("train", train), ("test", [row(900)])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_exported_rows_are_those_of_the_file_with_all_fields_and_their_numbers(run, tmp_path: Path):
    from experiments.export import export

    rows = [
        {**row(number // 2), "source": f"book {number}", "nested": {"n": [number, None]}} for number in range(40)
    ]
    write(tmp_path, rows)
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


def test_data_that_was_named_relative_to_another_folder_is_refused_with_its_name(run, tmp_path: Path, monkeypatch):
    rows = "".join(json.dumps({"question": f"{n}?", "answer": str(n)}) + "\n" for n in range(8))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/train.jsonl").write_text(rows)
    monkeypatch.chdir(tmp_path)
    folder = run("method=random", "evaluation=none", "task=file", "task.data_dir=mine")["folder"]
    assert [
        json.loads(line)["question"] for line in (export(folder, "jsonl", tmp_path / "a") / "train.jsonl").open()
    ]
    monkeypatch.chdir("/")
    with pytest.raises(UserError, match="it was named as mine, relative to the folder where the run"):
        export(folder, "jsonl", tmp_path / "b")
