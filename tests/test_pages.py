"""The report's page of charts, and the pages of samples to browse."""

from __future__ import annotations

import json
import re
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, run_shrunk
from support.records import invented, write_runs

from experiments.campaign import pack
from experiments.export import training_samples
from experiments.recorded import recorded_run
from experiments.report import browse as browsing
from experiments.report import figures, opening, page
from experiments.report.__main__ import main, write
from experiments.report.browse import browse
from experiments.report.coreset_figures import _spread_labels
from experiments.report.page import WIDTH, parts
from experiments.report.records import Context, collect, contexts
from experiments.report.verdicts import DEFAULT
from staff.data.task import Sample
from staff.errors import UserError

# ---------------------------------------------------------------- the report


EFFECTS = {"raw": -5.0, "full": 0.0, "random": 0.0, "ccs": 0.1, "staff": 4.0}


def contexts_of(results: Path) -> list[Context]:
    return contexts(collect(results), results)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_runs(tmp_path_factory.mktemp("results"), EFFECTS)


@pytest.fixture(scope="module")
def text(results: Path) -> str:
    return write(results, collect(results)).read_text()


def test_what_was_compared_the_answer_the_verdicts_the_costs_and_the_details_come_in_this_order(text: str):
    heads = [
        "<dl>",
        'class="answer"',
        "Is the method better?",
        "What does it cost?",
        "about the prompt?",
        "Details",
    ]
    places = [text.index(head) for head in heads]
    assert places == sorted(places)
    for fact in ("tiny", "dialogsum", "random, ccs, staff", "0.5, 0.9", "24, with 3 seeds"):
        assert fact in text[places[0] : places[1]], fact
    assert '<table class="sortable">' not in text[: places[-1]] and "<details" in text[places[-1] :]


def test_the_sentences_are_made_from_the_numbers(results: Path):
    decided, largest, cost = opening.sentences(contexts_of(results), DEFAULT)
    assert decided.startswith("2 of 2 registered contrasts are decided: staff is better than random on dialogsum")
    verdict = max(
        (v for c in contexts_of(results) for v in opening.judged(c, DEFAULT)),
        key=lambda v: abs(v.outcome.hardest.mean),
    )
    assert f"{verdict.outcome.hardest.mean:+.2f} ROUGE-L" in largest and largest.endswith("better.")
    assert "with staff takes, at pruning rate 0.9, 15.0 s on dialogsum, tiny family (random: 16.0 s)" in cost


def test_nothing_decided_is_said_to_be_nothing(tmp_path: Path):
    write_runs(tmp_path, {"random": 0.0, "staff": 0.9}, rates=(0.5,), seeds=2, samples=8)
    assert opening.sentences(contexts_of(tmp_path), DEFAULT)[0].startswith(
        "The registered contrast is not decided: these runs"
    )


def test_what_differs_is_said_before_what_is_equal(tmp_path: Path):
    write_runs(tmp_path / "a", {"random": 0.0, "ccs": 4.0, "staff": 0.0}, rates=(0.5,), seeds=6)
    assert opening.sentences(contexts_of(tmp_path / "a"), DEFAULT)[0].startswith(
        "2 of 2 registered contrasts are decided: staff is worse than the best other method"
    )


def test_without_a_registered_contrast_the_page_says_so(tmp_path: Path):
    write_runs(tmp_path, {"random": 0.0, "ccs": 1.0})
    assert "No contrast is registered" in write(tmp_path, collect(tmp_path)).read_text()


@pytest.mark.parametrize(("metric", "effect"), [("rougeL", 4.0), ("nll", -4.0)])
def test_the_better_method_stands_on_the_right_whatever_the_direction_of_the_metric(
    tmp_path: Path, metric: str, effect: float
):
    write_runs(tmp_path, {"random": 0.0, "staff": effect}, metric=metric)
    ((row,), group) = next((group["rows"], group) for group in opening.forest(contexts_of(tmp_path), DEFAULT))
    assert row["kind"] == "better" and row["mean"] > group["zero"]
    assert row["difference"].startswith("+" if effect > 0 else "-"), "the number is the metric's own difference"
    assert row["ends"][0] <= row["mean"] <= row["ends"][1]
    rightmost = max(group["ticks"])[1]
    assert rightmost.startswith("+" if effect > 0 else "-")


