"""The presets of conf/experiment, runs without evaluation, and budgets."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import ROOT, SMALL
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate
from omegaconf import OmegaConf

from experiments.configuration import check_size
from experiments.dry_run import dry_run
from experiments.figures import strength
from experiments.sweep import jobs_of
from hydra_plugins.staff_sweeper import CasesSweeper
from staff.errors import UserError
from staff.models.spec import ModelSpec
from staff.selection import budget_of

# ---------------------------------------------------------------- presets


PRESETS = {file.stem for file in (ROOT / "conf/experiment").glob("*.yaml")}
ABLATIONS = {  # sweeps of single fields, by the names that differ among their composed jobs
    "experiment=ablation_fields": {
        *("finetune.match", "method.num_regions", "method.pick", "method.drop_hardest", "method.speculation"),
        *("method.signal", "method.verification_budget"),
    },
    "family@selection_family=tiny,tiny_small": {
        f"selection_family.{name}" for name in ("name", "target.path", "small.path")
    },
}


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Values by their dotted name."""
    if not isinstance(value, dict):
        return {name: value}
    parts = (flat(inner, f"{name}.{key}".lstrip(".")) for key, inner in value.items())
    return {key: inner for part in parts for key, inner in part.items()}


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_a_preset_composes_with_every_one_of_its_methods(preset: str):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=[f"experiment={preset}"], return_hydra_config=True)
        for method in str(cfg.hydra.sweeper.params.get("method", "staff")).split(","):
            composed = compose("config", overrides=[f"experiment={preset}", f"method={method}"])
            assert callable(instantiate(composed.method, _convert_="all").select)
            instantiate(composed.finetune, _convert_="all")


def ablations() -> dict[str, set[str]]:
    """The overrides of every sweep of the ablations in the README, with the names that they are to change."""
    readme = (ROOT / "experiments/README.md").read_text()
    listed = readme.partition("| `staff -m` with |")[2].partition("\n\n")[0]
    sweeps = re.findall(r"\| `([^`]+)` \|$", listed, re.M)
    named = {sweep: {sweep.partition("=")[0].partition("@")[0]} for sweep in sweeps}
    return named | ABLATIONS


@pytest.mark.parametrize("sweep", ablations())
def test_the_jobs_of_an_ablation_differ_in_the_one_setting_that_it_names(sweep: str):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        overrides = [*sweep.split(), "pruning_rate=0.9", "seed=0"]
        single = [override for override in overrides if "," not in override]
        cfg = compose("config", overrides=single, return_hydra_config=True)
        jobs = [compose("config", overrides=job) for job in jobs_of(cfg, overrides)]
    assert len(jobs) > 1
    settings = [flat(OmegaConf.to_container(job, resolve=True)) for job in jobs]
    names = {name for each in settings for name in each}
    missing = object()
    differing = {n for n in names if any(each.get(n, missing) != settings[0].get(n, missing) for each in settings)}
    assert differing == ablations()[sweep]
    if "fields" in sweep:
        assert all(sum(each[n] != settings[0][n] for n in differing) <= 1 for each in settings), "one at a time"
    assert len({str(each) for each in settings}) == len(jobs)
    for job in jobs:
        assert callable(instantiate(job.method, _convert_="all").select)
        instantiate(job.finetune, _convert_="all")


def test_what_is_reproduced_names_presets_and_methods_that_there_are():
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    swept = re.findall(r"^ABLATIONS = (.*)$", makefile, re.M)[0].split()
    readme = (ROOT / "experiments/README.md").read_text()
    assert not [sweep for sweep in swept if f"`{sweep}`" not in readme]
    named = set(re.findall(r"experiment=(\w+)", makefile))
    assert named <= PRESETS, named - PRESETS
    methods = re.findall(r"(?:method=|^CONTRASTS = |^METHODS = method=)([\w,]+)", makefile, re.M)
    assert {m for found in methods for m in found.split(",") if m} <= {
        p.stem for p in (ROOT / "conf/method").glob("*.yaml")
    }


def asked_in(record: dict[str, Any]) -> list[str]:
    return [stage["label"] for stage in record["overhead"]["stages"]]


def test_random_regions_run_without_a_small_model(run: Callable[..., dict[str, Any]]):
    record = run("method.speculation=none", "method.num_regions=2")
    assert asked_in(record) == ["effort of 20 samples, raw target", asked_in(record)[-1]]


