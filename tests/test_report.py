"""The report says what the records say: nothing averaged that differs, no chance marked, all text escaped."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, run_shrunk
from support.records import invented, write_runs

from experiments.benchmarks.common import configured
from experiments.campaign import pack
from experiments.recorded import recorded_runs
from experiments.report import figures, floors, overhead, overview, performance, supplementary, verdicts
from experiments.report.__main__ import left_over, main, summary, write
from experiments.report.comparisons import mean, of_finetuning, pairs
from experiments.report.contrasts import registered
from experiments.report.figures import _spread_labels, overlap, pareto
from experiments.report.records import Context, as_table, collect, contexts
from experiments.report.settings import told_apart, variants
from experiments.report.statistics import t_interval
from experiments.report.supplementary import region_similarity, similarity
from staff.errors import UserError
from staff.tracking import write_record

PAPER = pd.read_csv(ROOT / "experiments/report/table1.csv")
METHODS = {"raw": "baselines.full.Raw", "full": "baselines.full.Full", "random": "baselines.random.Random"}
METHODS |= {"ccs": "baselines.ccs.CCS", "staff": "staff.speculative.Staff"}
RATES = {"raw": (1.0,), "full": (0.0,)}


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a real run of STAFF, which all others here are made from."""
    results = tmp_path_factory.mktemp("real")
    return run_shrunk(results, "task.test_limit=6", "method=staff", "pruning_rate=0.5")["folder"]


def copied(
    real: Path, results: Path, method: str, rate: float, seeds: tuple[int, int], answers: np.ndarray, **changes: Any
) -> dict[str, Any]:
    """Write what a run of `method` would leave, had it scored `answers`; `changes` by dotted name."""
    record = json.loads((real / "metrics.json").read_text())
    name = f"{method}-p{rate:g}-s{seeds[0]}-{seeds[1]}-" + "-".join(
        re.sub(r"\W", "", f"{v}") for v in changes.values()
    )
    own = {"selection_seed": seeds[0], "finetune_seed": seeds[1], "pruning_rate": rate}
    record["run"] |= {"name": name, "method": method, "seed": seeds[0], **own}
    record["metrics"]["rougeL"] = float(answers.mean())
    record["evaluation"]["fingerprint"] = str(hash(answers.tobytes()))
    settings = record["config"]["method"] if method == "staff" else {}
    record["config"] |= {**own, "method": {**settings, "_target_": METHODS.get(method, "baselines.own.Own")}}
    record["identity"]["method"] = method
    for path, value in changes.items():
        *parents, leaf = path.split("__")
        place = record
        for parent in parents:
            place = place[parent]
        place[leaf] = value
    folder = results / "runs" / name
    write_record(folder, record)
    table = pd.DataFrame({"id": [f"t{i}" for i in range(len(answers))], "prediction": [f"{a}" for a in answers]})
    table.assign(references=[["a reference"]] * len(table), rougeL=answers).to_parquet(
        folder / "predictions.parquet"
    )
    for file in ("samples.parquet", "regions.csv"):
        (folder / file).write_bytes((real / file).read_bytes())
    return record


def grid(
    real: Path, results: Path, effects: dict[str, float], seeds: int = 3, rates: tuple[float, ...] = (0.5, 0.9)
) -> None:
    """A sweep whose true differences are `effects`, in points."""
    rng = np.random.default_rng(0)
    hard = rng.normal(25, 5, size=60)
    for method, effect in effects.items():
        for rate in RATES.get(method, rates):
            for seed in range(seeds):
                chance = 0 if method == "raw" else rng.normal(0, 1, size=60) + rng.normal(0, 0.1)
                copied(real, results, method, rate, (seed, seed), hard + effect + chance)


def only_context(results: Path) -> Context:
    context, *ablated = contexts(collect(results), results)
    assert "method" not in [other.varied for other in ablated]
    return context


def texts(table: Any) -> list[str]:
    return [str(text) for text in table.cells.to_numpy().ravel()]


def test_a_report_of_real_and_copied_runs_is_whole_and_every_file_can_be_read(real: Path, tmp_path: Path):
    grid(real, tmp_path, {"raw": -5, "full": 0, "random": -2, "ccs": -1, "staff": 3})
    page = write(tmp_path, collect(tmp_path)).read_text()
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert len(rows) == 3 * (1 + 1 + 2 * 3)
    names = {file.stem.removesuffix("-tiny-dialogsum") for file in tmp_path.glob("tables/*.md")}
    assert names == {
        "performance",
        "warnings",
        "differences",
        "gains",
        "paper",
        "overhead",
        "stages",
        "break-even",
        "similarity",
        "verdicts",
        "specific",
    } | (names & {"savings"})
    for tex in tmp_path.glob("tables/*.tex"):
        assert r"\toprule" in tex.read_text() and r"\caption{" in tex.read_text()
    for file in [*tmp_path.glob("tables/*"), tmp_path / "report.html"]:
        words = re.sub(r"base64,[\w+/=]+", "", file.read_text())
        assert not re.search(r"\b(nan|NaN|None|inf)\b", words), file
    drawn = {file.stem.removesuffix("-tiny-dialogsum") for file in tmp_path.glob("figures/*.svg")}
    assert drawn >= {"performance", "pareto", "coreset", "agreement", "overlap", "length"}
    assert {f.stem for f in tmp_path.glob("figures/*.png")} == {f.stem for f in tmp_path.glob("figures/*.svg")}
    assert page.count("data:image/svg+xml;base64,") == len(drawn - {"contrasts"})
    assert not re.search(r"(src|href)=\"(?!data:|#)", page), "nothing is fetched from elsewhere"
    made = [tmp_path / "report.html", *tmp_path.glob("tables/*"), *tmp_path.glob("figures/*")]
    command = f"staff-report --results {tmp_path}".encode()
    assert [file for file in made if command not in file.read_bytes()] == [], "each names the command that makes it"


