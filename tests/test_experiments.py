"""The presets of conf/experiment: every job composes, differs in one thing, and what they alone use runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from experiments.figures import strength
from experiments.sweep import expected_jobs
from staff.errors import UserError

PRESETS = {file.stem for file in (ROOT / "conf/experiment").glob("*.yaml")}
ABLATIONS = sorted(name.removeprefix("ablation_") for name in PRESETS if name.startswith("ablation_"))
# What each ablation changes, by the names that differ among its composed jobs.
CHANGED = {
    "verification": {"method.verification_budget"},
    "speculation": {"method.speculation"},
    "scoring_function": {"method.signal"},
    "small_epochs": {"finetune.small_epochs"},
    "region_similarity": {"method.num_regions"},
    "small_size": {"family.small.path"},
    "small_model_family": {"family.small.path"},
    "transfer": {"selection_family.name", "selection_family.target.path", "selection_family.small.path"},
    "fields": {"method.num_regions", "method.pick", "method.drop_hardest", "finetune.match"},
}


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Values by their dotted name."""
    if not isinstance(value, dict):
        return {name: value}
    parts = (flat(inner, f"{name}.{key}".lstrip(".")) for key, inner in value.items())
    return {key: inner for part in parts for key, inner in part.items()}


@pytest.mark.parametrize("preset", sorted(PRESETS - {f"ablation_{name}" for name in ABLATIONS}))
def test_a_preset_composes_with_every_one_of_its_methods(preset: str):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=[f"experiment={preset}"], return_hydra_config=True)
        for method in str(cfg.hydra.sweeper.params.get("method", "staff")).split(","):
            composed = compose("config", overrides=[f"experiment={preset}", f"method={method}"])
            assert callable(instantiate(composed.method, _convert_="all").select)
            instantiate(composed.finetune, _convert_="all")


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_the_jobs_of_an_ablation_differ_in_the_one_setting_that_its_comment_names(ablation: str):
    preset = f"experiment=ablation_{ablation}"
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=[preset, "pruning_rate=0.9", "seed=0"], return_hydra_config=True)
        jobs = [compose("config", overrides=job.split()) for job in expected_jobs(cfg)]
    assert len(jobs) > 1
    settings = [flat(OmegaConf.to_container(job, resolve=True)) for job in jobs]
    names = {name for each in settings for name in each}
    missing = object()
    differing = {n for n in names if any(each.get(n, missing) != settings[0].get(n, missing) for each in settings)}
    assert differing == CHANGED[ablation]
    if ablation == "fields":
        assert all(sum(each[n] != settings[0][n] for n in differing) <= 1 for each in settings), "one at a time"
    assert len({str(each) for each in settings}) == len(jobs)
    for job in jobs:
        assert callable(instantiate(job.method, _convert_="all").select)
        instantiate(job.finetune, _convert_="all")


def asked_in(record: dict[str, Any]) -> list[str]:
    return [stage["label"] for stage in record["overhead"]["stages"]]


def test_random_regions_run_without_a_small_model(run: Callable[..., dict[str, Any]]):
    record = run("experiment=ablation_speculation", "method.speculation=none", "method.num_regions=2")
    assert asked_in(record) == ["effort of 20 samples, raw target", asked_in(record)[-1]]


def test_another_scoring_function_scores_with_both_models(run: Callable[..., dict[str, Any]]):
    record = run("experiment=ablation_scoring_function", "method.signal=perplexity", "method.verification_budget=1")
    scored = [label for label in asked_in(record) if label.startswith("loss of")]
    assert scored[0] == "loss of 24 samples, fine-tuned small" and len(scored) == 2
    assert scored[1].endswith("raw target")


def test_the_strength_of_what_is_planted_is_swept_and_drawn_as_a_curve(run: Callable[..., Any], tmp_path: Path):
    few = ("task.train_limit=null", "task.size=300", "task.test_limit=7", "method=raw", "pruning_rate=1")
    for wrong in (0, 0.3):
        run("experiment=planted", *few, f"task.wrong={wrong}")
    found = strength.table(tmp_path / "results", "wrong", 1)
    assert found[["method", "wrong"]].to_numpy().tolist() == [["raw", 0.0], ["raw", 0.3]]
    drawn = strength.draw(found, "wrong", tmp_path / "strength", "a command")
    assert "task.wrong" in drawn.file.with_suffix(".svg").read_text() and drawn.file.with_suffix(".png").is_file()
    with pytest.raises(UserError, match=r"with two values of task\.repeats"):
        strength.table(tmp_path / "results", "repeats", 1)


# ---------------------------------------------------------------- a coreset of another family


OTHER = ("family@selection_family=tiny_small",)


def test_a_coreset_can_be_selected_by_another_family_and_its_record_says_so(run: Callable[..., dict[str, Any]]):
    record = run("method.verification_budget=2", *OTHER)
    assert record["run"]["name"].startswith("tiny_small-to-tiny-dialogsum-staff")
    assert record["run"]["selection_family"] == "tiny_small"
    assert record["identity"]["selection"]["models"]["small"] != record["identity"]["models"]["small"]
    asked = [stage["label"] for stage in record["overhead"]["stages"]]
    assert "fine-tune smaller on 24 samples" in asked


def test_the_target_is_the_same_whichever_family_selects(run: Callable[..., dict[str, Any]]):
    own, transferred, itself = (run("method=random", *o) for o in ((), OTHER, ("family@selection_family=tiny",)))
    assert transferred["run"]["fingerprint"] != own["run"]["fingerprint"]
    assert transferred["coreset"]["fingerprint"] != own["coreset"]["fingerprint"]
    # A random coreset is the same samples, so what follows is read, not computed again.
    assert transferred["finetuning"]["fingerprint"] == own["finetuning"]["fingerprint"]
    assert transferred["evaluation"]["fingerprint"] == own["evaluation"]["fingerprint"]
    assert itself["folder"] == own["folder"]
