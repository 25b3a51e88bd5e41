"""The page answers the user's question first: what was compared, what is decided, and what it cost."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from support.records import write_runs

from experiments.report import opening, page
from experiments.report.__main__ import write
from experiments.report.page import WIDTH, parts
from experiments.report.records import Context, collect, contexts
from experiments.report.verdicts import DEFAULT

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
    for fact in ("tiny", "dialogsum", "random, ccs, staff", "0.5, 0.9", "3, 24 runs in all"):
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
        "None of 1 registered contrast is decided"
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