def test_short_fine_tunings_and_seeds_with_the_same_answers_are_shown(real: Path, tmp_path: Path):
    short = "fine-tune target on 8 samples: only 1 optimiser step, fewer than 10."
    for seed in range(3):
        same = {"evaluation__fingerprint": f"model {seed}"}
        copied(real, tmp_path, "random", 0.5, (seed, seed), np.arange(8.0), warnings=[short][:seed], **same)
        copied(real, tmp_path, "staff", 0.5, (seed, seed), np.arange(8.0) + seed, warnings=[], **same)
        copied(real, tmp_path, "raw", 1.0, (seed, seed), np.arange(8.0), warnings=[])
    page = write(tmp_path, collect(tmp_path)).read_text()
    shown = supplementary.warnings(only_context(tmp_path))
    assert shown is not None and shown.cells.to_dict("records") == [
        {"method": "random", "pruning rate": "p = 0.5", "seeds": "1, 2", "warning": short},
        {
            "method": "random",
            "pruning rate": "p = 0.5",
            "seeds": "0, 1, 2",
            "warning": "3 seeds, and the same answer to every test sample: these runs count as one",
        },
    ]
    assert short in page and short in (tmp_path / "tables/warnings-tiny-dialogsum.md").read_text()
    alike, other = (mean(only_context(tmp_path), method, 0.5) for method in ("random", "staff"))
    assert alike is not None and (alike.half, alike.units) == (None, 1) and other is not None and other.units == 3


def test_coresets_and_metrics_are_shown_by_group_where_the_task_has_groups(tmp_path: Path):
    how = {"effects": {"random": 0.0, "staff": 1.0}, "rates": (0.9,), "seeds": 2}
    write_runs(tmp_path, **how)
    records = [run.record() for run in invented(**how)]
    for record in records:
        many = 8 if record["run"]["method"] == "staff" else 4
        record["coreset"]["groups"] = {"a": {"pool": 30, "coreset": 10 - many}, "b": {"pool": 10, "coreset": many}}
        parts = {"pool": {"wrong": 0.25}, "coreset": {"wrong": many / 10}}
        record["coreset"]["planted"] = parts
        record["metrics_by_group"] = {
            "a": {"samples": 30, "rougeL": 3.0},
            "b": {"samples": 10, "rougeL": many + 0.5},
        }
    (context,) = contexts(as_table(records), tmp_path)
    made_of, measured = supplementary.groups(context)
    assert made_of.cells.set_index("method").to_dict("index") == {
        "the pool": {"a": "75.0", "b": "25.0", "wrong": "25.0"},
        "random": {"a": "60.0", "b": "40.0", "wrong": "40.0"},
        "staff": {"a": "20.0", "b": "80.0", "wrong": "80.0"},
    }
    assert measured.cells.set_index("method")["b"].to_dict() == {"random": "4.5", "staff": "8.5"}
    (plain,) = contexts(as_table(run.record() for run in invented(**how)), tmp_path)
    assert supplementary.groups(plain) == []


def test_a_run_of_few_steps_says_so_in_its_record_and_in_the_table_at_its_end(real: Path):
    record = json.loads((real / "metrics.json").read_text())
    assert record["warnings"] == [
        "fine-tune small on 24 samples: only 3 optimiser steps, fewer than 10.",
        "fine-tune target on 12 samples: only 2 optimiser steps, fewer than 10.",
    ]
    assert all(f"warning: {real.name}: {text}" in overview([real]) for text in record["warnings"])


def test_a_large_difference_is_marked_and_chance_is_not(real: Path, tmp_path: Path):
    grid(real, tmp_path, {"full": 0, "random": -2, "ccs": -2, "staff": 3})
    context = only_context(tmp_path)
    table = performance.performance(context, pairs(context))
    marked = {(table.cells.loc[row, "method"], column): mark for (row, column), mark in table.marks.items()}
    assert marked == {("staff", "p = 0.5"): "bold", ("staff", "p = 0.9"): "bold"}, "no second best between equals"
    assert "Holm" in table.caption and "pooled over the pairs" in table.caption and "3 seeds" in table.caption
    assert "\\bfseries" in table.latex() and "| **" in table.markdown()
    by_pair = {(p.rate, p.a, p.b): p.difference.mean for p in pairs(context)}
    assert by_pair[0.9, "staff", "random"] == pytest.approx(5, abs=0.6)
    assert by_pair[0.9, "staff", "full"] == pytest.approx(3, abs=0.6)


