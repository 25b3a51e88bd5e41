"""How much of each method's score its answers owe to their own prompts: `staff.evaluation.floors` over the runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from experiments.export import training_samples
from experiments.report.comparisons import REFERENCES
from experiments.report.records import Context
from experiments.report.settings import SEEDS
from experiments.report.tables import metric
from staff.errors import UserError
from staff.evaluation.floors import best_constant, of_every_pair, specificity
from staff.evaluation.rouge_matrix import rouge_l_matrix

MOST = 150  # runs that are split for a page
SEEDS_SHOWN = 3
WIDTH = 320  # of a bar, in pixels
Constants = dict[tuple[str, str], str | None]
"""The best constant answer by metric and training data."""


def parts(contexts: Sequence[Context]) -> list[dict[str, Any]]:
    """Of each context by a metric of answers: both parts of each method's score, in pixels and points.

    As recorded, or by ROUGE-L from the stored answers, where every pair is scored in a moment.
    """
    shown = [
        c for c in contexts if c.varied == "method" and (of_every_pair(c.metric) or _recorded(c.runs, c.metric))
    ]
    rows = sum(len(c.variants) for c in shown)
    seeds = int(np.clip(MOST // max(rows, 1), 1, SEEDS_SHOWN))
    known: Constants = {}
    return [made for context in shown if (made := _context(context, seeds, known))]


def _context(context: Context, seeds: int, known: Constants) -> dict[str, Any] | None:
    rate, _ = context.shown
    found = {v: split for v in context.variants if (split := _split(context, v, rate, seeds))}
    if not found:
        return None
    lines = {"everything": sum(found["full"])} if "full" in found else {}
    constant = _constant(context, known)
    if constant is not None:
        lines["best constant answer"] = constant
    widest = (generic + max(specific, 0.0) for generic, specific in found.values())
    top = 1.05 * max(*widest, *lines.values(), 1e-9)

    def place(value: float) -> float:
        return round(value / top * WIDTH, 1)

    return {
        "context": context,
        "metric": metric(context),
        "rate": f"{rate:g}",
        "seeds": seeds,
        "lines": [(name, place(value), f"{value:.1f}") for name, value in lines.items()],
        "rows": [
            {
                "name": variant,
                "generic": place(generic),
                "specific": place(max(specific, 0.0)),
                "texts": (f"{generic + specific:.1f}", f"{generic:.1f}", f"{specific:+.1f}"),
                "below": constant is not None and generic + specific < constant,
            }
            for variant, (generic, specific) in found.items()
        ],
    }


def _split(context: Context, variant: str, rate: float, seeds: int) -> tuple[float, float] | None:
    """The mean score against other samples' references, and what is left of the own score."""
    runs = context.cells.get((variant, REFERENCES.get(variant, rate)))
    if runs is None:
        return None
    others, specific = [], []
    if floors := _recorded(runs.sort_values(SEEDS).head(seeds), context.metric):
        shuffled = np.array([floor["shuffled"] for floor in floors])
        return float(shuffled.mean()), float(np.mean([floor["score"] for floor in floors] - shuffled))
    for name in runs.sort_values(SEEDS)["name"].head(seeds):
        table = context.recorded[str(name)].predictions(["id", "prediction", "references"])
        if table is not None and len(table) > 1:
            references = [tuple(group) for group in table["references"]]
            split = specificity(context.metric, [*table["prediction"]], references, [*map(str, table["id"])])
            others.append(split.others.mean())
            specific.append(split.specific.mean())
    return (float(np.mean(others)), float(np.mean(specific))) if others else None


def _recorded(runs: pd.DataFrame, by: str) -> list[dict[str, Any]]:
    """What runs recorded of the floors under a metric."""
    return [found[by] for found in runs["floors"] if by in found]


def _constant(context: Context, known: Constants) -> float | None:
    """The score of the constant answer chosen on training answers, where these are on this machine."""
    if floors := _recorded(context.runs, context.metric):
        return float(floors[0]["constant"])
    run = context.recorded[str(context.runs["name"].iloc[0])]
    data, table = run.record()["identity"]["data"], run.predictions(["references"])
    if table is None or data["source"]:  # of the hub: a report fetches nothing
        return None
    asked = (context.metric, data["train"])
    if asked not in known:
        try:
            known[asked] = best_constant(context.metric, [s.answer for s in training_samples(run)]).text
        except UserError:  # the data is elsewhere, or has changed
            known[asked] = None
    answer = known[asked]
    references = [tuple(group) for group in table["references"]]
    return None if answer is None else float(rouge_l_matrix([answer], references, context.metric).mean())
