"""The library in a few lines, and scores of a file as a table in one command."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from support.processes import here

from baselines.imported import Imported
from baselines.random import Random
from baselines.staff_official import StaffOfficial
from experiments import score as command
from experiments.score import score
from experiments.setup import Setup
from experiments.single import Run
from staff import ArrayPool, Coreset, FinetuneSettings, ModelSpec, Staff, UserError, dataset_pool, select
from staff.pool import Select
from staff.runtime.files import original

# ---------------------------------------------------------------- the library


TINY = ROOT / "staff/assets/tiny"
OF_DATASET, OF_OBJECTS, OF_SCORES, *_ = re.findall(
    r"```python\n(.*?)```", (ROOT / "staff/README.md").read_text(), re.S
)
ROWS = [{"prompt": f"{i} + 1 =", "completion": f" {i + 1}"} for i in range(8)]


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where the README's paths lead to the real files, and what it writes is thrown away."""
    (tmp_path / "staff").symlink_to(ROOT / "staff")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def executed(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def test_a_data_set_is_selected_from_as_the_readme_shows_and_as_the_application_does(checkout: Path):
    names = executed(OF_DATASET)
    chosen = [json.loads(line)["fname"] for line in (checkout / "coreset.jsonl").read_text().splitlines()]
    published = {"learning_rate": 1e-4, "epochs": 4, "small_epochs": 3, "max_length": 1024, "length_grouped": False}
    settings = [f"finetune.{name}={str(value).lower()}" for name, value in published.items()]
    overrides = ["task.train_limit=32", "pruning_rate=0.9", f"results_dir={checkout / 'results'}", *settings]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        run = Run(Setup.of(compose("config", overrides=overrides), {}))
    selected = run.store.find(run.selection)
    assert selected is not None, "one store for both"
    ids = [run.pool.ids[i] for i in Coreset.load(selected.path).indices]
    assert ids == chosen and len(ids) == len(names["coreset"].indices) == 3


def test_models_at_hand_are_selected_by_as_the_readme_shows_and_stay_as_they_are(checkout: Path):
    from transformers import AutoModelForCausalLM

    names = executed(OF_OBJECTS)
    assert len(names["coreset"].indices) == 10
    before = AutoModelForCausalLM.from_pretrained(TINY / "target").state_dict()
    after = names["model"].state_dict()
    assert before.keys() == after.keys() and all(before[name].equal(after[name]) for name in before)
    again = dataset_pool(names["data"], target=(names["model"], names["tokenizer"]))
    chosen = again.store.find(Select(names["EL2N"](), again, 10))
    assert chosen is not None, "known by their content"
    assert Coreset.load(chosen.path).indices.tolist() == names["coreset"].indices.tolist()
    assert "fine-tune target on 20 samples" in [charge.label for charge in chosen.charged().values()]


def test_a_model_with_other_weights_is_another(tmp_path: Path):
    import torch

    spec = ModelSpec(str(TINY / "small"))
    model, tokenizer = spec.load(), spec.tokenizer()
    first = dataset_pool(ROWS, (model, tokenizer), store=tmp_path).family.target
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    second = dataset_pool(ROWS, (model, tokenizer), store=tmp_path).family.target
    assert first.identity() != second.identity()
    assert second.load().state_dict().keys() == model.state_dict().keys()


def test_a_model_with_an_adapter_is_refused(tmp_path: Path):
    from staff.models.adapters import LoraSpec, fresh_lora

    spec = ModelSpec(str(TINY / "small"))
    with pytest.raises(UserError, match="has an adapter or packed weights: merge or unpack it, or give its path"):
        dataset_pool(ROWS, (fresh_lora(spec.load(), LoraSpec(2, 4), 0), spec.tokenizer()), store=tmp_path)


def test_arrays_of_scores_are_selected_from_as_the_readme_shows(capsys: pytest.CaptureFixture):
    names = executed(OF_SCORES)
    coreset = names["coreset"]
    assert len(coreset.indices) == 1000 and "ratio" in capsys.readouterr().out
    probed = np.isfinite(coreset.scores["verified"])
    scores = {("effort", "small"): names["small"], ("effort", "target"): np.where(probed, names["target"], np.nan)}
    again = select(ArrayPool(names["ids"], scores), Staff(), pruning_rate=0.9)
    assert 0 < probed.sum() <= 500 and (again.indices == coreset.indices).all()


def test_bad_rows_rates_and_samples_that_do_not_fit_are_refused(tmp_path: Path):
    target = str(TINY / "target")
    with pytest.raises(UserError, match=r"row 8: no field 'completion' .*; it has prompt"):
        dataset_pool([*ROWS, {"prompt": "9"}], target, store=tmp_path)
    with pytest.raises(UserError, match=r"max_length=3 would cut the answer of 8 sample"):
        dataset_pool(ROWS, target, finetune=FinetuneSettings(max_length=3), store=tmp_path)
    with pytest.raises(UserError, match=r"pruning_rate=1.5 is outside \[0, 1\)"):
        select(ArrayPool(["a"], {}), Random(), pruning_rate=1.5)
    with pytest.raises(UserError, match=r"ids\[1\]=1 must be text"):
        ArrayPool(["0", 1], {})  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="ids must be unique"):
        ArrayPool(["a", "a"], {})