def test_verdicts_on_the_default_contrasts_come_first_and_are_in_words(real: Path, tmp_path: Path):
    grid(real, tmp_path, {"full": 0, "random": -2, "ccs": 3.4, "random_length": 3, "staff": 3})
    context = only_context(tmp_path)
    first, *_ = verdicts.tables(context)
    assert first.name.startswith("verdicts-") and "default contrasts" in first.caption
    rows = first.cells.set_index(["contrast", "pruning rate"])["verdict"].to_dict()
    assert set(rows) == {
        (f"staff - {other}", rate)
        for other in ("random", "best other", "random_length")
        for rate in ("0.5", "0.9", "mean of 2")
    }
    assert rows["staff - random", "0.9"] == rows["staff - random", "mean of 2"] == "better"
    assert rows["staff - random_length", "0.9"] == "equal within 1 point"
    assert rows["staff - best other", "mean of 2"] in ("worse, by less than 1 point", "equal within 1 point")
    page = write(tmp_path, collect(tmp_path)).read_text()
    assert page.index("Registered contrasts") < page.index("bold: the best")


def test_the_first_picture_shows_the_first_contrast_of_each_task_and_the_papers_own(real: Path, tmp_path: Path):
    grid(real, tmp_path, {"random": -2, "ccs": 3, "staff": 3})
    context = only_context(tmp_path)
    found = figures._first(context, verdicts.DEFAULT)
    assert [(outcome.contrast.name, outcome.rates) for outcome in found] == [
        ("staff - random", (0.5,)),
        ("staff - random", (0.9,)),
        ("staff - random", (0.5, 0.9)),
    ]
    papers = [figures._papers(context, outcome, PAPER) for outcome in found]
    assert papers[1] == pytest.approx([2.9, 2.7, 1.8]) and papers[2] == pytest.approx(np.mean(papers[:2], axis=0))
    page = write(tmp_path, collect(tmp_path)).read_text()
    assert "staff - random" in (tmp_path / "figures/contrasts.svg").read_text()
    assert page.index('class="forest"') < page.index("What does it cost?")


def test_ones_own_method_is_the_one_that_is_asked_about(real: Path, tmp_path: Path):
    grid(real, tmp_path, {"random": 0, "staff": 1, "mine": 1})
    for file in tmp_path.glob("runs/mine-*/metrics.json"):
        file.write_text(file.read_text().replace("baselines.own.Own", "mine.selection.Mine"))
    found = registered(only_context(tmp_path), None)
    assert [(c.method, *c.others) for c in found] == [("mine", "random"), ("mine", "random", "staff")]


def test_methods_are_found_though_a_setting_stands_in_their_labels(real: Path, tmp_path: Path):
    for rate, changes in ((0.9, {}), (0.5, {"config__finetune__learning_rate": 0.5})):
        for method in ("raw", "full", "random", "staff"):
            copied(real, tmp_path, method, RATES.get(method, (rate,))[0], (0, 0), np.arange(8.0), **changes)
    context = max(contexts(collect(tmp_path), tmp_path / "runs"), key=lambda context: len(context.variants))
    assert any(variant.startswith("full finetune.learning_rate=") for variant in context.variants)
    found = [
        (c.method.split("=")[1], [other.split(" ")[0] for other in c.others]) for c in registered(context, None)
    ]
    assert sorted(found) == 2 * [("0.003", ["random"])] + 2 * [("0.5", ["random"])], found


def test_contrasts_margin_and_effect_are_asked_on_the_command_line(real: Path, tmp_path: Path, monkeypatch):
    grid(real, tmp_path, {"random": 0, "ccs": 0.3, "staff": 3}, rates=(0.9,))

    def report(*options: str) -> None:
        monkeypatch.setattr(sys, "argv", ["report", "--results", str(tmp_path), *options])
        main()

    for options, said in (
        (("--contrasts", "staff-grand"), "--contrasts 'staff-grand' names 'grand', which is no method"),
        (("--margin", "0"), "--margin 0 must be a number above 0"),
        (("--effect", "inf"), "--effect inf must be a number above 0"),
    ):
        with pytest.raises(SystemExit) as refused:
            report(*options)
        assert said in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "tables").exists()
    report("--contrasts", "staff-ccs", "ccs-best", "--margin", "2", "--effect", "0.5")
    (file,) = tmp_path.glob("tables/verdicts-*.md")
    text = file.read_text()
    assert "contrasts named by the user" in text and "| seeds for 0.5 |" in re.sub(r" +", " ", text)
    assert re.findall(r"^\| (\S+ - \S+(?: other)?) ", text, re.M) == ["staff - ccs", "ccs - best other"]
    assert "--margin 2 --effect 0.5 --contrasts staff-ccs ccs-best`" in text


def rename_metric(results: Path, name: str) -> None:
    """As if the runs had been measured by the metric `name`."""
    for folder in results.glob("runs/*"):
        record = json.loads((folder / "metrics.json").read_text())
        record["run"]["metric"], record["metrics"][name] = name, record["metrics"].pop("rougeL")
        write_record(folder, record)
        answers = pd.read_parquet(folder / "predictions.parquet")
        answers.rename(columns={"rougeL": name}).to_parquet(folder / "predictions.parquet")