def test_another_scoring_function_scores_with_both_models(run: Callable[..., dict[str, Any]]):
    record = run("method.signal=perplexity", "method.verification_budget=1")
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


def test_a_curve_is_of_the_seeds_that_ran_at_every_strength_of_a_method():
    ran = [("staff", 0, 0.0), ("staff", 0, 0.3), ("staff", 1, 0.3), ("raw", 0, 0.3)]
    kept = strength.comparable(pd.DataFrame(ran, columns=["method", "seed", "wrong"]), "wrong")
    assert kept.to_numpy().tolist() == [["staff", 0, 0.0], ["staff", 0, 0.3]]


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


# ---------------------------------------------------------------- without evaluation, and budgets


def test_a_run_without_evaluation_ends_with_the_coreset_and_its_costs_and_reads_no_test_split(run, tmp_path: Path):
    rows = [{"question": f"What is {n} plus {n}?", "answer": f"It is {2 * n}."} for n in range(24)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["task=file", f"task.data_dir={tmp_path}", "task.prompt='{question}'", "task.answer=' {answer}'"]
    record = run(*data, "method=staff", "evaluation=none", "task.deduplicate=exact")
    assert record["coreset"]["size"] == 6 and record["overhead"]["flops"] > 0
    assert record["metrics"] == {} and record["finetuning"] is None and record["evaluation"] is None
    assert record["counts"]["test"] == record["counts"]["trained"] == 0
    assert record["duplicates"]["repeated"] == 0
    names = {path.name for path in record["folder"].iterdir()}
    assert {"coreset.csv", "samples.parquet", "metrics.json"} <= names and "predictions.parquet" not in names
    assert record["run"]["fingerprint"] in record["folder"].joinpath("metrics.json").read_text()
    assert "nll" in record["config"]["task"]["metrics"], "which is not asked, since it reads references"
    made = {path.name for path in (tmp_path / "results/artifacts").iterdir()}
    assert "evaluation" not in made and "coreset" in made
    with pytest.raises(UserError, match=r"test.jsonl does not exist"):
        run(*data, "method=staff")


def test_a_select_only_record_is_printed_and_exported_and_left_out_of_the_report(run, tmp_path: Path):
    from experiments.export import export
    from experiments.report import overview
    from experiments.report.records import collect

    folder = run("method=random", "evaluation=none")["folder"]
    assert "random" in overview([folder])
    exported = export(folder, "trl", tmp_path / "out")
    assert len((exported / "train.jsonl").read_text().splitlines()) == 6
    assert collect(tmp_path / "results").empty


def test_the_same_selection_is_made_once_with_and_without_evaluation(run, tmp_path: Path):
    records = [run("method=staff", *more) for more in ([], ["evaluation=none"])]
    assert records[0]["coreset"]["fingerprint"] == records[1]["coreset"]["fingerprint"]
    assert records[0]["run"]["fingerprint"] != records[1]["run"]["fingerprint"]
    assert not any(stage["computed"] for stage in records[1]["overhead"]["stages"])


def test_a_budget_is_so_many_samples_and_the_rate_that_they_come_to(run):
    by_count, by_rate = run("method=random", "budget=6"), run("method=random", "pruning_rate=0.75")
    assert by_count["coreset"] == by_rate["coreset"] and by_count["run"]["pruning_rate"] == 0.75
    assert by_count["run"]["fingerprint"] == by_rate["run"]["fingerprint"]
    assert by_count["config"]["budget"] == 6


@pytest.mark.parametrize("budget", [0, -1, 25, "'1000'", 2.5, "true"])
def test_a_budget_that_the_pool_cannot_give_is_refused(run, budget: object):
    with pytest.raises(UserError, match=r"budget=.* must be a whole number of at least 1 and at most 24, the pool"):
        run("method=random", f"budget={budget}")


def test_a_method_with_a_size_of_its_own_needs_no_budget():
    from baselines.full import Full

    assert budget_of(Full(), 0.9, 10, 3) == 10 and budget_of(object(), 0.9, 10, 3) == 3  # type: ignore[arg-type]


def test_a_budget_in_tokens_is_not_exceeded_and_recorded(run):
    record = run("method=staff", "budget_tokens=900", "method.num_regions=3", "method.verification_budget=1")
    counts = record["counts"]
    assert 0 < counts["selected_tokens"] <= 900 < counts["pool_tokens"]
    assert counts["selected"] == counts["budget"] == counts["trained"] > 1
    assert "-staff-t900-s0-" in record["run"]["name"]
    assert record["run"]["pruning_rate"] == pytest.approx(1 - 900 / counts["pool_tokens"])
    asked = [stage["label"] for stage in record["overhead"]["stages"]]
    assert len(asked) == len(set(asked)) == 4, "every signal is computed and charged once"
    again = run("method=random", f"budget={counts['selected']}")
    assert again["counts"]["selected"] == counts["selected"]
    assert run("method=full", "budget_tokens=900")["counts"]["selected"] == counts["pool"], "it takes everything"


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["budget_tokens=0"], "budget_tokens=0 must be null or a whole number of at least 1"),
        (["budget_tokens=many"], "budget_tokens='many' must be null or a whole number"),
        (["budget_tokens=3"], r"budget_tokens=3 holds no sample: the shortest of the pool has \d+ tokens"),
        (["budget_tokens=999999"], r"budget_tokens=999999 is beyond the pool, which has \d+ tokens: lower it"),
        (["budget_tokens=900", "budget=3"], "budget=3 and budget_tokens=900 both set the size of the coreset"),
    ],
)
def test_a_budget_in_tokens_that_cannot_be_is_refused_before_a_model_loads(run, monkeypatch, overrides, sentence):
    monkeypatch.setattr(ModelSpec, "load", lambda self: pytest.fail("a model was loaded"))
    for how in (run, lambda *job: dry_run([*SMALL[:-1], "tracking=none", *job])):
        with pytest.raises(UserError, match=sentence):
            how("method=el2n", *overrides)