def test_without_a_small_model_the_target_stands_in_and_who_asks_it_is_told(tmp_path: Path, caplog):
    pool = dataset_pool(ROWS, str(TINY / "small"), store=tmp_path, finetune=FinetuneSettings(small_epochs=1))
    pool.ask("loss", of="target")
    assert "the small model is the target" not in "".join(caplog.messages)
    pool.ask("loss", of="small")
    assert "the small model is the target itself" in "".join(caplog.messages)
    with pytest.raises(UserError, match="normalise='no' must be true or false"):
        select(pool, StaffOfficial(normalise="no"), 0.5)  # type: ignore[arg-type]


def test_the_seed_reaches_the_draws():
    pool = ArrayPool([f"{i}" for i in range(50)], {})
    chosen = {tuple(select(pool, Random(), 0.8, seed).indices) for seed in (0, 1, 0)}
    assert len(chosen) == 2


def test_defaults_of_fine_tuning_are_the_preset():
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=["family=gemma", "family.target.dtype=float32"])
    assert FinetuneSettings() == instantiate(cfg.finetune, _convert_="all")


def test_importing_the_library_imports_nothing_and_selecting_from_scores_no_torch():
    heavy = "{'numpy', 'pandas', 'torch', 'transformers', 'datasets', 'hydra'} & set(sys.modules)"
    code = f"import sys, staff; print({heavy}); exec(sys.argv[1]); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, OF_SCORES], cwd=ROOT, capture_output=True, text=True)
    said = done.stdout.splitlines()
    assert (said[0], said[-1]) == ("set()", "False"), done.stderr


WITHOUT = """
import importlib, pkgutil, sys
from importlib.machinery import PathFinder
find, absent = PathFinder.find_spec, {"hydra", "omegaconf", "datasets", "wandb", "rouge_score", "nltk"}

def of_others(cls, name, *where):
    return None if name.partition(".")[0] in absent else find(name, *where)

PathFinder.find_spec = classmethod(of_others)
import staff
for module in pkgutil.walk_packages(staff.__path__, "staff."):
    importlib.import_module(module.name)
from experiments.benchmarks import gpu
try:
    gpu.main()
finally:
    assert not absent & set(sys.modules), absent & set(sys.modules)
"""


def test_a_gpu_is_measured_and_the_library_imported_without_the_packages_of_a_run(tmp_path: Path):
    """Every piece: tests/stress/test_long.py."""
    command = [sys.executable, "-c", WITHOUT, "qlora", "--tiny"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "results/benchmarks/tiny/qlora.json").read_text())
    assert "transformers" in told["machine"] and "accelerate" in told["machine"]
    assert [row["result"].startswith("skipped: ") for row in told["rows"]] == [True]


# ---------------------------------------------------------------- staff-score


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


def table_of(data: Path, name: str, *overrides: str) -> Path:
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
    with pytest.raises(UserError, match="--config-dir nowhere is not a folder"):
        score([*own_words, f"out={data}/mine.csv"], "nowhere")


def test_a_table_has_a_row_a_sample_and_its_scores_as_the_model_computes_them(data: Path):
    table = pd.read_parquet(table_of(data, "one.parquet", "signal=loss", "of=small_raw"))
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
    alone = pd.read_parquet(table_of(data, "two.parquet", "signal=loss", "of=small_raw", "options={prompt: false}"))
    assert (alone["loss"] != table["loss"]).all(), "answers without their prompts"


def test_every_format_holds_the_same_and_a_second_command_reads_the_store(data: Path, monkeypatch):
    what = ("signal=loss,el2n", "of=small_raw,target")
    table = pd.read_parquet(table_of(data, "all.parquet", *what))
    assert list(table.columns[2:]) == ["loss_small_raw", "el2n_small_raw", "loss_target", "el2n_target"]
    monkeypatch.setattr(ModelSpec, "load", lambda self: pytest.fail("a model was loaded"))
    lines = [json.loads(line) for line in table_of(data, "all.jsonl", *what).read_text().splitlines()]
    assert [line["id"] for line in lines] == table["id"].tolist()
    csv = pd.read_csv(table_of(data, "all.csv", *what))
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
    file = table_of(data, "scores.csv", "signal=loss", "of=small_raw")
    record = run("method=imported", f"method.path={file}", "method.column=loss", "budget=4", *own)
    chosen = pd.read_csv(record["folder"] / "coreset.csv")
    table = pd.read_parquet(table_of(data, "scores.parquet", "signal=loss", "of=small_raw"))
    assert sorted(map(original, chosen["id"])) == sorted(table.nlargest(4, "loss")["id"])
    again = Imported(str(data / "scores.parquet"), column="loss")
    assert again.by_id == pytest.approx(Imported(str(file), column="loss").by_id)


def test_a_fine_tuned_model_scores_at_every_epoch_and_a_signal_of_ones_own_is_named_by_its_class(data: Path):
    what = ("signal=staff.signals.loss.Loss", "finetune.small_epochs=2", "of=small@epochs,small@1,small")
    table = pd.read_parquet(table_of(data, "epochs.parquet", *what))
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
    said = here(command.main, "-h")
    assert said.returncode == 0 and command.USAGE in said.stdout
    wrong = here(command.main, "familly=tiny", "signal=loss", "of=target", "out=a.csv")
    assert wrong.returncode == 1 and wrong.stderr.startswith("staff: ") and wrong.stderr.count("\n") == 1
