"""Means of cells and differences between methods, with what is known of their uncertainty."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations

import numpy as np
import pandas as pd

from experiments.report.records import Context
from experiments.report.statistics import (
    LEVEL,
    Difference,
    crossed,
    holm,
    paired_difference,
    resampled,
    t_interval,
    typical,
)


@dataclass(frozen=True)
class Mean:
    """Of a variant at a pruning rate: `half` the width of its interval over `units` independent seeds, None for one
    unit or where all runs gave the same answers."""

    value: float
    half: float | None
    units: int


@dataclass(frozen=True)
class Pair:
    """What `a` gives over `b` at a pruning rate; `p` is Holm's over all pairs of the table."""

    rate: float
    a: str
    b: str
    difference: Difference
    p: float = 1.0

    @property
    def significant(self) -> bool:
        return self.p <= LEVEL


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
    selecting = [v for v in context.variants if v not in ("raw target", "full")]
    for rate in [rate for rate in context.rates if 0 < rate < 1]:
        here = [v for v in selecting if (v, rate) in context.cells]
        wanted = [(a, b) if context.is_staff(a) else (b, a) for a, b in combinations(here, 2)]
        runs = {v: context.cells[v, rate] for v in here}
        if ("full", 0.0) in context.cells:
            runs["full"] = context.cells["full", 0.0]
            wanted += [(v, "full") for v in here if context.is_staff(v)]
        found += _compared(context, rate, runs, wanted)
    adjusted = holm([pair.difference.p for pair in found])
    return [replace(pair, p=float(p)) for pair, p in zip(found, adjusted)]


def of_finetuning(context: Context) -> Difference | None:
    """What fine-tuning on everything gives over the raw target; not one of the pairs that are corrected for."""
    full, raw = context.cells.get(("full", 0.0)), context.cells.get(("raw target", 1.0))
    if full is None or raw is None:
        return None
    of_any_seed = full.assign(name=raw["name"].iloc[0])  # the raw target knows no seed
    found = _compared(context, 0.0, {"full": full, "raw target": of_any_seed}, [("full", "raw target")])
    return found[0].difference if found else None


def _compared(
    context: Context, rate: float, runs: dict[str, pd.DataFrame], wanted: list[tuple[str, str]]
) -> list[Pair]:
    by_seeds = {v: r.set_index(["selection_seed", "finetune_seed"])["name"].to_dict() for v, r in runs.items()}
    names = [name for seeds in by_seeds.values() for name in seeds.values()]
    answers = [context.answers(name) for name in names]
    ids = next((a.index for a in answers if len(a) > 1), pd.Index([]))
    same = {n: a for n, a in zip(names, answers) if len(a) > 1 and a.index.equals(ids)}
    values = {n: a.to_numpy() for n, a in same.items() if not a.hasnans}
    if not values:
        return []
    position = {name: i for i, name in enumerate(values)}
    drawn = resampled(np.stack(list(values.values())))
    found = []
    for a, b in wanted:
        common = [s for s in by_seeds[a] if by_seeds[a][s] in values and by_seeds[b].get(s) in values]
        if not common:
            continue
        frame = pd.DataFrame(common, columns=["selection_seed", "finetune_seed"])
        differences = []
        for unit in units(frame):
            sides = []
            for seeds in (by_seeds[a], by_seeds[b]):
                picked = [[seeds[common[i]] for i in draw] for draw in frame.groupby(unit).indices.values()]
                sides.append(np.stack([np.mean([values[name] for name in group], axis=0) for group in picked]))
                columns = [drawn[:, [position[name] for name in group]].mean(axis=1) for group in picked]
                sides.append(np.stack(columns, axis=1))
            differences.append(paired_difference(sides[0], sides[2], sides[1], sides[3]))
        found.append(Pair(rate, a, b, crossed(differences)))
    return found


def outstanding(context: Context, rate: float, found: list[Pair]) -> dict[str, str]:
    """The best method at a rate and the second best, each where it is significantly better than all behind it."""
    here = [pair for pair in found if pair.rate == rate and pair.b != "full"]
    better = {(p.a, p.b) if p.difference.mean > 0 else (p.b, p.a) for p in here if p.significant}
    names = {name for pair in here for name in (pair.a, pair.b)}
    means = {v: m.value for v in names if (m := mean(context, v, rate))}
    ranked = sorted(means, key=lambda v: -means[v])
    marks = {}
    for place, (variant, mark) in enumerate(zip(ranked, ("bold", "italic"))):
        behind = ranked[place + 1 :]
        if behind and all((variant, other) in better for other in behind):
            marks[variant] = mark
    return marks


def detectable(rate: float, found: list[Pair]) -> float | None:
    """The smallest true difference that is found four times in five between two methods with errors as large as a
    rate's pairs have on average, at the level that Holm asks of the first of all the table's pairs."""
    here = [pair.difference for pair in found if pair.rate == rate]
    return typical(here).detectable(LEVEL / len(found)) if here else None