def test_where_a_metric_is_a_loss_the_lowest_is_the_best(real: Path, tmp_path: Path):
    grid(real, tmp_path, {"full": 0, "random": 6, "ccs": 5, "staff": -3})
    rename_metric(tmp_path, "nll")
    context = only_context(tmp_path)
    table = performance.performance(context, pairs(context))
    marked = {(table.cells.loc[row, "method"], column): mark for (row, column), mark in table.marks.items()}
    assert marked["staff", "p = 0.9"] == "bold" and "lower is better" in table.caption
    gains = performance.gains(context) or pytest.fail("no table")
    best = gains.cells.set_index("over").loc["the best baseline", "p = 0.9"]
    assert best.startswith("+") and best == gains.cells.set_index("over").loc["ccs", "p = 0.9"]
    told = (verdicts.table(context) or pytest.fail("no table")).cells.set_index(["contrast", "pruning rate"])
    assert told.loc[("staff - best other", "0.9"), "verdict"] == "better"
    assert told.loc[("staff - best other", "0.9"), "difference"].startswith("-")
    figure, _ = pareto(context) or pytest.fail("no figure")
    (front,) = [line for line in figure.axes[0].lines if line.get_label() == "Pareto front"]
    assert list(front.get_ydata()) == [mean(context, "staff", 0.9).value]  # type: ignore[union-attr]
    assert "lower is better" in figure.axes[0].get_ylabel()
    plt.close(figure)


def test_a_metric_that_nobody_knows_is_refused(real: Path, tmp_path: Path):
    grid(real, tmp_path, {"random": 0, "staff": 1}, seeds=1)
    rename_metric(tmp_path, "speed")
    with pytest.raises(UserError, match="names 'speed', which is unknown"):
        write(tmp_path, collect(tmp_path))


def test_from_the_fifth_seed_on_a_table_says_what_is_decided_and_which_seeds_to_add(real: Path, tmp_path: Path):
    grid(real, tmp_path, {"random": 0, "staff": 0.1}, seeds=4, rates=(0.9,))
    assert verdicts.looks(only_context(tmp_path)) is None
    grid(real, tmp_path, {"random": 0, "staff": 0.1}, seeds=6, rates=(0.9,))
    question = verdicts.Question(margin=9.0)
    table = verdicts.looks(only_context(tmp_path), question) or pytest.fail("no table")
    assert table.cells["looked at"].tolist() == ["5 seeds"] and table.cells["verdict"].tolist() == ["equal"]
    for file in tmp_path.glob("runs/staff-*/predictions.parquet"):
        answers = pd.read_parquet(file)
        chance = np.random.default_rng(int(re.search(r"-s(\d)", file.parent.name)[1])).normal(0, 3)  # type: ignore[index]
        answers.assign(rougeL=answers["rougeL"] + chance).to_parquet(file)
    table = verdicts.looks(only_context(tmp_path), question) or pytest.fail("no table")
    assert table.cells["verdict"].tolist() == ["open"] and "seeds to add next: 6, 7, 8, 9." in table.caption


def test_the_pairs_difference_is_the_difference_of_the_means_that_are_shown(real: Path, tmp_path: Path):
    grid(real, tmp_path, {"random": 0, "staff": 1})
    context = only_context(tmp_path)
    for pair in pairs(context):
        a, b = mean(context, pair.a, pair.rate), mean(context, pair.b, pair.rate)
        assert a and b and pair.difference.mean == pytest.approx(a.value - b.value)


def test_one_seed_has_no_interval_and_the_caption_says_so(real: Path, tmp_path: Path):
    grid(real, tmp_path, {"random": 0, "staff": 1}, seeds=1)
    context = only_context(tmp_path)
    table = performance.performance(context, pairs(context))
    assert "One seed" in table.caption and "±" not in "".join(texts(table))
    alone = performance.differences(context, pairs(context)) or pytest.fail("no table")
    assert set(alone.cells["interval over"]) == {"samples alone"} and set(alone.cells["p"]) == {"–"}
    told = verdicts.table(context) or pytest.fail("no table")
    assert set(told.cells["verdict"]) == {"one seed: no verdict"} and set(told.cells["p (Holm)"]) == {"–"}


def test_a_model_that_nothing_random_touched_has_no_interval(real: Path, tmp_path: Path):
    grid(real, tmp_path, {"raw": 0, "staff": 1})
    found = mean(only_context(tmp_path), "raw target", 1.0)
    assert found and found.half is None and found.units == 1


def test_what_fine_tuning_gives_is_told_over_all_seeds_though_the_raw_target_was_asked_once(real, tmp_path: Path):
    grid(real, tmp_path, {"raw": -5, "full": 0, "random": -2})
    for seed in (1, 2):
        shutil.rmtree(next(tmp_path.glob(f"runs/raw-*-s{seed}-*")))
    context = only_context(tmp_path)
    gain = of_finetuning(context)
    assert gain and gain.seeds == 3 and abs(gain.mean - 5) < 3 * gain.error and gain.p < 0.001
    said = performance.performance(context, []).caption
    assert f"raw target: {gain.mean:+.2f} ± {gain.half:.2f}, p < 0.001" in said
    grid(real, tmp_path / "alone", {"full": 0, "random": -2})
    assert of_finetuning(only_context(tmp_path / "alone")) is None


