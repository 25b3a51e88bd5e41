"""The uncertainty of a report's numbers: intervals, differences, corrections, and the seeds they need."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

LEVEL, POWER = 0.05, 0.8


def t_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float | None]:
    """The mean of independent runs and half the width of its 95 % interval (Student's t); None for one run."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        return float(values.mean()), None
    error = values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(error * stats.t.ppf(1 - LEVEL / 2, len(values) - 1))


@dataclass(frozen=True)
class Difference:
    """One mean minus another, both over the same seeds and test samples (`experiments.report.variance`).

    Attributes:
        mean: in the metric's points.
        seeds: how many seeds the two have in common; with one, nothing is known of seeds.
        samples: how many test samples.
        of_seeds: variance of the mean from seeds.
        freedom: degrees of freedom of `of_seeds`.
        of_samples: variance of the mean from test samples; more seeds do not reduce it.
    """

    mean: float
    seeds: int
    samples: int
    of_seeds: float
    freedom: float
    of_samples: float

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return float(np.sqrt(self.of_seeds + self.of_samples))

    @property
    def degrees(self) -> float:
        """Degrees of freedom of the error: the harmonic mean of those of its parts, weighted by their shares.

        Satterthwaite (1946) weights by squared shares, which trusts an estimate from few seeds too much: in
        simulation 7 % of tests at 5 % reject with three seeds of two methods, 12 % with two. With less than two
        degrees of freedom between seeds the weights are square roots of the shares, for the same reason.
        """
        if not self.of_seeds:
            return float(self.samples - 1)
        share = self.of_seeds / (self.of_seeds + self.of_samples)
        seeds, samples = np.power([share, 1 - share], 1.0 if self.freedom >= 2 else 0.5)
        return float(1 / (seeds / self.freedom + samples / (self.samples - 1)))

    @property
    def p(self) -> float | None:
        """Two-sided, of no difference; None for one seed, which says nothing about another."""
        return None if self.seeds < 2 else min(1.0, 2 * min(self.above(0.0), self.below(0.0)))

    @property
    def half(self) -> float:
        """Half the width of the 95 % interval; for one seed, over test samples alone."""
        return self.at(LEVEL)

    def at(self, level: float) -> float:
        """Half the width of the interval at 1 - `level`."""
        return float(self.error * stats.t.ppf(1 - level / 2, self.degrees))

    def above(self, value: float) -> float:
        """One-sided p of a true difference of `value` or less."""
        if self.error == 0:
            return float(self.mean <= value)
        return float(stats.t.sf((self.mean - value) / self.error, self.degrees))

    def below(self, value: float) -> float:
        """One-sided p of a true difference of `value` or more."""
        return replace(self, mean=-self.mean).above(-value)


def typical(differences: Sequence[Difference]) -> Difference:
    """No difference, with the errors of these on average; each of two seeds or more."""
    seeds = int(np.median([d.seeds for d in differences]))
    return Difference(
        mean=0.0,
        seeds=seeds,
        samples=differences[0].samples,
        of_seeds=float(np.mean([d.of_seeds * d.seeds for d in differences]) / seeds),
        freedom=float(np.median([d.freedom / (d.seeds - 1) for d in differences]) * (seeds - 1)),
        of_samples=float(np.mean([d.of_samples for d in differences])),
    )


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
    """Holm's adjusted p-values (1979): those up to 0.05 are significant, all together at most 5 % in error."""
    p = np.asarray(p_values, dtype=np.float64)
    order = np.argsort(p)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return adjusted


@dataclass(frozen=True)
class SeedVariance:
    """Variance of a run's result, in points squared, by where it comes from; an estimate may be below zero."""

    selection: float
    finetuning: float
    rest: float
    """What neither seed explains by itself: the two together."""


def seed_variance(grid: np.ndarray) -> SeedVariance:
    """Variance components of results by selection seed and fine-tuning seed, shape (at least 2, at least 2).

    Two-way random effects without replication, by the method of moments (Searle, Casella and McCulloch, 1992).
    """
    rows, columns = grid.shape
    residual = grid - grid.mean(axis=1, keepdims=True) - grid.mean(axis=0, keepdims=True) + grid.mean()
    rest = (residual**2).sum() / ((rows - 1) * (columns - 1))
    selection = grid.mean(axis=1).var(ddof=1) - rest / columns
    finetuning = grid.mean(axis=0).var(ddof=1) - rest / rows
    return SeedVariance(float(selection), float(finetuning), float(rest))


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
