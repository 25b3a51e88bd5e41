"""A picture of the first registered contrast of every task: its intervals, and the paper's numbers beside them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from experiments.report.contrasts import Outcome, outcomes, registered
from experiments.report.drawing import Drawn, figure_of, save, styled
from experiments.report.performance import PAPER_TASKS
from experiments.report.records import Context
from experiments.report.tables import metric
from experiments.report.verdicts import DEFAULT, Question

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAPERS = {"facecolor": "none", "edgecolor": "#D55E00", "linewidth": 0.9, "marker": "D", "s": 13, "zorder": 3}


def draw(
    contexts: Sequence[Context], paper: pd.DataFrame, folder: Path, question: Question = DEFAULT
) -> Drawn | None:
    """`contrasts.png` and `.svg`, a panel for each context that has a contrast with a single other method."""
    shown = [(context, found) for context in contexts if (found := _first(context, question))]
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
                axes.set_xlabel(f"difference in {metric(context)}, with its 95 % interval")
        _legend(figure, panels)
        return save(figure, _caption(shown), folder / "contrasts", shown[0][0].made_by)


def _first(context: Context, question: Question) -> list[Outcome]:
    """The first registered contrast with one other method, at each pruning rate and over all."""
    single = [c for c in registered(context, question.contrasts) if len(c.others) == 1]
    return outcomes(context, single[:1])


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
    names = [f"mean of {len(o.rates)}" if len(o.rates) > 1 else f"p = {o.rates[0]:g}" for o in found]
    axes.set_yticks(range(len(found)), names)
    axes.set_ylim(len(found) - 0.35, -0.6)
    axes.grid(False, axis="y")
    axes.set_title(f"{context.title}: {found[0].contrast.name}", loc="left")


def _papers(context: Context, outcome: Outcome, paper: pd.DataFrame) -> list[float]:
    """The paper's difference between STAFF and the other method for each of its targets, over the same rates."""
    method, (other,) = outcome.contrast.method, outcome.contrast.others
    task = str(context.runs["task"].iloc[0])
    if not context.is_staff(method):
        return []
    theirs = paper[(paper["task"] == PAPER_TASKS.get(task, task)) & paper["pruning_rate"].isin(outcome.rates)]
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
        f"The first registered contrast of each task, by pruning rate p and over all: means over {many} seeds with "
        "95 % intervals (errors of seeds and of test samples; of one seed: of test samples alone), not widened for "
        "the number of contrasts. Grey: the margin within which methods count as equal. Diamonds: Table 1 of the "
        "paper, one run a cell, other models."
    )
