"""How many seeds a question takes, from the variances that were measured."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from scipy import stats

from experiments.report.statistics import LEVEL, POWER, Difference

MOST = 1000


def with_seeds(difference: Difference, seeds: int) -> Difference:
    """The same difference had it been measured with `seeds` seeds: the part of the variance that lies between seeds
    shrinks with their number, and its degrees of freedom grow with it."""
    return replace(
        difference,
        seeds=seeds,
        of_seeds=difference.of_seeds * difference.seeds / seeds,
        freedom=difference.freedom * (seeds - 1) / (difference.seeds - 1),
    )


def power(difference: Difference, effect: float, level: float = LEVEL) -> float:
    """The chance that a two-sided test at `level` finds a true difference of `effect`, by the noncentral t
    distribution, if the variances of `difference` are the true ones."""
    if difference.error == 0:
        return float(effect != 0)
    critical = stats.t.ppf(1 - level / 2, difference.degrees)
    away = abs(effect) / difference.error
    found = stats.nct.sf(critical, difference.degrees, away) + stats.nct.cdf(-critical, difference.degrees, away)
    return float(found) if np.isfinite(found) else float(away > critical)


def power_of_equality(difference: Difference, effect: float, margin: float, level: float = LEVEL) -> float:
    """The chance that two one-sided tests at `level` show a true difference of `effect` to lie within `margin`."""
    if difference.error == 0:
        return float(abs(effect) < margin)
    t, critical = stats.t(difference.degrees), stats.t.ppf(1 - level, difference.degrees)
    sides = [(margin - effect) / difference.error - critical, (margin + effect) / difference.error - critical]
    return float(max(0.0, t.cdf(sides[0]) + t.cdf(sides[1]) - 1))


def seeds_needed(difference: Difference, effect: float, level: float = LEVEL) -> int | None:
    """The least number of seeds with which a two-sided test at `level` has power 0.8 against `effect`.

    None where a thousand do not, because the test samples are too few, and where one seed was measured.
    """
    return _least(difference, 2, lambda d: power(d, effect, level))


def seeds_to_decide(difference: Difference, margin: float, level: float = LEVEL) -> int | None:
    """The least number of seeds with which a true difference as large as the measured one is found, or is shown to
    lie within `margin`, with power 0.8; None as in `seeds_needed`."""
    tests: list[Callable[[Difference], float]] = [
        lambda d: power(d, d.mean, level),
        lambda d: power_of_equality(d, d.mean, margin, level),
    ]
    needed = [_least(difference, difference.seeds + 1, test) for test in tests]
    return min((n for n in needed if n is not None), default=None)


def _least(difference: Difference, first: int, test: Callable[[Difference], float]) -> int | None:
    """The least number of seeds from `first` on at which `test` has power 0.8."""
    if difference.seeds < 2:
        return None
    counts = range(first, MOST + 1)
    place = bisect_left(counts, POWER, key=lambda seeds: test(with_seeds(difference, seeds)))
    return counts[place] if place < len(counts) else None
