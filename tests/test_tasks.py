"""Every task runs from rows in its own public schema to its own metrics."""

import json
from pathlib import Path

import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from support.hub_server import ROWS

from staff.data.task import Task
from staff.errors import UserError
from staff.models.spec import ModelSpec

METRICS = {
    "bioinstruct": {"rougeL", "rouge1", "rouge2"},
    "wmt19_kk_en": {"rougeL", "bleu", "chrf"},
    "gsm8k": {"exact_match", "rougeL"},
    "file": {"rougeL"},
    "dialogsum": {"rougeL", "rouge1", "rouge2"},
}


@pytest.mark.parametrize("task", sorted(ROWS))
def test_a_task_runs_end_to_end_and_tells_of_test_samples_that_are_in_the_pool(run, tmp_path: Path, task: str):
    for split, numbers in (("train", range(8)), ("test", range(7, 9))):
        lines = "".join(json.dumps(ROWS[task](i)) + "\n" for i in numbers)
        (tmp_path / f"{split}.jsonl").write_text(lines)
    record = run(f"task={task}", f"task.data_dir={tmp_path}", "method=random")
    assert set(record["metrics"]) == METRICS[task] | {"nll", "output_tokens"}
    assert record["counts"]["selected"] == 2 and record["counts"]["test"] == 2
    assert record["counts"]["test_prompts_in_pool"] == 1


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", overrides=list(overrides))


@pytest.mark.parametrize("family", sorted(file.stem for file in (ROOT / "conf/family").glob("*.yaml")))
def test_dialogsum_is_the_excerpt_beside_the_embedded_models_and_the_whole_for_every_other(family: str):
    files = {"id_field": "fname", "references": ["summary1", "summary2", "summary3"]}
    if family in ("tiny", "tiny_small"):
        expected = {"data_dir": "pkg://staff/assets/dialogsum", **files}
    else:
        expected = {"data_dir": None, "hub": "knkarthick/dialogsum", "id_field": "id", "references": []}
    for preset in ([], ["experiment=table1"]):
        task = OmegaConf.to_container(composed(*preset, f"family={family}").task, resolve=True)
        assert isinstance(task, dict) and {name: task[name] for name in expected} == expected
        Task(**{name: value for name, value in task.items() if name != "_target_"})
    for own in ("task.data_dir=/data", "task.train_file=[/data/a.jsonl,/data/b.jsonl]"):
        task = OmegaConf.to_container(composed(f"family={family}", own).task, resolve=True)
        assert isinstance(task, dict) and {name: task[name] for name in files} == files, "files of one's own"
        assert task["data_dir"] in ("/data", expected["data_dir"])


def test_a_family_of_the_hub_without_a_network_says_how_to_give_the_data_before_a_model_is_asked_for(
    run, monkeypatch
):
    monkeypatch.setattr(ModelSpec, "pinned", lambda self: pytest.fail("a model was asked for"))
    with pytest.raises(UserError, match=r"'knkarthick/dialogsum' cannot be had .* give task.data_dir=FOLDER"):
        run("experiment=table1", "family=gemma", "method=random")


def test_each_task_has_the_published_learning_rate_and_the_tiny_family_its_own():
    def rate(*overrides: str) -> float:
        return composed(*overrides).finetune.learning_rate

    published = "family=smollm2"
    assert rate("task=dialogsum", published) == 1e-4 and rate("task=wmt19_kk_en", published) == 2e-4
    assert rate("task=wmt19_kk_en") == rate("task=dialogsum") != 1e-4, "the tiny family's own"
    assert rate("finetune=full") == 2e-5, "nor does the family's LoRA rate reach full fine-tuning"
    assert rate("finetune.learning_rate=0.5") == 0.5
