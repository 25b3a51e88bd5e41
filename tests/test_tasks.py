"""Every task runs from rows in its own public schema to its own metrics."""

import json
from pathlib import Path

import pytest
from support.hub_server import ROWS

METRICS = {
    "bioinstruct": {"rougeL", "rouge1", "rouge2"},
    "wmt19_kk_en": {"rougeL", "bleu", "chrf"},
    "gsm8k": {"exact_match", "rougeL"},
    "jsonl": {"rougeL"},
    "dialogsum_hub": {"rougeL", "rouge1", "rouge2"},
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


def test_each_task_has_the_published_learning_rate_and_the_tiny_family_its_own(run, tmp_path: Path):
    from conftest import ROOT
    from hydra import compose, initialize_config_dir

    def rate(*overrides: str) -> float:
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return compose("config", overrides=list(overrides)).finetune.learning_rate

    published = "family=smollm2"
    assert rate("task=dialogsum", published) == 1e-4 and rate("task=wmt19_kk_en", published) == 2e-4
    assert rate("task=wmt19_kk_en") == rate("task=dialogsum") != 1e-4, "the tiny family's own"
    assert rate("finetune=full") == 2e-5, "nor does the family's LoRA rate reach full fine-tuning"
    assert rate("finetune.learning_rate=0.5") == 0.5
