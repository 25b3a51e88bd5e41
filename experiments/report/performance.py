"""Tables of what the methods give: means, differences, relative gains, the paper's beside ours, seed variance."""

from __future__ import annotations

import numpy as np
import pandas as pd

from experiments.report.comparisons import Mean, Pair, mean, of_finetuning, outstanding, seeds_for
from experiments.report.records import Context
from experiments.report.rendering import (
    INTERVAL_OVER,
    NONE,
    Table,
    around,
    basis,
    digits,
    metric,
    p_value,
    rate_column,
    seeds,
    value,
)
from experiments.report.statistics import MOST, seed_variance, seeds_needed
from experiments.report.verdicts import DEFAULT, Question
from staff.evaluation.metrics import named_metric

COMPARED = (
    "Differences by Student's t, paired by sample, with the errors of seeds (of each method, at least "
    "those pooled over the methods of a pruning rate) and of test samples; Holm's correction over all pairs of the "
    "table"
)


def tables(context: Context, found: list[Pair], paper: pd.DataFrame, question: Question = DEFAULT) -> list[Table]:
    """Those that the context's runs have something to say to."""
    effect = question.effect_of(context.metric)
    made = [performance(context, found, effect), differences(context, found, effect)]
    if context.varied == "method":
        made += [gains(context), against_paper(context, paper), variance(context)]
    return [table for table in made if table is not None]


def performance(context: Context, found: list[Pair], effect: float = 1.0) -> Table:
    """Method by pruning rate: the mean over seeds and its interval, the best marked where it is known to be; below,
    how many seeds a difference of `effect` takes."""
    rows = []
    for variant in context.variants:
        means = {rate: mean(context, variant, rate) for rate in context.rates}
        rows.append({"method": variant, **{rate_column(r): _mean(m, digits(context)) for r, m in means.items()}})
    cells = pd.DataFrame(rows)
    marks = {}
    for rate in context.rates:
        for variant, mark in outstanding(context, rate, found).items():
            marks[context.variants.index(variant), rate_column(rate)] = mark
    needed = {rate: seeds_for(effect, rate, found) for rate in context.rates}
    planned = ""
    if any(needed.values()):
        last = {rate_column(rate): NONE if count is None else str(count) for rate, count in needed.items()}
        cells.loc[len(cells)] = {"method": f"seeds for {effect:g}", **last}
        planned = (
            f" Seeds for {effect:g}: how many find a true difference of {effect:g} between two methods four times "
            "in five (two-sided, 5 %, uncorrected), if errors are those of the rate's pairs on average; "
            f"{NONE} where {MOST:,} do not."
        )
    gain = of_finetuning(context)
    gained = ""
    if gain is not None:
        sure = "over test samples alone" if gain.p is None else f"p {p_value(gain.p)}, uncorrected"
        size = f"{around(gain.mean, gain.half, digits(context))}, {sure}"
        gained = f" What fine-tuning on everything gives over the raw target: {size}."
    caption = (
        f"{metric(context)} ({named_metric(context.metric).words}) on {context.title} "
        f"({context.runs['test'].max()} test samples), by {context.varied} and pruning rate. {seeds(context)} "
        f"{COMPARED}; bold: the best, italic: the second best, each where it is significantly better than all "
        f"behind it.{planned}{gained}{basis(context)}"
    )
    return Table(f"performance-{context.name}", caption, cells, marks)


def differences(context: Context, found: list[Pair], effect: float = 1.0) -> Table | None:
    """STAFF against each other method; without STAFF or without others, all pairs."""
    shown = [p for p in found if context.is_staff(p.a) != context.is_staff(p.b)] or found
    if not shown:
        return None
    rows = [
        {
            "pruning rate": f"{pair.rate:g}",
            "method": pair.a,
            "against": pair.b,
            "difference": around(pair.difference.mean, pair.difference.half, digits(context)),
            "p": p_value(pair.difference.p),
            "p (Holm)": p_value(pair.p),
            "interval over": INTERVAL_OVER[pair.difference.seeds > 1],
            "seeds": str(pair.difference.seeds),
            f"seeds for {effect:g}": str(seeds_needed(pair.difference, effect) or NONE),
        }
        for pair in shown
    ]
    caption = (
        f"Exploratory: method minus the one it is held against, in {metric(context)} "
        f"({named_metric(context.metric).words}) on {context.title}, with 95 % intervals (not widened for the "
        f"number of pairs); bold: significant. {COMPARED} ({len(found)} pairs). A pair with one seed tells nothing "
        f"of seeds and has no p. Seeds for {effect:g}: how many find a true difference of {effect:g} four times in "
        f"five, two-sided at 5 %, uncorrected; {NONE} where {MOST:,} do not or one seed ran.{basis(context)}"
    )
    marks = {(i, "difference"): "bold" for i, pair in enumerate(shown) if pair.significant}
    return Table(f"differences-{context.name}", caption, pd.DataFrame(rows), marks)


