"""Means of cells and differences between methods, with what is known of their uncertainty."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations

import numpy as np
import pandas as pd

from experiments.report.records import Context
from experiments.report.statistics import LEVEL, Difference, holm, seeds_needed, t_interval, typical
from experiments.report.variance import Layout
from staff.evaluation.metrics import named_metric

REFERENCES = {"full": 0.0, "raw target": 1.0}
"""Methods that select nothing, by their pruning rate; any other may be compared with them at its own."""

Answers = Mapping[str, Mapping[tuple[int, int], np.ndarray]]
"""The metric of each test sample, by variant and by selection and fine-tuning seed."""


@dataclass(frozen=True)
class Mean:
    """Of a variant at a pruning rate: `half` the width of its interval over `units` independent seeds, None for one
    unit or where all runs gave the same answers."""

    value: float
    half: float | None
    units: int


@dataclass(frozen=True)
class Pair:
    """What `a` gives over `b` at a pruning rate; `p` is Holm's over all pairs of the table, None for one seed."""

    rate: float
    a: str
    b: str
    difference: Difference
    p: float | None = None

    @property
    def significant(self) -> bool:
        return self.p is not None and self.p <= LEVEL


def units(runs: pd.DataFrame) -> list[pd.Series]:
    """Which independent draw each run belongs to, by every kind of seed that draws apart from the others.

    Runs whose selection and fine-tuning seeds vary together are each a draw. In a grid of both, runs of one
    selection seed share a coreset and are one draw of it, and runs of one fine-tuning seed share what that draws.
    """
    selection, finetune = runs["selection_seed"], runs["finetune_seed"]
    together = len(runs[["selection_seed", "finetune_seed"]].drop_duplicates())
    if together == selection.nunique() == finetune.nunique():
        return [selection.astype(str) + "," + finetune.astype(str)]
    return [seed.astype(str) for seed in (selection, finetune) if seed.nunique() > 1]


@cache
def mean(context: Context, variant: str, rate: float) -> Mean | None:
    """None where the grid has no such cell."""
    runs = context.cells.get((variant, rate))
    if runs is None:
        return None
    runs = runs[runs[context.metric].notna()]
    if runs.empty:
        return None
    draws = [runs.groupby(unit)[context.metric].mean().to_numpy(np.float64) for unit in units(runs)]
    if runs["answers"].nunique() == 1 or any(len(alike) == len(runs) for alike in context.same_answers(runs)):
        return Mean(float(draws[0].mean()), None, 1)
    halves = [t_interval(values)[1] for values in draws]
    half = None if None in halves else float(np.hypot.reduce(np.array(halves)))
    return Mean(float(draws[0].mean()), half, min(map(len, draws)))


def pairs(context: Context) -> list[Pair]:
    """Every two selecting methods at each pruning rate, and each of STAFF's against fine-tuning on everything.

    All pairs, not those with the best alone: which method is the best is read off the same data.
    """
    found = []
    selecting = [v for v in context.variants if v not in REFERENCES]
    for rate in [rate for rate in context.rates if 0 < rate < 1]:
        here = [v for v in selecting if (v, rate) in context.cells]
        wanted = [(a, b) if context.is_staff(a) else (b, a) for a, b in combinations(here, 2)]
        wanted += [(v, "full") for v in here if context.is_staff(v)]
        differences = comparison(context, rate)
        each = [(a, b, differences.between(a, b)) for a, b in wanted]
        found += [Pair(rate, a, b, difference) for a, b, difference in each if difference is not None]
    tested = [p for pair in found if (p := pair.difference.p) is not None]
    adjusted = iter(holm(tested))
    return [replace(pair, p=float(next(adjusted))) if pair.difference.p is not None else pair for pair in found]


def of_finetuning(context: Context) -> Difference | None:
    """What fine-tuning on everything gives over the raw target; not one of the pairs that are corrected for."""
    answers = {name: _answers(context, name, rate) for name, rate in REFERENCES.items()}
    if not answers["full"] or not answers["raw target"]:
        return None
    raw = next(iter(answers["raw target"].values()))  # it knows no seed
    return Comparison({**answers, "raw target": dict.fromkeys(answers["full"], raw)}).between("full", "raw target")


