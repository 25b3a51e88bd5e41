"""How sure the numbers of a report are: intervals over seeds, paired differences, corrections, seed variance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from scipy import stats
from scipy.optimize import brentq
from scipy.special import stdtrit

DRAWS = 2000  # the standard error of a difference is then known to 1.6 %
LEVEL, POWER = 0.05, 0.8
_LEAST = 1e-20  # a p below it is zero


def t_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float | None]:
    """The mean of independent runs and half the width of its 95 % interval (Student's t); None for one run."""
    values = np.asarray(values, dtype=np.float64)
    if len(values) < 2:
        return float(values.mean()), None
    error = values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(error * stats.t.ppf(1 - LEVEL / 2, len(values) - 1))


@dataclass(frozen=True)
class Difference:
    """One mean minus another, both over the same seeds and test samples.

    Attributes:
        mean: in the metric's points.
        error: its bootstrap standard error.
        seeds: how many seeds the two have in common; with one, `error` knows nothing of seeds.
        samples: how many test samples.
        seed_share: the part of the error's variance that lies between seeds, from 0 to 1.
    """

    mean: float
    error: float
    seeds: int
    samples: int
    seed_share: float

    @property
    def p(self) -> float:
        """Two-sided: the level at which the difference is just significant; 1 where the two never differ."""
        if self.error == 0 or self.mean == 0:
            return float(self.mean == 0)
        found = abs(self.mean) / self.error
        if found >= self._critical(_LEAST):
            return 0.0
        at: Any = brentq(lambda log: self._critical(float(np.exp(log))) - found, np.log(_LEAST), 0.0)
        return float(np.exp(at))

    @property
    def half(self) -> float:
        """Half the width of the 95 % interval."""
        return self.error * self._critical(LEVEL)

    def detectable(self, level: float = LEVEL) -> float:
        """The true difference that a two-sided test at `level` finds four times in five, if the error is the true
        one: of few seeds, single estimates are far smaller or larger (`typical`)."""
        if self.error == 0:
            return 0.0
        freedom, between = max(self.seeds - 1, 1), self.error**2 * self.seed_share
        estimates, chance = _errors(freedom)
        seeds, samples = between * estimates, self.error**2 - between
        of_seeds, of_samples = (-stdtrit(f, level / 2) for f in (freedom, self.samples - 1))
        needed = (seeds * of_seeds + samples * of_samples) / np.sqrt(seeds + samples)
        return float(np.quantile(needed - self.error * chance, POWER))

    def _critical(self, level: float) -> float:
        """How many errors a difference must be away from zero: between Student's t for the seeds and for the
        samples, by their shares (Cochran and Cox, 1957); never too sure of three seeds or more, as Satterthwaite's
        degrees of freedom are."""
        of_seeds = -stdtrit(self.seeds - 1, level / 2) if self.seeds > 1 else 0.0
        return float(self.seed_share * of_seeds + (1 - self.seed_share) * -stdtrit(self.samples - 1, level / 2))


def crossed(by_seed: Sequence[Difference]) -> Difference:
    """A difference between the same runs that was estimated by each of several crossed kinds of seed, with what
    lies between all of them."""
    between = sum(d.error**2 * d.seed_share for d in by_seed)
    variance = between + max(d.error**2 * (1 - d.seed_share) for d in by_seed)
    share = between / variance if variance else 0.0
    first, seeds = by_seed[0], min(d.seeds for d in by_seed)
    return Difference(first.mean, float(np.sqrt(variance)), seeds, first.samples, float(share))


def typical(differences: Sequence[Difference]) -> Difference:
    """None at all, with the errors of these on average: a better estimate than any of them."""
    variances = np.array([d.error**2 for d in differences])
    between = variances @ [d.seed_share for d in differences]
    seeds, samples = (int(np.median([getattr(d, n) for d in differences])) for n in ("seeds", "samples"))
    share = between / variances.sum() if variances.any() else 0.0
    return Difference(0.0, float(np.sqrt(variances.mean())), seeds, samples, float(share))


def resampled(values: np.ndarray) -> np.ndarray:
    """The mean of every run over each of the bootstrap's test sets, shape (DRAWS, runs).

    Args:
        values: a metric by run and test sample, shape (runs, samples). Every run meets the same test sets, so that
            differences between the columns of the result are paired.
    """
    return _test_sets(values.shape[1]) @ values.T.astype(np.float32)


def paired_difference(a: np.ndarray, b: np.ndarray, means_a: np.ndarray, means_b: np.ndarray) -> Difference:
    """`a` minus `b` by a hierarchical bootstrap over seeds and test samples, with Student's t for the tails.

    Seeds and samples are crossed (every seed answers the same samples), so a draw takes both, apart from one
    another. It takes S - 1 of S seeds, which makes the variance over few seeds unbiased (Rao and Wu, 1988). Such a
    draw counts the chance in single answers three times (Owen, The pigeonhole bootstrap, 2007); two are taken off.

    Args:
        a, b: a metric by seed and test sample, shape (seeds, samples), at least two samples.
        means_a, means_b: `resampled` of the same, shape (DRAWS, seeds).
    """
    differences = a - b
    seeds, samples = differences.shape
    mean, by_seed, by_sample = differences.mean(), differences.mean(axis=1), differences.mean(axis=0)
    of_samples, of_seeds, of_answers = by_sample.var(ddof=1) / samples, 0.0, 0.0
    if seeds > 1:
        of_seeds = by_seed.var(ddof=1) / seeds
        residual = differences - by_seed[:, None] - by_sample + mean
        of_answers = (residual**2).sum() / ((seeds - 1) * (samples - 1)) / (seeds * samples)
    either = of_samples + of_seeds
    if either == 0:
        return Difference(float(mean), 0.0, seeds, samples, 0.0)
    draws = ((means_a - means_b) * _seed_weights(seeds)).sum(axis=1)
    variance = max(draws.var(ddof=1) - 2 * of_answers, of_samples, of_seeds)
    return Difference(float(mean), float(np.sqrt(variance)), seeds, samples, float(of_seeds / either))


@cache
def _errors(freedom: int) -> tuple[np.ndarray, np.ndarray]:
    """What sampling does to an estimated variance (as a factor) and to a mean (in standard errors), DRAWS times."""
    rng = np.random.default_rng([freedom, 3])
    return rng.chisquare(freedom, DRAWS) / freedom, rng.normal(size=DRAWS)


@cache
def _test_sets(samples: int) -> np.ndarray:
    """How often each draw has each test sample, divided by their number, shape (DRAWS, samples)."""
    counts = np.random.default_rng([samples, 1]).multinomial(samples, np.full(samples, 1 / samples), size=DRAWS)
    return (counts / samples).astype(np.float32)


@cache
def _seed_weights(seeds: int) -> np.ndarray:
    """The share of each seed in each draw of all seeds but one, shape (DRAWS, seeds)."""
    taken = max(1, seeds - 1)
    return np.random.default_rng([seeds, 2]).multinomial(taken, np.full(seeds, 1 / seeds), size=DRAWS) / taken


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
