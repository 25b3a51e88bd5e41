"""Scores of a file of samples as a table, in one command."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from baselines.imported import Imported
from experiments import score as command
from experiments.score import score
from staff.errors import UserError
from staff.models.spec import ModelSpec
from staff.runtime.spreadsheets import original


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scored")
    lines = (ROOT / "staff/assets/dialogsum/train.jsonl").read_text("utf-8").splitlines()[:12]
    rows = [
        {"key": f"={i}+{i}", "prompt": row["summary"], "completion": row["topic"]}
        for i, row in enumerate(map(json.loads, lines))
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def scored(data: Path, name: str, *overrides: str) -> Path:
    own = ("family=tiny", "task=file", f"task.train_file={data}/data.jsonl", "task.id_field=key")
    return score([*own, f"store_dir={data}/store", f"out={data}/{name}", *overrides])


def test_a_folder_of_ones_own_configuration_is_named_as_for_the_other_commands(data: Path, monkeypatch):
    own = data / "my, conf"
    (own / "task").mkdir(parents=True)
    (own / "task/mine.yaml").write_text(
        f"defaults: [file]\ntrain_file: {data}/data.jsonl\nid_field: key\n"
        "prompt: '{prompt}'\nanswer: ' {completion}'\n"
    )
    own_words = ("family=tiny", "task=mine", f"store_dir={data}/store", "signal=loss", "of=small_raw")
    monkeypatch.setattr(sys, "argv", ["staff-score", *own_words, "--config-dir", str(own), f"out={data}/mine.csv"])
    command.main()
    assert len(pd.read_csv(data / "mine.csv")) == 12
    with pytest.raises(UserError, match="--config-dir nowhere is no folder"):
        score([*own_words, f"out={data}/mine.csv"], "nowhere")


def test_a_table_has_a_row_a_sample_and_its_scores_as_the_model_computes_them(data: Path):
    table = pd.read_parquet(scored(data, "one.parquet", "signal=loss", "of=small_raw"))
    assert list(table.columns) == ["id", "tokens", "loss"] and table["id"].tolist() == [
        f"={i}+{i}" for i in range(12)
    ]
    small = ModelSpec("pkg://staff/assets/tiny/small")
    model, tokenizer = small.load(), small.tokenizer()
    import torch

    for row in (json.loads(line) for line in (data / "data.jsonl").read_text().splitlines()[:3]):
        prompt = [tokenizer.bos_token_id, *tokenizer(row["prompt"], add_special_tokens=False)["input_ids"]]
        answer = [*tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        ids = torch.tensor([prompt + answer])
        labels = torch.tensor([[-100] * len(prompt) + answer])
        told = table.set_index("id").loc[row["key"]]
        assert told["loss"] == pytest.approx(model(input_ids=ids, labels=labels).loss.item(), rel=1e-5)
        assert told["tokens"] == ids.shape[1]
    alone = pd.read_parquet(scored(data, "two.parquet", "signal=loss", "of=small_raw", "options={prompt: false}"))
    assert (alone["loss"] != table["loss"]).all(), "answers without their prompts"


def test_every_format_holds_the_same_and_a_second_command_reads_the_store(data: Path, monkeypatch):
    what = ("signal=loss,el2n", "of=small_raw,target")
    table = pd.read_parquet(scored(data, "all.parquet", *what))
    assert list(table.columns[2:]) == ["loss_small_raw", "el2n_small_raw", "loss_target", "el2n_target"]
    monkeypatch.setattr(ModelSpec, "load", lambda self: pytest.fail("a model was loaded"))
    lines = [json.loads(line) for line in scored(data, "all.jsonl", *what).read_text().splitlines()]
    assert [line["id"] for line in lines] == table["id"].tolist()
    csv = pd.read_csv(scored(data, "all.csv", *what))
    for name in table.columns[1:]:
        assert np.allclose([line[name] for line in lines], table[name], rtol=1e-12)
        assert np.allclose(csv[name], table[name], rtol=1e-12)
    assert csv["id"].str.startswith("'=").all(), "no spreadsheet takes an id for a formula"


def test_a_table_is_what_a_run_selects_by(data: Path, run):
    own = (
        "task=file",
        f"task.train_file={data}/data.jsonl",
        "task.id_field=key",
        "evaluation=none",
        "task.train_limit=null",
    )
    file = scored(data, "scores.csv", "signal=loss", "of=small_raw")
    record = run("method=imported", f"method.path={file}", "method.column=loss", "budget=4", *own)
    chosen = pd.read_csv(record["folder"] / "coreset.csv")
    table = pd.read_parquet(scored(data, "scores.parquet", "signal=loss", "of=small_raw"))
    assert sorted(map(original, chosen["id"])) == sorted(table.nlargest(4, "loss")["id"])
    again = Imported(str(data / "scores.parquet"), column="loss")
    assert again.by_id == pytest.approx(Imported(str(file), column="loss").by_id)


def test_a_fine_tuned_model_scores_at_every_epoch_and_a_signal_of_ones_own_is_named_by_its_class(data: Path):
    what = ("signal=staff.signals.loss.Loss", "finetune.small_epochs=2", "of=small@epochs,small@1,small")
    table = pd.read_parquet(scored(data, "epochs.parquet", *what))
    epochs = np.stack(list(table["loss_small@epochs"]))
    assert epochs.shape == (12, 2)
    assert np.allclose(epochs, table[["loss_small@1", "loss_small"]])
    assert (epochs[:, 0] != epochs[:, 1]).any()


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["signal=loss", "of=small_raw", "out=a.txt"], "out=a.txt is none of .csv, .parquet, .jsonl"),
        (["signal=loss", "out=a.csv"], "of= is missing: write it as in staff-score family=tiny"),
        (["signal=perplex", "of=target", "out=a.csv"], "signal='perplex' is unknown: choose one of effort"),
        (["signal=nowhere.Signal", "of=target", "out=a.csv"], "signal=nowhere.Signal cannot be made"),
        (["signal=loss", "of=smal", "out=a.csv"], "the model 'smal' is unknown"),
        (["signal=loss", "of=target", "out=a.csv", "options={layer: 1}"], "'loss' has no option 'layer'"),
        (["signal=loss", "of=target", "out=a.csv", "options=1"], "options=1 must map fields"),
        (["signal=embedding", "of=target", "out=a.csv"], "embedding of target is several numbers for each sample"),
        (["signal=loss", "of=small@epochs", "out=a.csv"], "loss of small@epochs is several numbers"),
    ],
)
def test_what_cannot_be_scored_is_one_sentence_before_a_model_loads(data: Path, monkeypatch, overrides, sentence):
    monkeypatch.setattr(ModelSpec, "load", lambda self: pytest.fail("a model was loaded"))
    own: list[Any] = ["task=file", f"task.train_file={data}/data.jsonl", f"store_dir={data}/store"]
    with pytest.raises(UserError, match=sentence):
        score([*own, *overrides])


def test_the_command_prints_its_file_or_a_sentence():
    said = subprocess.run(
        [sys.executable, "-m", "experiments.score", "-h"], cwd=ROOT, capture_output=True, text=True
    )
    assert said.returncode == 0 and command.USAGE in said.stdout
    wrong = subprocess.run(
        [sys.executable, "-m", "experiments.score", "familly=tiny", "signal=loss", "of=target", "out=a.csv"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert wrong.returncode == 1 and wrong.stderr.startswith("staff-score: ") and wrong.stderr.count("\n") == 1