def test_runs_that_differ_in_anything_but_the_seed_are_never_averaged(real: Path, tmp_path: Path):
    low, high = np.full(8, 20.0), np.full(8, 30.0)
    for seed in range(2):
        copied(real, tmp_path, "staff", 0.5, (seed, seed), low + seed)
        copied(real, tmp_path, "staff", 0.5, (seed, seed), high + seed, config__method__num_regions=20)
        copied(real, tmp_path, "staff", 0.5, (seed, seed), high + 9, config__finetune__learning_rate=0.5)
    table = collect(tmp_path)
    assert told_apart(table)[4:] == ["setting.method.num_regions", "setting.finetune.learning_rate"]
    assert sorted(variants(table)) == 2 * ["staff num_regions=20 finetune.learning_rate=0.003"] + (
        2 * ["staff num_regions=50 finetune.learning_rate=0.003"]
        + 2 * ["staff num_regions=50 finetune.learning_rate=0.5"]
    )
    centre, *ablated = contexts(table, tmp_path)
    means = {(c.varied, v): mean(c, v, 0.5).value for c in (centre, *ablated) for v in c.variants}  # type: ignore[union-attr]
    assert means == {
        ("method", "staff"): 20.5,
        ("num_regions", "20"): 30.5,
        ("num_regions", "50"): 20.5,
        ("finetune.learning_rate", "0.003"): 20.5,
        ("finetune.learning_rate", "0.5"): 39.0,
    }
    assert "told apart by method, pruning_rate, method.num_regions" in summary(table)
    write(tmp_path, table)
    head, _, *rows = (
        (tmp_path / "tables/performance-tiny-dialogsum-num_regions-of-staff.md").read_text().split("\n")
    )
    assert [cell.strip() for cell in head.split("|")[1:-1]] == ["num_regions", "p = 0.5"]
    assert rows[0].split("|")[1].strip() == "20" and "30.50" in rows[0]
    drawn = {file.name.split("-")[0] for file in tmp_path.glob("figures/*-num_regions-of-staff.svg")}
    assert drawn == {"performance", "pareto", "overlap"}


NO_NUMBER = {
    "finetune.fsdp": True,
    "finetune.device_batch_size": 4,
    "finetune.gradient_checkpointing": True,
    "scoring.batch_tokens": 64,
    "scoring.one_at_a_time": True,
    "evaluation.batch_tokens": 64,
    "memory_check": False,
}


def test_a_setting_that_changes_no_number_changes_no_name_of_a_run_and_tells_no_runs_apart(
    real: Path, tmp_path: Path
):
    def name(*settings: str) -> str:
        return configured("method=el2n", "task.train_limit=16", f"results_dir={tmp_path}", *settings).name

    assert name(*(f"{setting}={value}" for setting, value in NO_NUMBER.items())) == name()
    assert name("scoring.dtype=bfloat16") != name()
    changes: dict[str, Any] = {f"config.{name}".replace(".", "__"): value for name, value in NO_NUMBER.items()}
    for seed, of_seed in enumerate(({}, changes)):
        copied(real, tmp_path, "staff", 0.5, (seed, seed), np.full(8, 20.0), **of_seed)
    assert told_apart(collect(tmp_path))[4:] == []
    copied(real, tmp_path, "staff", 0.5, (2, 2), np.full(8, 20.0), config__scoring__dtype="bfloat16")
    assert told_apart(collect(tmp_path))[4:] == ["setting.scoring.dtype"]


def test_a_setting_that_some_runs_do_not_have_tells_apart_too(real: Path, tmp_path: Path):
    for seed, value in enumerate((None, 5, None)):
        copied(real, tmp_path, "staff", 0.5, (seed, seed), np.full(4, 20.0), config__task__train_limit=value)
    assert sorted(len(runs) for runs in only_context(tmp_path).cells.values()) == [1, 2]


def test_what_all_ablations_have_in_common_is_the_method_and_each_ablation_has_its_own_table(
    real: Path, tmp_path: Path
):
    def ran(method: str, points: float, **changes: Any) -> None:
        for seed in range(2):
            copied(real, tmp_path, method, 0.5, (seed, seed), np.full(8, points) + np.arange(8) * seed, **changes)

    ran("random", 20)
    ran("staff", 21)
    for regions in (100, 5):
        ran("staff", regions / 10, config__method__num_regions=regions)
        ran("staff", 1, config__method__num_regions=regions, config__method__verification_budget=99)
    ran("staff", 22, config__method__verification_budget=99)
    ran("staff", 23, config__family__small__path="pkg://staff/assets/tiny/smaller")
    ran("staff", 24, config__method__fresh_adapter={"rank": 4, "alpha": 16, "targets": ["v_proj"]})
    transferred = {"identity__selection": {"models": "other"}, "run__selection_family": "tiny_small"}
    ran("staff", 25, config__selection_family={"name": "tiny_small"}, **transferred)
    main, *ablated = contexts(collect(tmp_path), tmp_path)
    assert main.variants == ["random", "staff"]
    assert {c.title.split(": ")[1]: c.variants for c in ablated} == {
        "num_regions of staff, verification_budget=10": ["5", "50", "100"],
        "num_regions of staff, verification_budget=99": ["5", "50", "100"],
        "verification_budget of staff": ["10", "99"],
        "family.small.path of staff": ["small", "smaller"],
        "fresh_adapter.rank of staff": ["4", "none"],
        "selection_family.name of staff": ["tiny", "tiny_small"],
    }
    together = supplementary.ablations(main, ablated)
    assert together is not None
    differences = together.cells.set_index(["setting", "value"])["difference"].str.split(" ").str[0].to_dict()
    assert differences == {
        ("num_regions", "5"): "-20.50",
        ("num_regions", "100"): "-11.00",
        ("verification_budget", "99"): "+1.00",
        ("family.small.path", "smaller"): "+2.00",
        ("fresh_adapter.rank", "4"): "+3.00",
        ("selection_family.name", "tiny_small"): "+4.00",
    }, "each variant minus the method as it is; ablations without it are left out"


