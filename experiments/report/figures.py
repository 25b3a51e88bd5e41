"""Figures of a report, PNG and SVG, all in one style.

Those of a context, and one picture of the first registered contrast of every task: its intervals, and the paper's
numbers beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from experiments.report.comparisons import mean
from experiments.report.contrasts import CEILING, CONTROLS, IN_SETS, Outcome, outcomes, registered
from experiments.report.coreset_figures import MANY, Made, agreement, coreset, length, overlap
from experiments.report.records import Context
from experiments.report.rendering import Drawn, figure_of, metric, save, styled
from experiments.report.verdicts import DEFAULT, Question
from staff.evaluation.metrics import named_metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw(context: Context, folder: Path) -> list[Drawn]:
    """The figures of a context that its runs have something to say to."""
    drawn = []
    with styled():
        for name, make in FIGURES.items():
            made = make(context) if context.varied == "method" or name in OF_ABLATIONS else None
            if made is not None:
                drawn.append(save(*made, folder / f"{name}-{context.name}", context.made_by))
    return drawn


def _looks(context: Context) -> Iterator[tuple[str, dict[str, Any]]]:
    """Colour and marker of each selecting method: the same in every figure."""
    import matplotlib

    colours = cycle(matplotlib.rcParams["axes.prop_cycle"].by_key()["color"])
    staff = [v for v in context.variants if context.is_staff(v)]
    for variant, colour, marker in zip([*staff, *context.baselines], colours, cycle("osD^vPX*<>")):
        yield variant, {"color": colour, "marker": marker, "label": variant}


def performance(context: Context) -> Made:
    """The metric against the pruning rate, with intervals over seeds; of many methods, those with several rates."""
    rates = [rate for rate in context.rates if 0 < rate < 1]
    looks = list(_looks(context))
    left_out = ""
    if len(looks) > MANY:
        several = {v for v, _ in looks if sum((v, rate) in context.cells for rate in rates) > 1}
        looks = [(v, look) for v, look in looks if v in several and not v.startswith(IN_SETS)]
        left_out = " Methods with a single pruning rate, and what audits compare, are in the tables alone."
    if not rates or not looks:
        return None
    figure, axes = figure_of(height=2.9)
    step = min([*np.diff(rates), 0.1]) * min(0.08, 0.5 / len(looks))
    for i, (variant, look) in enumerate(looks):
        points = [(rate, m) for rate in rates if (m := mean(context, variant, rate))]
        shift = (i - (len(looks) - 1) / 2) * step  # so that intervals do not hide one another
        x, y = [rate + shift for rate, _ in points], [m.value for _, m in points]
        axes.errorbar(x, y, yerr=[m.half or 0 for _, m in points], capsize=1.5, elinewidth=0.7, **look)
    for variant, rate, line in (("full", 0.0, "--"), ("raw target", 1.0, ":")):
        if found := mean(context, variant, rate):
            axes.axhline(found.value, color="0.35", linestyle=line, linewidth=1, label=variant)
    axes.set(xlabel="pruning rate", ylabel=_metric(context), xticks=rates)
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    _legend_above(figure, axes, context)
    caption = (
        f"{metric(context)} on {context.title} against the pruning rate: means and 95 % t-intervals over seeds, on "
        f"these test samples (none where one seed ran).{left_out}"
    )
    return figure, caption


def pareto(context: Context) -> Made:
    """The metric against what selection cost, at the rate of most methods; the front joins what nothing beats."""
    rate, runs = context.shown
    points = []
    for variant, look in _looks(context):
        twin = variant.startswith(CONTROLS)  # whose cost is that of the method whose twin it is
        if not twin and variant in runs and (found := mean(context, variant, rate)):
            seconds = float(context.cells[variant, rate]["overhead_seconds"].mean())
            points.append((seconds, found, look))
    if len(points) < 2:
        return None
    many = len(points) > MANY
    figure, axes = figure_of(height=4.6 if many else 2.9)
    if many:
        figure.set_figwidth(6.8)
    for seconds, found, look in points:
        axes.errorbar(seconds, found.value, yerr=found.half or 0, capsize=1.5, elinewidth=0.7, linestyle="", **look)
    front, sign = [], named_metric(context.metric).sign
    for seconds, found, look in sorted(points, key=lambda p: (p[0], -sign * p[1].value)):
        if look["label"] != CEILING and (not front or sign * found.value > sign * front[-1][1]):
            front.append((seconds, found.value))
    axes.step(
        *zip(*front), where="post", color="0.35", linewidth=0.8, linestyle="--", label="Pareto front", zorder=0
    )
    costs = [seconds for seconds, _, _ in points]
    wide = max(costs) > 10 * min(costs)  # within a decade the labels of a logarithmic axis run into one another
    axes.set(xscale="log" if wide else "linear", xlabel="selection overhead (s)", ylabel=_metric(context))
    if not wide:
        axes.locator_params(axis="x", nbins=5)
    if many:
        _name_points(axes, [(seconds, found.value, look["label"]) for seconds, found, look in points], wide)
    else:
        _legend_above(figure, axes, context)
    caption = (
        f"{metric(context)} against the overhead of selection on {context.title}, pruning rate {rate:g}: means "
        "over seeds with 95 % t-intervals; the dashed line joins what no other beats in both, by the means "
        "alone."
    )
    return figure, caption


def _name_points(axes: Any, points: list[tuple[float, float, str]], wide: bool) -> None:
    """A name beside each point, on the right unless only that side is taken; those of points of a like cost are
    moved apart."""
    low, high = axes.get_ylim()
    gap, reach = (high - low) / 32, 0.6 if wide else np.ptp([x for x, _, _ in points]) / 4
    places = [(np.log10(x) if wide else x, y) for x, y, _ in points]
    placed: dict[int, list[tuple[float, float]]] = {-1: [], 1: []}
    for (x, y, name), (at, _) in sorted(zip(points, places), key=lambda point: point[0][1]):
        right = any(reach / 8 < other - at < reach and abs(height - y) < 2 * gap for other, height in places)
        left = any(reach / 8 < at - other < 2.5 * reach and abs(height - y) < gap / 2 for other, height in places)
        side = -1 if right and not left else 1
        beside = [height for other, height in placed[side] if abs(other - at) < reach]
        height = max([y, *(other + gap for other in beside)])
        placed[side].append((at, height))
        line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.4, "shrinkA": 0, "shrinkB": 2}
        axes.annotate(
            name, (x, y), (6 * side, (height - y) / (high - low) * 240), textcoords="offset points", va="center",
            fontsize=6, ha="left" if side > 0 else "right", arrowprops=line if height > y else None,
        )  # fmt: skip
    axes.margins(x=0.12)


FIGURES: dict[str, Callable[[Context], Made]] = {
    "performance": performance,
    "pareto": pareto,
    "coreset": coreset,
    "agreement": agreement,
    "overlap": overlap,
    "length": length,
}
OF_ABLATIONS = ("performance", "pareto", "overlap")


def _metric(context: Context) -> str:
    """For an axis, with the direction where it is not the usual one."""
    way = named_metric(context.metric)
    return metric(context) if way.sign > 0 else f"{metric(context)} ({way.words})"


def _legend_above(figure: Any, axes: Any, context: Context) -> None:
    handles, labels = axes.get_legend_handles_labels()
    inches = 0.3 + 0.046 * max(map(len, labels), default=0)  # of the longest: its mark, and letters of 7 points
    columns = max(1, min(4, int(figure.get_figwidth() / inches)))
    title = context.varied if context.varied != "method" else None
    place = {"loc": "outside upper center", "ncols": columns, "columnspacing": 1.0, "handlelength": 1.6}
    figure.legend(handles, labels, title=title, **place)


PAPERS = {"facecolor": "none", "edgecolor": "#D55E00", "linewidth": 0.9, "marker": "D", "s": 13, "zorder": 3}


def draw_contrasts(
    contexts: Sequence[Context], paper: pd.DataFrame, file: Path, question: Question = DEFAULT
) -> Drawn | None:
    """`file` as .png and .svg, a panel for each context that has a contrast with a single other method."""
    shown = [(context, found) for context in contexts if (found := _compared(context, question))]
    if not shown:
        return None
    with styled():
        rows = [len(found) for _, found in shown]
        height = 0.8 + sum(0.15 * count + 0.3 for count in rows)
        figure, panels = figure_of(
            len(shown), 1, height, sharex=_same_metric(shown), squeeze=False, height_ratios=rows
        )
        for axes, (context, found) in zip(panels.flat, shown):
            _panel(axes, context, found, paper, question.margin_of(context.metric))
        for axes, (context, _) in zip(panels.flat, shown):
            if axes is panels.flat[-1] or not _same_metric(shown):
                axes.set_xlabel(f"difference in {metric(context)}, 95 % interval", loc="right")
        _legend(figure, panels)
        return save(figure, _caption(shown), file, shown[0][0].made_by)


def _compared(context: Context, question: Question) -> list[Outcome]:
    """The contrasts with one other method that the user named, or the first of the default ones; at each pruning
    rate and over all."""
    single = [c for c in registered(context, question.contrasts) if len(c.others) == 1]
    return outcomes(context, single if question.contrasts else single[:1], question.rates_of(context))


def _same_metric(shown: Sequence[tuple[Context, list[Outcome]]]) -> bool:
    return len({context.metric for context, _ in shown}) == 1


def _panel(axes: Axes, context: Context, found: Sequence[Outcome], paper: pd.DataFrame, margin: float) -> None:
    """A row for each outcome, the lowest pruning rate on top."""
    axes.axvspan(-margin, margin, color="0.92", linewidth=0, label=f"within {margin:g}", zorder=0)
    axes.axvline(0, color="0.35", linewidth=0.8, zorder=1)
    for place, outcome in enumerate(found):
        difference, low, high = outcome.shown
        several = len(outcome.rates) > 1
        look = {"color": "#0072B2", "marker": "s" if several else "o", "markersize": 4, "capsize": 1.5}
        axes.errorbar(difference, place, xerr=[[difference - low], [high - difference]], **look, zorder=2)
        for theirs in _papers(context, outcome, paper):
            axes.scatter(theirs, place + 0.3, label="the paper, each of its targets", **PAPERS)
    rates = [f"mean of {len(o.rates)}" if len(o.rates) > 1 else f"p = {o.rates[0]:g}" for o in found]
    several = len({outcome.contrast for outcome in found}) > 1
    names = [f"{o.contrast.name}, {rate}" if several else rate for o, rate in zip(found, rates)]
    axes.set_yticks(range(len(found)), names)
    axes.set_ylim(len(found) - 0.35, -0.6)
    axes.grid(False, axis="y")
    axes.set_title(context.title if several else f"{context.title}: {found[0].contrast.name}", loc="left")


def _papers(context: Context, outcome: Outcome, paper: pd.DataFrame) -> list[float]:
    """The paper's difference between STAFF and the other method for each of its targets, over the same rates."""
    method, (other,) = outcome.contrast.method, outcome.contrast.others
    task = str(context.runs["task"].iloc[0])
    own = method.split()[0] in ("staff", "staff_paper", "staff_official")
    if not own or context.metric != "rougeL":
        return []
    theirs = paper[(paper["task"] == task) & paper["pruning_rate"].isin(outcome.rates)]
    values = theirs.pivot(index=["target", "pruning_rate"], columns="method", values="rouge_l")
    if not {"staff", other} <= set(values.columns):
        return []
    gains = (values["staff"] - values[other]).unstack("pruning_rate")
    return gains.dropna().mean(axis=1).tolist()


def _legend(figure: Any, panels: np.ndarray) -> None:
    """One entry of each kind, above all panels."""
    found = {label: handle for axes in panels.flat for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(found.values(), found.keys(), loc="outside upper center", ncols=2)


def _caption(shown: Sequence[tuple[Context, list[Outcome]]]) -> str:
    seeds = sorted({outcome.seeds for _, found in shown for outcome in found})
    many = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    return (
        f"Registered contrasts of each task, by pruning rate p and over all: means over {many} seeds with 95 % "
        "intervals (errors of seeds and of test samples; of one seed: of test samples alone), not widened for "
        "the number of contrasts. Grey: the margin within which methods count as equal. Diamonds: Table 1 of the "
        "paper, one run a cell, other models."
    )
