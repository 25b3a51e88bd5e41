"""Every method and every family on the embedded models or tiny ones, and what they cost."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from support.tiny import CONF, FAMILIES, config_of, method_named, tiny_pool, told_and_peak

from staff.models.spec import ModelSpec
from staff.pool import Pool, Select
from staff.selection import Coreset, budget_of
from staff.store.cost import Meter
from staff.store.manifest import Artifact
from staff.store.stage import Stage
from staff.store.store import Store

FUSED = ("gpt2", "falcon", "bloom", "gpt_neox", "phi3", "mamba")
"""Families without a `v_proj`."""


def save_model(family: str, folder: Path) -> Path:
    """The tiny model of a family with its tokenizer, in a folder."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config_of(family)).save_pretrained(folder)
    ModelSpec("pkg://staff/assets/tiny/target").tokenizer().save_pretrained(folder)
    return folder


# ---------------------------------------------------------------- methods


ASKS = {
    "aum": ("margin, small@epochs",),
    "cartography": ("probability, small@epochs",),
    "ccs": ("el2n, target_tuned",),
    "d2": ("el2n, embedding, target_tuned",),
    "delift": ("distance, target",),
    "delift_official": ("distance, target",),
    "el2n": ("el2n, target_tuned",),
    "facility_location": ("embedding, small",),
    "facility_location_official": ("embedding, small",),
    "forgetting": ("correct, small@epochs",),
    "forgetting_official": ("correct, small@epochs",),
    "full": (),
    "grand": ("effort, target_tuned",),
    "ifd": ("loss, target",),
    "k_center": ("embedding, target",),
    "k_center_official": ("embedding, target",),
    "kmeans_coverage": ("embedding, target",),
    "less": ("projected_gradient, warmup@epochs",),
    "less_paper": ("projected_gradient, warmup@epochs",),
    "leave_out": ("effort, small", "effort, target"),
    "longest": (),
    "moderate": ("embedding, target",),
    "moderate_official": ("embedding, target",),
    "perplexity": ("loss, target",),
    "perplexity_official": ("loss, target",),
    "prototypes": ("embedding, target",),
    "random": (),
    "random_length": ("effort, small", "effort, target"),
    "random_matched": ("effort, small", "effort, target"),
    "raw": (),
    "rds_plus": ("embedding, target",),
    "rds_plus_official": ("embedding, target",),
    "rs2": (),
    "s2l": ("loss, small@epochs",),
    "s2l_official": ("loss, small@epochs",),
    "shortest": (),
    "staff": ("effort, small", "effort, target"),
    "staff_debiased": ("effort, small", "effort, target"),
    "staff_fast": ("effort, small@online", "effort, target"),
    "staff_official": ("effort, small", "effort, target"),
    "staff_paper": ("effort, small", "effort, target"),
    "superfiltering": ("loss, small_raw",),
    "tsds": ("embedding, small",),
    "tsds_official": ("embedding, small",),
    "within_groups": ("effort, small", "effort, target"),
}
"""The signals that a preset asks for, and the model that it asks."""

NEED_A_FILE = {"precomputed", "imported", "oracle"}  # or a planted task
GENERATE = {"data_whisperer"}  # answers whose lengths no plan knows, and whose prompts need short samples
SIZE, PRUNING_RATE = 40, 0.75


class EstimatingStore(Store):
    """Estimates every stage, as a plan does."""

    def carry_out(self, stage: Stage, folder: Path, meter: Meter, inputs: list[Artifact]) -> None:
        stage.estimate(folder, meter, *inputs)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return tiny_pool(tmp_path_factory.mktemp("store"), SIZE)


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return tiny_pool(EstimatingStore(tmp_path_factory.mktemp("plan")), SIZE)


def carried_out(name: str, pool: Pool) -> tuple[Artifact, dict[str, float]]:
    """The coreset's artefact, and the FLOPs of every stage that is charged to it by its label."""
    method = method_named(name)
    chosen = pool.store.get(Select(method, pool, budget_of(method, PRUNING_RATE, SIZE)))
    charges = [charge for charge in chosen.charged().values() if charge.stage != "coreset"]
    return chosen, {charge.label: charge.cost.flops for charge in charges}


def expected_labels(name: str, pool: Pool) -> set[str]:
    """Those of the passes and fine-tunings behind what a preset asks, without the number of samples."""
    labels = set()
    for asked in ASKS[name]:
        signals, _, of = asked.rpartition(", ")
        if of == "small@online":
            labels.add(without_counts(pool.training("small", online="last_v_b").label))
            continue
        for state in pool.states(of):
            labels.add(f"{signals} of samples, {state.words}")
            labels |= {without_counts(stage.label) for stage in state.inputs}
    return labels


def without_counts(label: str) -> str:
    return re.sub(r" \d+ samples", " samples", label)


def test_every_preset_is_listed():
    presets = {path.stem for path in (CONF / "method").glob("*.yaml")}
    assert set(ASKS) | GENERATE == presets - NEED_A_FILE


@pytest.mark.parametrize("name", ASKS)
def test_every_method_selects_its_budget_is_charged_for_what_it_asks_and_costs_what_was_planned(
    name: str, pool: Pool, planned: Pool
):
    chosen, flops = carried_out(name, pool)
    method = method_named(name)
    assert len(Coreset.load(chosen.path).indices) == budget_of(method, PRUNING_RATE, SIZE)
    assert {without_counts(label) for label in flops} == expected_labels(name, pool)
    assert all(value > 0 for value in flops.values())
    again, same = carried_out(name, pool)
    assert not again.computed and same == flops
    _, plan = carried_out(name, planned)
    assert {without_counts(label) for label in plan} == {without_counts(label) for label in flops}
    for label in plan.keys() & flops.keys():
        assert plan[label] == pytest.approx(flops[label], rel=1e-6), label


# ---------------------------------------------------------------- families


METHODS = ("random", "staff", "el2n", "grand", "d2", "s2l", "k_center")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_runs_with_every_kind_of_method(run: Any, models: Path, family: str, method: str):
    folder = models / family
    if not folder.exists():
        save_model(family, folder)
    overrides = [f"family.target.path={folder}", f"family.small.path={folder}", f"method={method}"]
    if method == "staff":
        overrides += ["method.num_regions=3", "method.verification_budget=2"]
    if method == "staff" and family in FUSED:
        overrides.append("method.gradient=all_lora")
    record = run(*overrides)
    assert record["counts"]["selected"] == 6
    assert record["evaluation"]["flops"] > 0


@pytest.mark.parametrize("family", FUSED)
def test_a_gradient_that_a_family_does_not_have_is_refused_before_anything_is_fine_tuned(
    run: Any, models: Path, tmp_path: Path, family: str
):
    from staff.errors import UserError

    folder = models / family
    if not folder.exists():
        save_model(family, folder)
    with pytest.raises(UserError, match="choose gradient=all_lora"):
        run(f"family.target.path={folder}", f"family.small.path={folder}", "method=staff")
    assert not list((tmp_path / "results" / "artifacts").glob("finetune/*"))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["lora", "full"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma", "gemma2", "gemma3_text"])
def test_the_estimate_of_memory_is_the_measured_peak_within_a_tenth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, architecture: str, dtype: str, kind: str, checkpointing: bool
):
    changes = {"kind": kind, "gradient_checkpointing": checkpointing}
    told, peak = told_and_peak(architecture, dtype, tmp_path, monkeypatch, **changes)
    print(f"{architecture}, {dtype}, {changes}: {told / peak:.3f} of the measured peak")
    assert told == pytest.approx(peak, rel=0.1)
