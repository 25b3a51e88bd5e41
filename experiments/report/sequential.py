"""A sequential design: look at 5, 10 and 20 selection seeds, and stop each contrast as soon as it is decided.

Looking three times at 5 % each finds something in 11 % of cases where nothing is. Here the 5 % are spent over the
looks: by the fraction t of the planned seeds, each side has spent 2 - 2 Phi(z / sqrt(t)) of its 2.5 %, where z is
the normal quantile at 98.75 % (Lan and DeMets, 1983, after O'Brien and Fleming, 1979). Nearly all is left for the
last look. The levels are found for normal statistics and applied to p-values of Student's t (Jennison and Turnbull,
2000, section 3.8). Several contrasts share the level equally (Bonferroni). At a look, the variance between seeds is
that of `experiments.report.variance`, pooled over the methods that have its seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import count, islice
from typing import Any

import numpy as np
from scipy import stats
from scipy.optimize import brentq

from experiments.report.statistics import LEVEL
from experiments.report.variance import between_seeds

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