class Comparison:
    """Differences between methods that answered the same test samples.

    The methods that have all the seeds which two have in common form the layout of these two, in which variances
    are estimated; those that select nothing (`REFERENCES`) only where they are one of the two.
    """

    def __init__(self, answers: Answers):
        self.answers = answers
        self._layouts: dict[tuple, Layout] = {}

    def between(self, a: str, b: str) -> Difference | None:
        """The mean of `a` minus that of `b` over the seeds they share; None where they share none."""
        ours, theirs = self.answers.get(a, {}), self.answers.get(b, {})
        common = sorted(set(ours) & set(theirs))
        if not common:
            return None
        alike = [v for v, runs in self.answers.items() if v not in REFERENCES and set(common) <= set(runs)]
        members = tuple(dict.fromkeys([*alike, a, b]))
        key = (tuple(common), members)
        if key not in self._layouts:
            values = np.stack([np.stack([self.answers[v][seeds] for seeds in common]) for v in members])
            draws = units(pd.DataFrame(common, columns=["selection_seed", "finetune_seed"]))
            self._layouts[key] = Layout(members, values, [draw.to_numpy() for draw in draws])
        return self._layouts[key].difference(a, b)


@cache
def comparison(context: Context, rate: float) -> Comparison:
    """The methods at a pruning rate, and those that select nothing."""
    here = [(v, rate) for v in context.variants if (v, rate) in context.cells and v not in REFERENCES]
    return Comparison({variant: _answers(context, variant, at) for variant, at in [*here, *REFERENCES.items()]})


@cache
def comparison_over(context: Context, rates: tuple[float, ...]) -> Comparison:
    """The methods that ran at each of several pruning rates, by the mean over these rates."""
    at = [comparison(context, rate).answers for rate in rates]
    answers = {}
    for variant in set.intersection(*(set(answers) for answers in at)):
        seeds = set.intersection(*(set(answers[variant]) for answers in at))
        answers[variant] = {s: np.mean([answers[variant][s] for answers in at], axis=0) for s in sorted(seeds)}
    return Comparison({v: answers[v] for v in context.variants if v in answers})


def _answers(context: Context, variant: str, rate: float) -> dict[tuple[int, int], np.ndarray]:
    """By seeds; without runs whose predictions are gone or are of other test samples."""
    runs = context.cells.get((variant, rate), pd.DataFrame(columns=["selection_seed", "finetune_seed", "name"]))
    ids = _test_ids(context)
    found = {}
    for selection, finetune, name in runs[["selection_seed", "finetune_seed", "name"]].itertuples(index=False):
        answers = context.answers(name)
        if len(answers) > 1 and answers.index.equals(ids) and not answers.hasnans:
            found[int(selection), int(finetune)] = answers.to_numpy(np.float64)
    return found


@cache
def _test_ids(context: Context) -> pd.Index:
    """Those of the first run that has predictions."""
    indices = (context.answers(name).index for name in context.runs["name"])
    return next((index for index in indices if len(index) > 1), pd.Index([]))


def outstanding(context: Context, rate: float, found: Iterable[Pair]) -> dict[str, str]:
    """The best method at a rate and the second best, each where it is significantly better than all behind it."""
    sign = named_metric(context.metric).sign
    here = [pair for pair in found if pair.rate == rate and pair.b != "full"]
    better = {(p.a, p.b) if sign * p.difference.mean > 0 else (p.b, p.a) for p in here if p.significant}
    names = {name for pair in here for name in (pair.a, pair.b)}
    means = {v: m.value for v in names if (m := mean(context, v, rate))}
    ranked = sorted(means, key=lambda v: -sign * means[v])
    marks = {}
    for place, (variant, mark) in enumerate(zip(ranked, ("bold", "italic"))):
        behind = ranked[place + 1 :]
        if behind and all((variant, other) in better for other in behind):
            marks[variant] = mark
    return marks


def seeds_for(effect: float, rate: float, found: Iterable[Pair]) -> int | None:
    """How many seeds find a true difference of `effect` four times in five, between two methods with errors as
    large as a rate's pairs have on average; None where no number does, or one seed tells nothing of errors."""
    here = [pair.difference for pair in found if pair.rate == rate and pair.difference.seeds > 1]
    return seeds_needed(typical(here), effect) if here else None