def test_of_many_methods_only_those_with_several_rates_are_drawn_against_the_rate(tmp_path: Path):
    runs = [*invented({"random": 0.0, "staff": 1.0}, seeds=1)]
    runs += invented({f"m{i:02}": 0.1 * i for i in range(12)}, rates=(0.9,), seeds=1)
    pack({run.name: run for run in runs}, tmp_path)
    (context,) = contexts_of(tmp_path)
    made = figures.performance(context)
    assert made is not None
    figure, caption = made
    labels = figure.axes[0].get_legend_handles_labels()[1]
    assert sorted(labels) == ["random", "staff"] and "single pruning rate" in caption
    places = [x for line in figure.axes[0].lines for x in line.get_xdata() if 0 < x < 1]
    assert max(min(abs(x - rate) for rate in (0.5, 0.9)) for x in places) < 0.1, "each stays at its rate"


def test_an_interval_that_is_cut_off_is_marked():
    axis = opening.Axis(2.0)
    assert axis.place(99.0) == axis.place(2.0) == opening.WIDTH - 4 and axis.place(-99.0) == axis.place(-2.0) == 4


def test_generic_and_specific_part_add_up_to_the_score_of_the_stored_answers(results: Path):
    (part,) = parts(contexts_of(results))
    rows = {row["name"]: row["texts"] for row in part["rows"]}
    assert set(rows) == {"raw target", "full", "random", "ccs", "staff"}
    for own, generic, specific in rows.values():
        assert abs(float(own) - float(generic) - float(specific)) < 0.11 and float(own) > 0
    assert [name for name, *_ in part["lines"]] == ["everything"], "the training answers are not on this machine"


def test_the_compact_picture_is_smaller_and_shows_the_same(results: Path, text: str):
    from xml.etree import ElementTree

    svg = next(results.glob("figures/performance-*.svg")).read_text()
    small = page.compact(svg)
    assert len(small) < 0.9 * len(svg)
    paths = [[e.get("d", "") for e in ElementTree.fromstring(text).iter()] for text in (svg, small)]
    numbers = [[float(n) for n in re.findall(r"-?\d+\.\d+", " ".join(found))] for found in paths]
    assert len(numbers[0]) == len(numbers[1]) > 50
    assert max(abs(a - b) for a, b in zip(*numbers)) <= 0.01