def test_a_job_sets_the_size_of_its_coreset_once():
    check_size(["method=staff", "pruning_rate=null", "budget_tokens=900", "budget=null"])
    with pytest.raises(UserError, match=r"pruning_rate=0.5 and budget_tokens=900 both set the size of the coreset"):
        check_size(["pruning_rate=0.5", "method=staff", "budget_tokens=900"])


@pytest.mark.parametrize(("size", "count"), [("budget=40", 2), ("budget_tokens=50,90", 4), ("budget=null", 10)])
def test_a_budget_takes_the_place_of_the_rates_that_a_preset_sweeps(size: str, count: int):
    overrides = ["experiment=table1", "method=staff,random", "seed=0", size]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=overrides[:1], return_hydra_config=True)
    jobs = jobs_of(cfg, overrides)
    assert len(jobs) == count
    assert all((size == "budget=null") == any(o.startswith("pruning_rate") for o in job) for job in jobs)


def test_a_sweep_that_sets_the_size_twice_is_refused_before_any_job():
    sweeper = object.__new__(CasesSweeper)
    sweeper.cases = []
    twice = OverridesParser.create().parse_overrides(["pruning_rate=0.5,0.9", "budget=4"])
    with pytest.raises(UserError, match=r"pruning_rate=0.5 and budget=4 both set the size"):
        sweeper.split_arguments(twice, None)


@pytest.mark.parametrize(("family", "dim"), [("tiny", 1024), ("gemma", 8192)])
def test_the_twin_of_a_method_whose_settings_follow_the_family_has_them_too(family: str, dim: int):
    names = ("method=less", "method=random_matched method@method.reference=less")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        alone, twin = (compose("config", overrides=[f"family={family}", *name.split()]).method for name in names)
    assert alone == twin.reference and alone.dim == dim


@pytest.mark.parametrize(("task", "count"), [("planted", 9), ("dialogsum", 7)])
def test_an_audit_matches_groups_where_the_task_has_them_and_every_job_composes(task: str, count: int):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        overrides = ["experiment=audit", f"task={task}", "candidate=ifd", "seed=0"]
        cfg = compose("config", overrides=overrides, return_hydra_config=True)
        jobs = jobs_of(cfg, overrides)
        composed = [compose("config", overrides=job) for job in jobs]
    assert len(jobs) == count and all(cfg.candidate is None for cfg in composed)
    matched = [cfg.method for cfg in composed if "reference" in cfg.method]
    assert {method.reference._target_ for method in matched} == {"baselines.ifd.IFD"}
    assert [list(method.match) for method in matched][:2] == [["length"], ["tokens"]]
    assert [cfg.finetune.match for cfg in composed].count("steps") == 2


def test_the_tests_that_a_gpu_changes_are_in_files_that_exist():
    from experiments.benchmarks.gpu_checks import TESTS

    missing = [name for name in TESTS if not (ROOT / f"tests/test_{name}.py").is_file()]
    assert TESTS and not missing, missing
