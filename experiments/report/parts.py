"""How much of each method's score its answers owe to their own prompts: `staff.evaluation.floors` over the runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.export import training_samples
from experiments.report.comparisons import REFERENCES
from experiments.report.records import Context
from experiments.report.settings import SEEDS
from staff.errors import UserError
from staff.evaluation.floors import best_constant, specificity
from staff.evaluation.rouge_matrix import rouge_l_matrix

METRIC = "rougeL"  # every pair of answers and references is scored in a moment
MOST = 150  # runs that are split for a page
SEEDS_SHOWN = 3
WIDTH = 320  # of a bar, in pixels


def parts(contexts: Sequence[Context]) -> list[dict[str, Any]]:
    """Of each context by ROUGE-L: generic and specific part of each method's score, in pixels and points."""
    shown = [c for c in contexts if c.varied == "method" and c.metric == METRIC]
    rows = sum(len(c.variants) for c in shown)
    seeds = int(np.clip(MOST // max(rows, 1), 1, SEEDS_SHOWN))
    known: dict[str, str | None] = {}
    return [made for context in shown if (made := _context(context, seeds, known))]


def _context(context: Context, seeds: int, known: dict[str, str | None]) -> dict[str, Any] | None:
    rate, _ = context.shown
    found = {v: split for v in context.variants if (split := _split(context, v, rate, seeds))}
    if not found:
        return None
    lines = {"everything": sum(found["full"])} if "full" in found else {}
    constant = _constant(context, known)
    if constant is not None:
        lines["best constant answer"] = constant
    top = 1.05 * max(max(map(sum, found.values())), *lines.values(), 1e-9)

    def place(value: float) -> float:
        return round(value / top * WIDTH, 1)

    return {
        "context": context,
        "rate": f"{rate:g}",
        "seeds": seeds,
        "lines": [(name, place(value), f"{value:.1f}") for name, value in lines.items()],
        "rows": [
            {
                "name": variant,
                "generic": place(generic),
                "specific": place(max(specific, 0.0)),
                "texts": (f"{generic + specific:.1f}", f"{generic:.1f}", f"{specific:+.1f}"),
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
    for name in runs.sort_values(SEEDS)["name"].head(seeds):
        table = context.recorded[str(name)].predictions(["id", "prediction", "references"])
        if table is not None and len(table) > 1:
            references = [tuple(group) for group in table["references"]]
            split = specificity(METRIC, [*table["prediction"]], references, [*map(str, table["id"])])
            others.append(split.others.mean())
            specific.append(split.specific.mean())
    return (float(np.mean(others)), float(np.mean(specific))) if others else None


def _constant(context: Context, known: dict[str, str | None]) -> float | None:
    """The score of the constant answer chosen on training answers, where these are on this machine."""
    run = context.recorded[str(context.runs["name"].iloc[0])]
    data, table = run.record()["identity"]["data"], run.predictions(["references"])
    if table is None or data["source"]:  # of the hub: a report fetches nothing
        return None
    if data["train"] not in known:
        try:
            known[data["train"]] = best_constant(METRIC, [s.answer for s in training_samples(run)]).text
        except UserError:  # the data is elsewhere, or has changed
            known[data["train"]] = None
    answer = known[data["train"]]
    references = [tuple(group) for group in table["references"]]
    return None if answer is None else float(rouge_l_matrix([answer], references).mean())
