"""The presets of conf/experiment, runs without evaluation, and budgets."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

from experiments.configuration import check_size
from experiments.figures import strength
from experiments.sweep import jobs_of
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


def row(number: int) -> dict[str, Any]:
    return {"question": f"What is {number} plus {number}?", "answer": f"It is {2 * number}.", "id": f"r{number}"}


def write(folder: Path, train: list[dict[str, Any]]) -> None:
    for name, rows in (("train", train), ("test", [row(900)])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))


def test_a_run_without_evaluation_ends_with_the_coreset_and_its_costs_and_reads_no_test_split(run, tmp_path: Path):
    write(tmp_path, [row(number) for number in range(24)])
    (tmp_path / "test.jsonl").unlink()
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


def test_exported_rows_are_those_of_the_file_with_all_fields_and_their_numbers(run, tmp_path: Path):
    from experiments.export import export

    rows = [
        {**row(number // 2), "source": f"book {number}", "nested": {"n": [number, None]}} for number in range(40)
    ]
    write(tmp_path, rows)
    data = [
        f"task.data_dir={tmp_path}",
        "task.prompt='{question}'",
        "task.answer=' {answer}'",
        "task.train_limit=40",
    ]
    more = ["task.deduplicate=exact", "task.dev_size=5", "pruning_rate=0.5", "evaluation=none"]
    folder = run("task=file", *data, *more, "method=random")["folder"]
    out = export(folder, "rows", tmp_path / "out")
    table = pd.read_csv(out / "rows.csv")
    exported = [json.loads(line) for line in (out / "train.jsonl").read_text("utf-8").splitlines()]
    assert len(table) == 7 and exported == [rows[number - 1] for number in table["row"]]
    chosen = pd.read_csv(folder / "coreset.csv")
    assert table["id"].tolist() == chosen["id"].tolist()


def test_exported_conversations_are_messages(run, tmp_path: Path):
    from experiments.export import export

    turns = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}!"}] for n in range(12)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps({"messages": some}) + "\n" for some in turns))
    run_folder = run("task=file", f"task.data_dir={tmp_path}", "evaluation=none", "method=random")["folder"]
    out = export(run_folder, "trl", tmp_path / "out")
    exported = [json.loads(line) for line in (out / "train.jsonl").read_text("utf-8").splitlines()]
    assert len(exported) == 3 and all(row["messages"] in turns for row in exported)


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
        (["budget_tokens=900", "budget=3"], "budget=3 and budget_tokens=900 both set the size of the coreset"),
    ],
)
def test_a_budget_in_tokens_that_cannot_be_is_refused_before_a_model_loads(run, monkeypatch, overrides, sentence):
    monkeypatch.setattr(ModelSpec, "load", lambda self: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match=sentence):
        run("method=el2n", *overrides)


def test_a_job_sets_the_size_of_its_coreset_once():
    check_size(["method=staff", "pruning_rate=null", "budget_tokens=900", "budget=null"])
    with pytest.raises(UserError, match=r"pruning_rate=0.5 and budget_tokens=900 both set the size of the coreset"):
        check_size(["pruning_rate=0.5", "method=staff", "budget_tokens=900"])
