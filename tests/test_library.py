"""Use without Hydra: what staff/README.md shows works as written, and chooses what the application chooses."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from baselines.random import Random
from baselines.staff_official import StaffOfficial
from experiments.setup import Setup
from experiments.single import Run
from staff import ArrayPool, Coreset, FinetuneSettings, ModelSpec, Staff, UserError, dataset_pool, select
from staff.pool import Select

TINY = ROOT / "staff/assets/tiny"
*_, OF_DATASET, OF_OBJECTS, OF_SCORES = re.findall(
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
