"""The report says what the records say: verdicts and warnings first, no chance marked, all text escaped."""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from support.records import RATES, copied, grid, invented, only_context, write_runs

from experiments.report import figures, overview, performance, supplementary, verdicts
from experiments.report.__main__ import left_over, main, write
from experiments.report.comparisons import mean, pairs
from experiments.report.contrasts import parse, registered
from experiments.report.figures import pareto
from experiments.report.records import as_table, by_metric, collect, contexts
from experiments.report.verdicts import Question
from staff.errors import UserError
from staff.tracking import write_record

PAPER = pd.read_csv(ROOT / "experiments/report/table1.csv")


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
    assert "Holm" in table.caption and "pooled over the methods" in table.caption and "3 seeds" in table.caption
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


def test_runs_are_compared_by_another_metric_in_files_of_their_own(real: Path, tmp_path: Path):
    grid(real, tmp_path, {"random": -2, "staff": 3})
    table = collect(tmp_path)
    first = write(tmp_path, table).read_text()
    page = write(
        tmp_path, by_metric(table, "nll"), Question((*parse(["staff-random"], ["staff", "random"]),), margin=0.02)
    )
    assert re.search(r"difference is [+-]0\.\d{3} nll \[[+-]0\.\d{3}, [+-]0\.\d{3}\]", page.read_text())
    assert page.name == "report-by-nll.html" and (tmp_path / "report.html").read_text() == first
    found = (tmp_path / "tables/verdicts-tiny-dialogsum-by-nll.md").read_text()
    assert "nll (lower is better)" in found and re.search(r"\[[+-]0\.\d{3}, [+-]0\.\d{3}\]", found)
    assert not list((tmp_path / "tables").glob("paper-*-by-nll.md")), "the paper has ROUGE-L"
    assert (tmp_path / "figures/contrasts-by-nll.png").is_file()
    with pytest.raises(UserError, match="--metric bleu was measured in no run: choose from rouge1, rouge2, rougeL"):
        by_metric(table, "bleu")


def test_the_first_picture_shows_the_first_contrast_of_each_task_and_the_papers_own(real: Path, tmp_path: Path):
    grid(real, tmp_path, {"random": -2, "ccs": 3, "staff": 3})
    context = only_context(tmp_path)
    found = figures._compared(context, verdicts.DEFAULT)
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
        (("--contrasts", "staff-grand"), "--contrasts 'staff-grand' names 'grand', which is not a method"),
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
        answers.drop(columns="nll").rename(columns={"rougeL": name}).to_parquet(folder / "predictions.parquet")


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
