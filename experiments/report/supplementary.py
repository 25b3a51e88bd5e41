"""Supplementary tables: ablations of a method, groups of samples, the regions of both models, and warnings about
fine-tunings that taught little and seeds that change no answer.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from experiments.report.comparisons import REFERENCES, Pair, mean, pairs
from experiments.report.records import Context
from experiments.report.rendering import NONE, Table, around, basis, digits, metric, p_value, rate_column
from experiments.report.settings import SEEDS
from staff.evaluation.metrics import named_metric
from staff.regions import equal_width_edges, stratify


def ablations(context: Context, ablated: Sequence[Context]) -> Table | None:
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
                "mean": NONE if ours is None else f"{ours.value:.{digits(context)}f}",
                "mean as it is": NONE if centre is None else f"{centre.value:.{digits(context)}f}",
                "difference": around(pair.difference.mean, pair.difference.half, digits(context)),
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


MOST = 12
"""Groups with a column; of more, the largest."""


def groups(context: Context) -> list[Table]:
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


def region_similarity(small: np.ndarray, target: np.ndarray, num_regions: int) -> dict[str, float]:
    """How alike the regions of equal score width are that two models' scores make of the same samples.

    Args:
        small, target: scores, shape (N,), all finite; each model's regions span its own scores.

    Returns:
        "same region": the share of samples that lie in the region of the same rank with both; "by chance": that
        share if the scores of one model were shuffled; "mean overlap": Jaccard's index of the two models' i-th
        regions, averaged over those in which either has samples; "Spearman": of the scores, NaN where constant.
    """
    a, b = (stratify(s, equal_width_edges(s.min(), s.max(), num_regions)) for s in (small, target))
    sizes_a, sizes_b, shared = (np.bincount(r, minlength=num_regions) for r in (a, b, a[a == b]))
    either = sizes_a + sizes_b - shared
    constant = np.ptp(small) == 0 or np.ptp(target) == 0
    return {
        "same region": float((a == b).mean()),
        "by chance": float((sizes_a / len(a)) @ (sizes_b / len(b))),
        "mean overlap": float((shared[either > 0] / either[either > 0]).mean()),
        "Spearman": np.nan if constant else float(stats.spearmanr(small, target).statistic),
    }


def similarity(context: Context) -> Table | None:
    """By variant of STAFF, at the pruning rate of most methods, where the target scored every sample."""
    rate, _ = context.shown
    rows = []
    for variant in filter(context.is_staff, context.variants):
        found = pd.DataFrame(_similarities(context, context.cells.get((variant, rate), pd.DataFrame())))
        if len(found):
            row = {"method": variant, "regions": f"{found.pop('regions')[0]:g}", "seeds": str(len(found))}
            rows.append(row | {name: f"{values.mean():.2f}" for name, values in found.items()})
    if not rows:
        return None
    caption = (
        "Regions of equal score width by the speculative scores (the small model's, unless said otherwise) and by "
        f"the target's, on {context.title}, where the target scored every sample. Same region: the part of the "
        "samples that both put into the region of the same rank; by chance: the same if the scores of one model "
        "were shuffled; mean overlap: Jaccard's index of the two i-th regions, averaged over those in which "
        "either has samples. Means over seeds."
    )
    return Table(f"similarity-{context.name}", caption, pd.DataFrame(rows))


def _similarities(context: Context, runs: pd.DataFrame) -> Iterator[dict[str, float]]:
    for run in runs.to_dict("records"):
        samples = context.recorded[run["name"]].samples()
        if samples is not None and not samples[["speculative", "verified"]].isna().any(axis=None):
            both = samples[["speculative", "verified"]].to_numpy().T
            count = int(run["num_regions"])
            yield {"regions": count, **region_similarity(both[0], both[1], count)}


def warnings(context: Context) -> Table | None:
    """Every warning of the runs' records, and runs of different seeds with the same answers; None without any."""
    rows = []
    for (variant, rate), runs in context.cells.items():
        seeds_by_text = defaultdict(list)
        for _, run in runs.iterrows():
            for text in run["warnings"]:
                seeds_by_text[text].append(_seed(run))
        for alike in context.same_answers(runs):
            text = f"{len(alike)} seeds, and the same answer to every test sample: these runs count as one"
            seeds_by_text[text] += [_seed(run) for _, run in alike.iterrows()]
        for text, seeds in seeds_by_text.items():
            where = {"method": variant, "pruning rate": rate_column(rate), "seeds": ", ".join(seeds)}
            rows.append({**where, "warning": text})
    if not rows:
        return None
    caption = (
        f"Results on {context.title} to read with care. A fine-tuning of few optimiser steps, or that moved no "
        "weight, leaves the model nearly or exactly as it was. Answers that score less than a constant one tell "
        "little of their prompts. Seeds that give the same answers say nothing of how results vary by seed."
    )
    return Table(f"warnings-{context.name}", caption, pd.DataFrame(rows))


def _seed(run: pd.Series) -> str:
    """The run's seed, or selection and fine-tuning seed where they differ."""
    _, selection, finetune = (str(run[name]) for name in SEEDS)
    return selection if selection == finetune else f"{selection}/{finetune}"