def test_a_grid_of_two_settings_is_compared_as_a_whole(real: Path, tmp_path: Path):
    for regions in (5, 50):
        for probes in (1, 10):
            changes = {"config__method__num_regions": regions, "config__method__verification_budget": probes}
            copied(real, tmp_path, "staff", 0.5, (0, 0), np.full(4, 20.0), **changes)
    (context,) = contexts(collect(tmp_path), tmp_path)
    assert len(context.variants) == 4


def test_regions_are_alike_where_both_models_rank_alike_and_by_chance_where_nothing_is_shared():
    rng = np.random.default_rng(0)
    small = rng.random(5000)
    same = region_similarity(small, 3 * small + 1, 10)
    assert (same["same region"], same["mean overlap"], same["Spearman"]) == (1, 1, pytest.approx(1))
    other = region_similarity(small, rng.random(5000), 10)
    assert other["same region"] == pytest.approx(other["by chance"], abs=0.02) == pytest.approx(0.1, abs=0.02)
    shifted = region_similarity(np.arange(10.0), np.array([*range(1, 10), 0.0]), 2)
    assert shifted["same region"] == 0.8 and shifted["mean overlap"] == pytest.approx(4 / 6)
    assert region_similarity(np.ones(5), small[:5], 3)["Spearman"] != 1


def test_region_similarity_is_told_where_the_target_scored_every_sample(real: Path, tmp_path: Path):
    grid(real, tmp_path, {"random": 0, "staff": 1})
    folders = sorted(tmp_path.glob("runs/staff-p0.9*"))
    assert len(folders) == 3
    for folder in folders:
        samples = pd.read_parquet(folder / "samples.parquet")
        partly = samples.assign(verified=samples["verified"].where(samples.index > 0))
        whole = samples.assign(verified=2 * samples["speculative"])
        (partly if folder == folders[2] else whole).to_parquet(folder / "samples.parquet")
    table = similarity(only_context(tmp_path))
    assert table is not None and len(table.cells) == 1
    row = table.cells.iloc[0]
    assert (row["regions"], row["seeds"], row["same region"], row["Spearman"]) == ("50", "2", "1.00", "1.00")


def test_two_test_sets_of_one_task_never_share_a_table(real: Path, tmp_path: Path):
    for digest in ("a" * 64, "b" * 64):
        copied(real, tmp_path, "staff", 0.5, (0, 0), np.full(4, 20.0), identity__data__test=digest)
    assert len(contexts(collect(tmp_path), tmp_path)) == 2


def test_runs_without_their_predictions_have_means_but_no_differences(real: Path, tmp_path: Path):
    grid(real, tmp_path, {"random": 0, "staff": 1})
    for file in tmp_path.glob("runs/*/predictions.parquet"):
        file.unlink()
    context = only_context(tmp_path)
    assert pairs(context) == []
    assert "±" in "".join(texts(performance.performance(context, [])))
    assert performance.differences(context, []) is None


def test_measured_and_estimated_ratios_are_kept_apart(real: Path, tmp_path: Path):
    answers = np.full(4, 20.0)
    for seed, (basis, ratio) in enumerate((("measured", 0.5), ("estimated from FLOPs", 3.0))):
        changes = {"overhead__str": ratio, "overhead__str_basis": basis, "overhead__seconds": 9.0}
        copied(real, tmp_path, "staff", 0.5, (seed, seed), answers, **changes)
    table = overhead.overhead(only_context(tmp_path))
    assert table is not None
    assert table.cells.loc[0, ["STR", "STR, estimated"]].tolist() == ["0.500", "~3.00"]
    said = summary(collect(tmp_path))
    assert "1.75" not in said and "0.500" in said and "3.000" in said


def test_variance_is_split_where_the_grid_has_both_seeds(real: Path, tmp_path: Path):
    rng = np.random.default_rng(3)
    for selection, chance in enumerate(rng.normal(0, 3, size=4)):
        for finetune in range(3):
            answers = np.full(5, 20 + chance + rng.normal(0, 0.01))
            copied(real, tmp_path, "staff", 0.5, (selection, finetune), answers)
    context = only_context(tmp_path)
    table = performance.variance(context)
    assert table is not None and table.cells.loc[0, "grid"] == "4 x 3"
    assert float(table.cells.loc[0, "selection"]) > 1 and float(table.cells.loc[0, "fine-tuning"]) < 0.1
    found = mean(context, "staff", 0.5)
    assert found and found.units == 3, "runs that share a coreset, or a fine-tuning seed, are no independent draws"


def test_the_interval_of_a_grid_knows_of_fine_tuning_though_no_selection_differs(real: Path, tmp_path: Path):
    for selection in range(3):
        for finetune, result in enumerate((24.0, 26.0, 25.0)):
            copied(real, tmp_path, "staff", 0.5, (selection, finetune), np.full(5, result))
    found = mean(only_context(tmp_path), "staff", 0.5)
    assert found and (found.value, found.half) == pytest.approx((25.0, t_interval([24.0, 26.0, 25.0])[1]))


