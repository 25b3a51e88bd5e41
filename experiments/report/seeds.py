"""How many seeds: a number for an effect before a sweep, and when to stop during it.

Before a sweep, `staff-plan --effect` says how many seeds find an effect, by the variances of runs that were
recorded before (`sentences`).

During it, a sequential design looks at 5, 10 and 20 selection seeds, and stops each contrast as soon as it is
decided (`progress`).

Looking three times at 5 % each finds something in 11 % of cases where nothing is. Here the 5 % are spent over the
looks: by the fraction t of the planned seeds, each side has spent 2 - 2 Phi(z / sqrt(t)) of its 2.5 %, where z is
the normal quantile at 98.75 % (Lan and DeMets, 1983, after O'Brien and Fleming, 1979). Nearly all is left for the
last look. The levels are found for normal statistics and applied to p-values of Student's t (Jennison and Turnbull,
2000, section 3.8). Several contrasts share the level equally (Bonferroni). At a look, the variance between seeds is
that of `experiments.report.variance`, estimated from all methods that have its seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import count, islice
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats
from scipy.optimize import brentq

from experiments.report.comparisons import pairs
from experiments.report.records import Context, collect, contexts
from experiments.report.rendering import shown_as
from experiments.report.statistics import LEVEL, MOST, POWER, Difference, seeds_needed, typical
from experiments.report.variance import between_seeds
from staff.errors import UserError
from staff.evaluation.metrics import named_metric

# ---------------------------------------------------------------- before a sweep


@dataclass
class Planned:
    """What a sweep will compare: methods of a family on a task's test samples, by its first metric.

    Attributes:
        results: the sweep's folder of results.
    """

    family: str
    task: str
    metric: str
    samples: int
    results: Path
    rates: set[float] = field(default_factory=set)
    seeds: set[tuple[int, int]] = field(default_factory=set)


def checked_effect(effect: float) -> float:
    """`effect`, where it can be planned for.

    Raises:
        UserError: it is not above zero.
    """
    if not 0 < effect < float("inf"):
        raise UserError(f"--effect {effect:g} must be a number above 0, in the metric's units.")
    return effect


def sentences(planned: Iterable[Planned], effect: float, measured: Path | None = None) -> Iterator[str]:
    """For each comparison that is planned, the seeds that find a true difference of `effect`, by pruning rate.

    Variances are those between the methods recorded in `measured`, or else in the sweep's own results: of the same
    family if it was recorded there. The part of the test samples is scaled to their number in the plan.
    """

    @cache
    def recorded(results: Path) -> list[Context]:
        table = collect(results)
        return [] if table.empty else [c for c in contexts(table, results) if c.varied == "method"]

    for sweep in planned:
        results = measured or sweep.results
        alike = [c for c in recorded(results) if c.metric == sweep.metric and _is(c, "task", sweep.task)]
        alike.sort(key=lambda c: not _is(c, "family", sweep.family))
        needed = next((found for c in alike if (found := _needed(c, sweep, effect))), None)
        unit = named_metric(sweep.metric).unit
        size = f"{effect:g} {unit}{'' if effect == 1 else 's'} of {shown_as(sweep.metric)}"
        unknown = (
            f"unknown, since {results} holds no two methods with two seeds on this task: name other results by "
            "--measured, or run a pilot of two methods with three seeds."
        )
        yield f"seeds for {size} on {sweep.task}: {needed or unknown}"


def _is(context: Context, column: str, name: str) -> bool:
    return str(context.runs[column].iloc[0]) == name


def _needed(context: Context, sweep: Planned, effect: float) -> str | None:
    """None where no two methods have two seeds at a rate."""
    by_rate: dict[float, list[Difference]] = {}
    for pair in pairs(context):
        if pair.difference.seeds > 1:
            scale = pair.difference.samples / sweep.samples
            of_samples = pair.difference.of_samples * scale
            scaled = replace(pair.difference, samples=sweep.samples, of_samples=of_samples)
            by_rate.setdefault(pair.rate, []).append(scaled)
    if not by_rate:
        return None
    rates = sorted(set(by_rate) & sweep.rates) or sorted(by_rate)
    found = ", ".join(f"{_count(by_rate[rate], effect)} at pruning rate {rate:g}" for rate in rates)
    seeds = sorted({d.seeds for rate in rates for d in by_rate[rate]})
    return (
        f"{found} (the sweep has {len(sweep.seeds)}); two-sided at 5 %, power {POWER:g}, by the variances between "
        f"methods of {context.title} with {' to '.join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))} seeds."
    )


def _count(differences: Sequence[Difference], effect: float) -> str:
    needed = seeds_needed(typical(differences), effect)
    return f"no number up to {MOST:,} (too few test samples)" if needed is None else str(needed)


# ---------------------------------------------------------------- during it

PLANNED = (5, 10, 20)


@dataclass(frozen=True)
class Contest:
    """Method `a` against `b`, among methods that share the variance between seeds.

    Attributes:
        means: of each method, by selection seed; higher is better.
    """

    a: str
    b: str
    means: Mapping[str, Mapping[int, float]]

    @cached_property
    def seeds(self) -> list[int]:
        """Those of both, ascending."""
        return sorted(set(self.means[self.a]) & set(self.means[self.b]))

    def at(self, seeds: int) -> tuple[float, float, float]:
        """The difference over the lowest `seeds` seeds, its standard error, and the degrees of freedom of that."""
        first = self.seeds[:seeds]
        alike = [method for method, by_seed in self.means.items() if set(first) <= set(by_seed)]
        values = np.array([[self.means[method][seed] for seed in first] for method in alike])
        i, j = alike.index(self.a), alike.index(self.b)
        between = between_seeds(values)
        error = float(np.sqrt(between.variance[i, j] / seeds))
        return float((values[i] - values[j]).mean()), error, float(between.freedom[i, j])


@dataclass(frozen=True)
class Decision:
    """Where a contrast stands after its latest look.

    Attributes:
        verdict: "better", "worse", "equal", or None while it is open.
        seeds: of the look; 0 before the first.
        mean: of the differences by seed.
        half: half the width of the repeated interval, which holds the truth at all looks together.
    """

    verdict: str | None
    seeds: int = 0
    mean: float = float("nan")
    half: float = float("inf")


@dataclass(frozen=True)
class Progress:
    """Decisions by contrast, and the selection seeds to add before the next look; none where all are decided or
    the last look was taken."""

    decisions: dict[Any, Decision]
    add: tuple[int, ...]


def progress(
    contests: Mapping[Any, Contest],
    planned: Sequence[int] = PLANNED,
    margin: float = 0.0,
    level: float = LEVEL,
) -> Progress:
    """Which contrasts are decided at which look, and which seeds to add for the others.

    A contrast is better or worse where its repeated interval leaves zero out, and equal where the interval lies
    within `margin` (Jennison and Turnbull, 2000, chapter 9). The intervals hold the error of seeds on these test
    samples, not that of the samples.

    Args:
        planned: numbers of seeds at which to look, ascending; looks are taken at the lowest seeds.
        level: the size over all contrasts and looks.
    """
    levels = nominal_levels(tuple(planned), level / max(1, len(contests)))
    decisions = {name: _decision(contest, planned, levels, margin) for name, contest in contests.items()}
    open_ = [name for name, decision in decisions.items() if decision.verdict is None]
    have = set.intersection(*(set(contests[name].seeds) for name in open_)) if open_ else set()
    wanted = next((count for count in planned if count > len(have)), 0) if open_ else 0
    new = (seed for seed in count(min(have, default=0)) if seed not in have)
    return Progress(decisions, tuple(islice(new, max(0, wanted - len(have)))))


def _decision(contest: Contest, planned: Sequence[int], levels: Sequence[float], margin: float) -> Decision:
    decision = Decision(None)
    for seeds, level in zip(planned, levels):
        if seeds > len(contest.seeds) or decision.verdict is not None:
            break
        mean, error, freedom = contest.at(seeds)
        half = float(stats.t.isf(level / 2, freedom)) * error
        verdict = ("better" if mean > 0 else "worse") if abs(mean) > half else None
        if verdict is None and abs(mean) + half < margin:
            verdict = "equal"
        decision = Decision(verdict, seeds, mean, half)
    return decision


@cache
def nominal_levels(planned: tuple[int, ...], level: float = LEVEL) -> tuple[float, ...]:
    """The two-sided level of each look, `level` over all of them.

    By recursive integration of the density of a Brownian motion that has crossed no bound yet (Armitage, McPherson
    and Rowe, 1969).
    """
    fractions = np.array(planned) / planned[-1]
    spent = 4 * stats.norm.sf(stats.norm.isf(level / 4) / np.sqrt(fractions))
    steps = np.diff(fractions, prepend=0.0)
    places, density, found = np.array([0.0]), np.array([1.0]), []  # density: weighted for the sum over places
    for at, step, more in zip(fractions, np.sqrt(steps), np.diff(spent, prepend=0.0)):

        def excess(bound: float, step=step, places=places, density=density, more=more) -> float:
            beyond = stats.norm.sf((bound - places) / step) + stats.norm.sf((bound + places) / step)
            return float(density @ beyond - more)

        bound: Any = brentq(excess, 0.0, 40.0 * np.sqrt(at), xtol=1e-12)
        found.append(float(2 * stats.norm.sf(bound / np.sqrt(at))))
        grid = np.linspace(-bound, bound, 1001)
        density = stats.norm.pdf((grid[:, None] - places) / step) / step @ density * (grid[1] - grid[0])
        density[[0, -1]] /= 2  # the trapezoidal rule
        places = grid
    return tuple(found)