def gains(context: Context) -> Table | None:
    """STAFF's relative gain over the best baseline of each cell, and over each, as the paper states it."""
    rows, sign = [], named_metric(context.metric).sign
    for staff in filter(context.is_staff, context.variants):
        over = {r: {b: value(context, b, r) for b in context.baselines} for r in context.rates if 0 < r < 1}
        best = {
            r: max((v for v in values.values() if v), key=lambda v: sign * v, default=None)
            for r, values in over.items()
        }
        full = dict.fromkeys(over, value(context, "full", 0.0))
        named = [("the best baseline", best)]
        named += [(b, {r: values[b] for r, values in over.items()}) for b in context.baselines]
        named += [("full", full)]
        for name, others in named:
            gain = {r: _gain(value(context, staff, r), other, sign) for r, other in others.items()}
            known = [g for g in gain.values() if g is not None]
            if known:
                texts = {rate_column(r): NONE if g is None else f"{g:+.1f} %" for r, g in gain.items()}
                rows.append({"method": staff, "over": name, **texts, "mean": f"{np.mean(known):+.1f} %"})
    if not rows:
        return None
    caption = (
        f"Relative gain in {metric(context)} on {context.title}, from the means over seeds, by pruning rate; above "
        "zero: STAFF is better. "
        "Whether a gain is more than chance stands in the table of differences. The paper's Table 1: +3.4 % at "
        "most over the best baseline of a cell; its 54.3 % is one cell's gain over GraNd."
    )
    return Table(f"gains-{context.name}", caption, pd.DataFrame(rows))


def against_paper(context: Context, paper: pd.DataFrame) -> Table | None:
    """The paper's differences between STAFF and each baseline in ROUGE-L beside ours."""
    if context.metric != "rougeL":
        return None
    task = str(context.runs["task"].iloc[0])
    theirs = paper[paper["task"] == task]
    values = theirs.set_index(["target", "method", "pruning_rate"])["rouge_l"]
    rows = []
    for rate in [rate for rate in context.rates if 0 < rate < 1]:
        for staff in filter(context.is_staff, context.variants):
            for baseline in [*context.baselines, "full"]:
                there = rate if baseline != "full" else 0.0
                ours, other = value(context, staff, rate), value(context, baseline, there)
                row = {"pruning rate": f"{rate:g}", "method": staff, "against": baseline}
                row |= {"here": NONE if ours is None or other is None else f"{ours - other:+.2f}"}
                for target in theirs["target"].unique():
                    a, b = values.get((target, "staff", rate)), values.get((target, baseline, there))
                    row[target] = NONE if a is None or b is None else f"{a - b:+.1f}"
                if row["here"] != NONE and any(row[target] != NONE for target in theirs["target"].unique()):
                    rows.append(row)
    if not rows:
        return None
    caption = (
        f"Differences in {metric(context)} points, here ({context.title}) and in Table 1 of the paper (ROUGE-L, "
        "one run a cell). Absolute values are not comparable: the authors' ROUGE has another tokeniser, they "
        "sampled where we decode greedily, their pool and test set were cut from all splits together, and the "
        "models differ. The table of differences has the uncertainty of ours; that of the paper's is unknown."
    )
    return Table(f"paper-{context.name}", caption, pd.DataFrame(rows))


def variance(context: Context) -> Table | None:
    """Where results vary from: selection seeds, fine-tuning seeds, both together."""
    rows = []
    for (variant, rate), runs in context.cells.items():
        grid = runs.pivot_table(index="selection_seed", columns="finetune_seed", values=context.metric).dropna()
        if min(grid.shape) < 2:
            continue
        parts = seed_variance(grid.to_numpy())
        row = {"method": variant, "pruning rate": f"{rate:g}", "grid": f"{grid.shape[0]} x {grid.shape[1]}"}
        named = {"selection": parts.selection, "fine-tuning": parts.finetuning, "rest": parts.rest}
        rows.append(row | {name: f"{np.sqrt(max(0.0, part)):.2f}" for name, part in named.items()})
    if not rows:
        return None
    caption = (
        f"Standard deviation of {metric(context)} on {context.title} by where it comes from: the seed of "
        "selection, that of fine-tuning, and what neither explains alone (two-way random effects by the method of "
        "moments; an estimate below zero is shown as 0). With few seeds, these are rough estimates."
    )
    return Table(f"variance-{context.name}", caption, pd.DataFrame(rows))


def _mean(found: Mean | None, digits: int) -> str:
    if found is None:
        return NONE
    return f"{found.value:.{digits}f}" + ("" if found.half is None else f" ± {found.half:.{digits}f}")


def _gain(ours: float | None, theirs: float | None, sign: int) -> float | None:
    """In per cent; above zero where ours is better."""
    return None if ours is None or not theirs else sign * 100 * (ours / theirs - 1)
