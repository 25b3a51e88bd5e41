"""The tables by group: what coresets are made of, and the metric on the test samples of each group."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pandas as pd

from experiments.report.comparisons import REFERENCES
from experiments.report.records import Context
from experiments.report.tables import Table, metric

MOST = 12
"""Groups with a column; of more, the largest."""


def tables(context: Context) -> list[Table]:
    """Composition and metric by group at the pruning rate of most methods; none where the task has no groups."""
    rate, _ = context.shown
    return [table for made in (_composition, _by_group) if (table := made(context, rate)) is not None]


def _composition(context: Context, rate: float) -> Table | None:
    counted = [run["groups"] for _, run in context.runs.iterrows() if run["groups"]]
    if not counted:
        return None
    pool = {group: count["pool"] for group, count in counted[0].items()}
    shown = _largest(pool)

    def shares(run: pd.Series) -> dict[str, float]:
        groups: Any = run["groups"]
        kept = {group: groups[group]["coreset"] for group in pool} if groups else {}
        total = sum(kept.values())
        found = {group: 100 * kept[group] / total for group in shown} if total else {}
        planted: Any = run["planted"]
        return {**found, **{part: 100 * share for part, share in planted.get("coreset", {}).items()}}

    planted: Any = next((run["planted"]["pool"] for _, run in context.runs.iterrows() if run["planted"]), {})
    first = {group: 100 * pool[group] / sum(pool.values()) for group in shown}
    first |= {part: 100 * share for part, share in planted.items()}
    rows = [{"method": "the pool", **_texts(first)}, *_rows(context, rate, shares)]
    wrong = " The shares of samples that were planted wrong or as copies stand beside them." if planted else ""
    caption = (
        f"What coresets of {context.title} are made of at a pruning rate of {rate:g}: samples of each group in "
        f"percent, mean over seeds.{_left_out(pool, shown)}{wrong}"
    )
    return Table(f"groups-{context.name}", caption, pd.DataFrame(rows))


def _by_group(context: Context, rate: float) -> Table | None:
    counted = [run["by_group"] for _, run in context.runs.iterrows() if run["by_group"]]
    if not counted:
        return None
    tested = {group: int(values["samples"]) for group, values in counted[0].items()}
    shown = _largest(tested)

    def values(run: pd.Series) -> dict[str, float]:
        return {group: run["by_group"][group][context.metric] for group in shown if group in run["by_group"]}

    caption = (
        f"{metric(context)} on the test samples of each group of {context.title}, at a pruning rate of {rate:g}, "
        f"mean over seeds.{_left_out(tested, shown)}"
    )
    return Table(f"by-group-{context.name}", caption, pd.DataFrame(_rows(context, rate, values)))


def _rows(context: Context, rate: float, of: Callable[[pd.Series], dict[str, float]]) -> list[dict[str, Any]]:
    rows = []
    for variant in context.variants:
        runs = context.cells.get((variant, REFERENCES.get(variant, rate)))
        found = [] if runs is None else [values for _, run in runs.iterrows() if (values := of(run))]
        if found:
            rows.append({"method": variant, **_texts(pd.DataFrame(found).mean().to_dict())})
    return rows


def _texts(values: dict[str, float]) -> dict[str, str]:
    return {name: f"{value:.1f}" for name, value in values.items()}


def _largest(counts: dict[str, int]) -> list[str]:
    return sorted(sorted(counts, key=lambda group: -counts[group])[:MOST])


def _left_out(counts: dict[str, int], shown: list[str]) -> str:
    left = len(counts) - len(shown)
    return f" {left} smaller groups are left out." if left else ""