def test_runs_that_answered_other_test_samples_stand_in_tables_of_their_own(real: Path, tmp_path: Path):
    for seed, dropped in enumerate((0, 0, 3)):
        copied(real, tmp_path, "staff", 0.5, (seed, seed), np.full(4, 20.0), counts__test_dropped_too_long=dropped)
    found = contexts(collect(tmp_path), tmp_path)
    assert [len(context.runs) for context in found if context.varied == "method"] == [2, 1]
    assert "without 3" in found[-1].title


def test_captions_tell_that_stages_were_made_beside_others_or_by_several_processes(real: Path, tmp_path: Path):
    own = {"workers": 1, "processes": 1}
    for seed, stage in enumerate((own, {**own, "workers": 4}, {**own, "processes": 8})):
        record = copied(real, tmp_path, "staff", 0.5, (seed, seed), np.full(4, 20.0))
        assert {(s["workers"], s["processes"]) for s in record["overhead"]["stages"]} == {(1, 1)}
        record["overhead"]["stages"][0] |= stage
        write_record(tmp_path / "runs" / record["run"]["name"], record)
        caption = (overhead.overhead(only_context(tmp_path)) or pytest.fail("no table")).caption
        assert ("several runs shared the machine" in caption) == (seed > 0)
        assert ("by 1 or 8 processes" in caption) == (seed > 1)


def test_overlap_compares_coresets_of_different_seeds_where_there_are_any(real: Path, tmp_path: Path):
    grid(real, tmp_path / "one", {"random": 0, "staff": 1}, seeds=1)
    grid(real, tmp_path / "two", {"random": 0, "staff": 1}, seeds=2)
    for folder in sorted((tmp_path / "two/runs").glob("*")):
        other = json.loads((folder / "metrics.json").read_text())["run"]["seed"] == 1
        samples = pd.read_parquet(folder / "samples.parquet")
        samples.assign(selected=samples["selected"] ^ other).to_parquet(folder / "samples.parquet")
    for folder, said, shares in (("one", "one seed", 1.0), ("two", "of different seeds", 0.0)):
        figure, caption = overlap(only_context(tmp_path / folder)) or pytest.fail("no figure")
        assert said in caption and {float(text.get_text()) for text in figure.axes[0].texts} == {shares}
        plt.close(figure)


def test_break_even_counts_the_fine_tunings_after_which_a_selection_has_paid(real: Path, tmp_path: Path):
    changes = {"overhead__seconds": 10.0, "finetuning__seconds": 2.0}
    estimated = {"overhead__str_basis": "estimated from FLOPs", "overhead__full_finetuning_seconds": 60.0}
    copied(real, tmp_path, "staff", 0.5, (0, 0), np.full(4, 20.0), **changes, **estimated)
    table = overhead.break_even(only_context(tmp_path))
    assert table is not None and table.cells.iloc[0]["on everything"] == "~60.0"
    measured = {"overhead__str_basis": "measured", "overhead__full_finetuning_seconds": 6.0}
    copied(real, tmp_path, "staff", 0.5, (1, 1), np.full(4, 20.0), **changes, **measured)
    table = overhead.break_even(only_context(tmp_path))
    assert table is not None
    row = table.cells.iloc[0]
    assert (row["in"], row["ratio"], row["pays from"]) == ("seconds", "2.00", "3")  # 10 + 3 x 2 < 3 x 6


def test_the_papers_differences_stand_beside_ours(real: Path, tmp_path: Path):
    grid(real, tmp_path, {"random": 0, "staff": 1})
    table = performance.against_paper(only_context(tmp_path), PAPER)
    assert table is not None and "not comparable" in table.caption
    row = table.cells[table.cells["pruning rate"] == "0.9"].iloc[0]
    at = PAPER[(PAPER["task"] == "dialogsum") & (PAPER["pruning_rate"] == 0.9) & (PAPER["target"] == "Gemma-7b")]
    value = at.set_index("method")["rouge_l"]
    assert row["Gemma-7b"] == f"{value['staff'] - value['random']:+.1f}"


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags |= {tag, *(name for name, _ in attrs)}


def test_text_of_samples_and_names_is_escaped(real: Path, tmp_path: Path):
    evil = "<iframe onload=alert(1)>|*_$x$%&"
    names = {"run__task": evil, "run__metric": "rougeL"}
    copied(real, tmp_path, "staff", 0.5, (0, 0), np.full(4, 20.0), **names)
    (file,) = tmp_path.glob("runs/*/predictions.parquet")
    table = pd.read_parquet(file)
    table.assign(prediction=evil, id=[f"{evil}{i}" for i in range(4)]).to_parquet(file)
    page = write(tmp_path, collect(tmp_path)).read_text()
    parser = _Tags()
    parser.feed(page)
    assert "iframe" not in parser.tags and "onload" not in parser.tags and "&lt;iframe" in page
    assert all(file.parent.name in ("tables", "figures") for file in tmp_path.glob("[tf]*/**/*.*"))
    tex = next(tmp_path.glob("tables/performance*.tex")).read_text()
    assert r"\_\$x\$\%\&" in tex


@pytest.mark.parametrize("low", [0.15, 0.02, 1e-6])
def test_the_labels_of_a_logarithmic_axis_do_not_run_into_one_another(low: float):
    figure, axes = plt.subplots(figsize=(3.4, 2))
    axes.scatter(scores := pd.Series([low, 1.2]), scores)
    axes.set_xscale("log")
    _spread_labels(axes.xaxis, scores)
    figure.canvas.draw()
    labels = [label for label in axes.get_xticklabels(which="both") if label.get_text()]
    places = sorted((label.get_window_extent() for label in labels), key=lambda place: place.x0)
    left, right = axes.get_window_extent().intervalx
    places = [place for place in places if left <= (place.x0 + place.x1) / 2 <= right]
    assert len(places) > 2 and all(a.x1 < b.x0 for a, b in pairwise(places))
    plt.close(figure)