def test_figures_beyond_the_pages_size_are_named_and_not_shown(results: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(page, "FIGURE_BYTES", 40_000)
    small = write(results, collect(results)).read_text()
    assert 0 < small.count("data:image") < len([*results.glob("figures/*.svg")])
    assert "Not in this page: <code>figures/" in small


def test_how_many_seeds_a_difference_takes_is_no_row_to_be_sorted(text: str):
    (foot, *_) = re.findall(r"<tfoot>(.*?)</tfoot>", text)
    assert "seeds for 1" in foot
    assert all("seeds for 1</td>" not in body for body in re.findall(r"<tbody>.*?</tbody>", text, re.DOTALL))


def test_a_bar_is_never_wider_than_its_place_though_answers_fit_other_prompts_better(results: Path):
    (part,) = parts(contexts_of(results))
    assert any(row["texts"][2].startswith("-") for row in part["rows"])
    assert all(row["generic"] + row["specific"] <= WIDTH for row in part["rows"])


# ---------------------------------------------------------------- samples


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a real run of STAFF, with data of its own."""
    results = tmp_path_factory.mktemp("browsed")
    shutil.copytree(ROOT / "staff/assets/dialogsum", results / "data")
    return run_shrunk(results, "method=staff", "pruning_rate=0.5", f"task.data_dir={results}/data")["folder"]


def content(page: str) -> pd.DataFrame:
    """The samples of a page, as its script reads them."""
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    read = json.loads(text)
    return pd.DataFrame(read["rows"], columns=[column["name"] for column in read["columns"]])


def a_pool(count: int) -> tuple[pd.DataFrame, list[Sample]]:
    ids = [f"s{i}" for i in range(count)]
    scores = np.arange(count, dtype=float)
    pool = pd.DataFrame({"id": ids, "selected": scores % 50 == 0, "answer_tokens": 3, "loss": scores})
    return pool, [Sample(id, f"prompt {id}", f" answer {id}", (f"answer {id}",)) for id in ids]


def test_every_sample_of_the_pool_is_there_with_its_text_its_scores_and_its_region(run: Path):
    recorded = recorded_run(run)
    pool, regions = recorded.samples(), recorded.regions()
    assert pool is not None and regions is not None
    table = content(browse(run).read_text())
    texts = {sample.id: (sample.prompt, sample.answer.strip()) for sample in training_samples(recorded)}
    assert table["id"].tolist() == pool["id"].tolist() and table["selected"].sum() == pool["selected"].sum() > 0
    assert [*zip(table["prompt"], table["answer"])] == [texts[id] for id in pool["id"]]
    assert np.allclose(table["speculative"], pool["speculative"], rtol=1e-5)
    sizes = table["region"].value_counts()
    assert all(sizes[r["region"]] == r["size"] for _, r in regions.iterrows())


def test_the_command_writes_beside_the_run_or_where_output_says(run: Path, tmp_path: Path, monkeypatch, capsys):
    for arguments, file in (
        ([str(run)], run / "browse.html"),
        ([run.name, "--results", str(run.parents[1])], run / "browse.html"),
        ([str(run), "--output", f"{tmp_path}/a/b.html"], tmp_path / "a/b.html"),
    ):
        file.unlink(missing_ok=True)
        monkeypatch.setattr(sys, "argv", ["staff-report", "--browse", *arguments])
        main()
        assert file.is_file() and str(file) in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["staff-report", "--output", "a.html"])
    with pytest.raises(SystemExit, match="--output is given without --browse"):
        main()


def test_tables_have_titles_in_words():
    kinds = {"specific": "Floors", "break-even": "Break even", "audit-s2l-p0.9": "Audit s2l, pruning rate 0.9"}
    assert {kind: page._title(kind) for kind in kinds} == kinds


def test_changed_data_is_refused(run: Path):
    file = run.parents[1] / "data/train.jsonl"
    kept = file.read_text()
    file.write_text(kept.replace('summary": "', 'summary": "now '))
    try:
        with pytest.raises(UserError, match="no longer those"):
            browse(run)
    finally:
        file.write_text(kept)


def test_no_text_of_a_sample_becomes_markup_and_nothing_is_fetched(run: Path, monkeypatch):
    evil = "</script><script>alert(1)</script><!-- <script> {{ 7 * 7 }} \u2028 <img src=//x.y onerror=alert(1)>"
    samples = [Sample(s.id, evil, f" {evil}", (evil,), group=evil) for s in training_samples(recorded_run(run))]
    monkeypatch.setattr(browsing, "training_samples", lambda _: samples)
    page = browsing.page(recorded_run(run))
    assert page.count("<script") == 2 == page.count("</script") and "<img" not in page and "<!-- <" not in page
    assert not re.search(r"(src|href)=[\"']|https?://", page.split('id="data"')[0])
    assert not re.search(r"innerHTML|insertAdjacentHTML|fetch\(|XMLHttp|import ", page.rsplit("<script>", 1)[1])
    assert content(page)[["prompt", "group"]].eq(evil).all(axis=None)


def test_a_large_pool_keeps_every_selected_sample_and_a_spread_of_the_others():
    pool, samples = a_pool(50_000)
    shown = browsing.rows(pool, None, samples)
    assert len(shown) == browsing.MOST and shown["selected"].sum() == 1000 and shown["id"].is_unique
    assert shown["loss"].min() == 0 and shown["loss"].max() > 49_900
    assert "region" not in shown and "group" not in shown


def test_a_score_that_is_not_known_is_null():
    pool, samples = a_pool(3)
    pool["verified"] = [np.nan, np.inf, 0.123456789]
    values = [row[-1] for row in json.loads(browsing._json(browsing.rows(pool, None, samples)))["rows"]]
    assert values == [None, None, 0.123457]


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
