"""A recorded coreset is handed on, and what was handed on is what the run was fine-tuned on."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import ROOT

from experiments.campaign import pack
from experiments.export import WRITERS, chosen_samples, export
from experiments.recorded import recorded_run
from staff.data.tokens import tokenize
from staff.errors import UserError
from staff.models.spec import ModelSpec

TARGET = ModelSpec("pkg://staff/assets/tiny/target")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("exported")
    shutil.copytree(ROOT / "staff/assets/dialogsum", results / "data")
    return results


@pytest.fixture
def recorded(run, results: Path) -> Path:
    """The folder of a run that is carried out once."""
    return run("method=random", f"task.data_dir={results}/data", results=results)["folder"]


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def test_a_coreset_goes_through_trl_as_the_tokens_that_the_run_was_fine_tuned_on(recorded: Path, tmp_path: Path):
    from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]

    folder = export(recorded, "jsonl", tmp_path / "coreset")
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
    ours = tokenize(chosen_samples(recorded_run(recorded)), tokenizer)
    assert trainer.train_dataset is not None and len(trainer.train_dataset) == 6
    for i, theirs in enumerate(trainer.train_dataset):
        assert [tokenizer.bos_token_id, *theirs["input_ids"]] == ours.row(i).tolist()
        assert [-100, *theirs["labels"]] == ours.labels(i).tolist()
    assert trainer.train().training_loss > 0


def test_every_format_holds_the_same_samples_and_a_card(results: Path, recorded: Path, tmp_path: Path):
    folders = {form: export(recorded, form, tmp_path / form) for form in WRITERS}
    lines = [json.loads(line) for line in (folders["jsonl"] / "train.jsonl").read_text().splitlines()]
    loaded = datasets.load_from_disk(folders["hf"])
    assert isinstance(loaded, datasets.Dataset) and loaded.to_list() == lines
    assert json.loads((folders["ids"] / "ids.json").read_text()) == [row["id"] for row in lines]
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
    first, again = export(recorded, "jsonl", tmp_path / "first"), export(tmp_path / "runs" / recorded.name, "jsonl")
    assert again == tmp_path / "runs" / recorded.name / "coreset-jsonl"
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
    command = [sys.executable, "-m", "experiments.export", str(recorded), "--format", "hf"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    data.write_text(kept)
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1
    assert "the training samples of task 'dialogsum' are no longer those that" in ended.stderr
    assert not (recorded / "coreset-hf").exists(), "nothing half-written"


def test_an_empty_coreset_is_refused(run):
    with pytest.raises(UserError, match=r"selected no sample: export a run with a coreset"):
        export(run("method=raw", "task.test_limit=1")["folder"], "ids")
