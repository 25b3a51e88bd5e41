"""Every method and every family on the embedded models or tiny ones, and what they cost."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from support.tiny import CONF, FAMILIES, composed, config_of, method_named, tiny_pool, told_and_peak

from staff.errors import UserError
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
    "staff_fast": ("effort, small_once@online", "effort, target"),
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
TASKS = ("dialogsum", "gsm8k")


class EstimatingStore(Store):
    """Estimates every stage, as a plan does."""

    def carry_out(self, stage: Stage, folder: Path, meter: Meter, inputs: list[Artifact]) -> None:
        stage.estimate(folder, meter, *inputs)


def small_gsm8k(folder: Path) -> list[str]:
    """Overrides for word problems as GSM8K has them, with solutions of one to three steps."""
    rows = []
    for i in range(2 * SIZE):
        a, b, steps = i % 9 + 2, i % 7 + 3, i % 3 + 1
        solution = [f"Day {k} has {a} * {b} = <<{a}*{b}={a * b}>>{a * b} apples." for k in range(1, steps + 1)]
        question = f"Child {i} picks {a} baskets of {b} apples on each of {steps} days. How many apples is that?"
        rows.append({"question": question, "answer": "\n".join([*solution, f"#### {a * b * steps}"])})
    for split in ("train", "test"):
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["task=gsm8k", f"task.data_dir={folder}"]


@pytest.fixture(scope="module", params=TASKS)
def pool(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    task = small_gsm8k(tmp_path_factory.mktemp("data")) if request.param == "gsm8k" else []
    return tiny_pool(tmp_path_factory.mktemp("store"), SIZE, overrides=task)


@pytest.fixture(scope="module")
def planned(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return replace(pool, store=EstimatingStore(tmp_path_factory.mktemp("plan")))


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
        if of.endswith("@online"):
            labels.add(without_counts(pool.training(of.removesuffix("@online"), online="last_v_b").label))
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


@pytest.mark.parametrize("shown", [1, 5])
def test_data_whisperer_runs_where_its_demonstrations_fit_and_says_how_many_do_where_not(pool: Pool, shown: int):
    method: Any = replace(method_named("data_whisperer"), demonstrations=shown, rounds=1)  # type: ignore[type-var]
    dialogues = pool.slices["pool"].target.lengths.max() > 200
    said = r"^5 demonstrations, .* positions, for 1 demonstration of any length: set method.demonstrations=1\."
    with pytest.raises(UserError, match=said) if dialogues and shown > 1 else nullcontext():
        chosen = pool.store.get(Select(method, pool, 10))
        assert len(Coreset.load(chosen.path).indices) == 10


def test_methods_that_read_a_file_select_what_it_says_and_the_oracle_needs_a_planted_pool(
    pool: Pool, tmp_path: Path
):
    scores, ids = tmp_path / "scores.json", tmp_path / "ids.json"
    scores.write_text(json.dumps({sample: float(i) for i, sample in enumerate(pool.ids)}))
    ids.write_text(json.dumps(list(pool.ids[:10])))
    for name, file, expected in (("imported", scores, range(30, 40)), ("precomputed", ids, range(10))):
        method = instantiate(composed(f"method={name}", f"method.path={file}").method)
        assert list(Coreset.load(pool.store.get(Select(method, pool, 10)).path).indices) == list(expected)
    with pytest.raises(Exception, match="method=oracle needs a pool with known defects") as raised:
        method_named("oracle")
    assert isinstance(raised.value.__cause__, UserError)


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