def test_the_same_records_give_the_same_files(real: Path, tmp_path: Path):
    grid(real, tmp_path, {"random": 0, "staff": 1})

    def written() -> Iterator[tuple[str, bytes]]:
        write(tmp_path, collect(tmp_path))
        for file in sorted([*tmp_path.glob("tables/*"), *tmp_path.glob("figures/*"), tmp_path / "report.html"]):
            yield file.name, file.read_bytes()

    first = dict(written())
    (stale := tmp_path / "tables/performance-of-a-task-that-is-gone.md").write_text("an earlier report's")
    second = dict(written())
    assert [name for name in first if first[name] != second.get(name)] == []
    assert left_over(tmp_path) == [stale]


def test_a_report_of_a_packed_campaign_is_that_of_its_run_folders(real: Path, tmp_path: Path):
    grid(real, tmp_path / "folders", {"raw": -5, "full": 0, "random": -2, "staff": 3}, seeds=2)
    copied(real, tmp_path / "folders", "staff", 0.5, (0, 0), np.full(8, 30.0), config__method__num_regions=20)
    pack(recorded_runs(tmp_path / "folders"), tmp_path / "tables")
    texts, reports = [], []
    for results in (tmp_path / "folders", tmp_path / "tables"):
        texts.append(summary(table := collect(results)))
        write(results, table)
        files = [
            results / "metrics.csv",
            results / "report.html",
            *results.glob("tables/*"),
            *results.glob("*/*.svg"),
        ]
        named = {file.relative_to(results): file.read_text().replace(str(results), "RESULTS") for file in files}
        reports.append({name: re.sub(r"base64,[\w+/=]+", "", text) for name, text in named.items()})
    assert texts[0] == texts[1]
    assert len(reports[0]) > 20 and [name for name in reports[0] if reports[0][name] != reports[1].get(name)] == []


def test_a_thousand_records_are_reported_in_seconds(real: Path, tmp_path: Path):
    effects = {"full": 0.0, **{f"own{i}": 0.1 * i for i in range(5)}, "random": 0.0, "staff": 1.0}
    grid(real, tmp_path, effects, seeds=28, rates=(0.2, 0.5, 0.7, 0.8, 0.9))
    assert len(list(tmp_path.glob("runs/*"))) == 28 * (1 + 7 * 5)
    started = time.process_time()
    write(tmp_path, collect(tmp_path))
    taken = time.process_time() - started
    assert taken < 20, f"{taken:.1f} s of processor time"  # 10 on an idle machine


def test_floors_split_the_score_of_each_method_and_name_the_best_constant(real: Path, tmp_path: Path, monkeypatch):
    grid(real, tmp_path, {"random": 0, "staff": 1}, seeds=2, rates=(0.5,))
    answers = pd.read_parquet(real / "predictions.parquet")
    for folder in tmp_path.glob("runs/*"):  # random answers with the next sample's reference, STAFF with its own
        shift = 1 if folder.name.startswith("random") else 0
        texts = np.roll([group[0] for group in answers["references"]], shift)
        answers.assign(prediction=texts).to_parquet(folder / "predictions.parquet")
    arguments = ["--results", str(tmp_path), "--data", str(ROOT / "staff/assets"), "--rate", "0.5"]
    monkeypatch.setattr(sys, "argv", ["floors", *arguments])
    floors.main()
    (file,) = tmp_path.glob("tables/floors-*.md")
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in file.read_text().splitlines() if "|" in line
    ]
    rows = {row[0].split(" (")[0]: row[1:] for row in cells[2:]}
    assert set(rows) == {"constant chosen on training answers", "constant in hindsight", "random", "staff"}
    assert rows["staff"][1] == "100.00" and float(rows["random"][3]) < 1 < 50 < float(rows["staff"][3])
    assert float(rows["constant in hindsight"][1]) >= float(rows["constant chosen on training answers"][1]) > 5
    assert rows["constant in hindsight"][3] == "0.00" and "--data DATA --rate 0.5`" in file.read_text()
    assert rows["staff"][5].startswith("+") and rows["random"][5] == "–"
    write(tmp_path, collect(tmp_path))
    assert left_over(tmp_path) == [], "the report knows that it has a command of its own"
    pack(recorded_runs(tmp_path), tmp_path / "packed")
    monkeypatch.setattr(sys, "argv", ["floors", *arguments, "--results", str(tmp_path / "packed")])
    floors.main()
    (packed,) = tmp_path.glob("packed/tables/floors-*.md")
    assert packed.read_text().splitlines()[:-1] == file.read_text().splitlines()[:-1], (
        "tables do as well as folders"
    )


def test_a_replay_without_a_server_says_what_was_not_sent(real: Path):
    import os

    environment = {**os.environ, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    environment |= {"WANDB_INIT_TIMEOUT": "2", "WANDB_MODE": "online"}
    command = [sys.executable, "-m", "experiments.replay", str(real)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 1 and "0 of 1 runs are online" in done.stdout
    assert f"not sent: {real.name}" in done.stderr
