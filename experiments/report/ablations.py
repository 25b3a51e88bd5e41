"""All ablations of a method in one table: each of their variants against the method as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from experiments.report.comparisons import Pair, mean, pairs
from experiments.report.records import Context
from experiments.report.tables import NONE, Table, basis, metric, p_value
from staff.evaluation.metrics import named_metric


def table(context: Context, ablated: Sequence[Context]) -> Table | None:
    """A row for each variant and pruning rate; None where no ablation holds a variant that `context` compares."""
    rows, marks = [], {}
    for ablation in ablated:
        for variant, pair in _against_centre(context, ablation):
            ours, centre = mean(ablation, variant, pair.rate), mean(ablation, pair.b, pair.rate)
            row = {
                "setting": ablation.varied,
                "value": variant,
                "as it is": pair.b,
                "pruning rate": f"{pair.rate:g}",
                "mean": NONE if ours is None else f"{ours.value:.2f}",
                "mean as it is": NONE if centre is None else f"{centre.value:.2f}",
                "difference": f"{pair.difference.mean:+.2f} ± {pair.difference.half:.2f}",
                "p (Holm)": p_value(pair.p),
                "seeds": str(pair.difference.seeds),
            }
            if pair.significant:
                marks[len(rows), "difference"] = "bold"
            rows.append(row)
    if not rows:
        return None
    caption = (
        f"Exploratory: one setting at a time against the method as it is, in {metric(context)} "
        f"({named_metric(context.metric).words}) on {context.title}, with 95 % intervals (errors of seeds and of "
        "test samples; of one seed: of test samples alone; not widened for the number of pairs). p: Holm's "
        f"correction over all pairs of one ablation; bold: significant.{basis(context)}"
    )
    return Table(f"ablations-{context.name}", caption, pd.DataFrame(rows), marks)


def _against_centre(context: Context, ablation: Context) -> list[tuple[str, Pair]]:
    """Each variant minus the one whose runs are those of a method in `context`; none where there is no such one."""
    shared = ablation.runs[ablation.runs["name"].isin(context.runs["name"])]["variant"].unique()
    if len(shared) != 1:
        return []
    found = []
    for pair in pairs(ablation):
        if pair.b == shared[0]:
            found.append((pair.a, pair))
        elif pair.a == shared[0]:
            turned = replace(pair.difference, mean=-pair.difference.mean)
            found.append((pair.b, replace(pair, a=pair.b, b=pair.a, difference=turned)))
    return found
