"""Variance of paired differences: what lies between seeds, pooled over pairs, and what lies between test samples.

The model. Method v with seed s scores y(v, s, n) on test sample n. For two methods a and b over the same S seeds
and N samples,

    y(a, s, n) - y(b, s, n) = delta + u(s) + w(n) + e(s, n),

with independent errors of mean zero: u between seeds, w between test samples, e in single answers. The difference
of the means estimates delta with variance var(u) / S + var(w) / N + var(e) / (S N).

Which pairs share a variance. Let m(v, s) be the mean over the samples. A layout is the methods of one pruning rate
(or of the mean over several) that have the same S seeds. Where its K methods vary alike, its pairs share the
variance between seeds

    sigma2 = var over s of m(a, s) - m(b, s) = var(u) + var(e) / N.

It is twice the residual mean square of methods by seeds, with (K - 1)(S - 1) degrees of freedom: 10 for six methods
with three seeds, 16 for nine. An effect of the seed that all methods share cancels. Each pair keeps its own
component between samples.

The test that they vary alike is Bartlett's statistic on the K residual variances. Its null distribution is
simulated for the same layout, because the residuals of a layout are dependent and S is small. With three seeds the
test has little power, so its level is 0.25, as Bancroft (1964) advises for preliminary tests.

Where it does not reject, a pair has the larger of the pooled variance and its own, with all (K - 1)(S - 1) degrees
of freedom: a test of low power is no proof that this pair varies like the others.

Where it rejects, the variances of the pairs are moderated (Smyth, 2004): from the pair's own s2, with d = S - 1
degrees of freedom, and a prior s0^2, with d0,

    (d0 s0^2 + d s2) / (d0 + d)  with d0 + d degrees of freedom, at most (K - 1)(S - 1).

A pair whose own variance is above the pooled one keeps it, with S - 1 degrees of freedom, as Phipson et al. (2016)
do with variances that the prior does not explain.

What simulation says of tests at 5 % with six methods (`tests/test_report_statistics.py`): where all vary alike, 4 %
reject. Where one method has three times the standard deviation of the others, 5 % do over all pairs with three
seeds, but 10 % for pairs with that method (7 % with five seeds): three seeds do not show which method is noisy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property

import numpy as np
from scipy.special import digamma, polygamma

from experiments.report.statistics import Difference

PRELIMINARY = 0.25
DRAWS = 4000


@dataclass(frozen=True)
class BetweenSeeds:
    """The variance over seeds of the difference of each two methods.

    Attributes:
        variance: in points squared, shape (methods, methods).
        freedom: its degrees of freedom, likewise.
        homogeneous: p of the test that all methods vary alike.
    """

    variance: np.ndarray
    freedom: np.ndarray
    homogeneous: float


def between_seeds(means: np.ndarray) -> BetweenSeeds:
    """Of the means of methods by seed, shape (methods, seeds), at least two of each."""
    methods, seeds = means.shape
    residual = _residual(means)
    freedom = (methods - 1) * (seeds - 1)
    pooled = 2 * (residual**2).sum() / freedom
    own = (means[:, None] - means).var(axis=-1, ddof=1)
    p = _homogeneous(residual)
    if p > PRELIMINARY:
        return BetweenSeeds(np.maximum(own, pooled), np.full_like(own, freedom), p)
    prior, at = moderation(own[np.triu_indices(methods, 1)], seeds - 1)
    prior = min(prior, freedom - (seeds - 1))
    moderated = (prior * at + (seeds - 1) * own) / (prior + seeds - 1)
    variance = np.where(own > pooled, own, moderated)
    return BetweenSeeds(variance, np.where(own > pooled, seeds - 1.0, prior + seeds - 1), p)


def moderation(variances: np.ndarray, freedom: float) -> tuple[float, float]:
    """The prior's degrees of freedom d0 and its variance s0^2, from variances of `freedom` degrees of freedom each.

    By the moments of the log variances (Smyth, 2004, section 6.2); d0 is infinite where they vary no more than
    chance makes them.
    """
    log = np.log(np.maximum(variances, 1e-12 * variances.max())) - digamma(freedom / 2) + np.log(freedom / 2)
    beyond = log.var(ddof=1) - polygamma(1, freedom / 2)
    if beyond <= 0:
        return np.inf, float(np.exp(log.mean()))
    half = _inverse_trigamma(float(beyond))
    return 2 * half, float(np.exp(log.mean() + digamma(half) - np.log(half)))


def _inverse_trigamma(value: float) -> float:
    """By Newton's method on 1 / trigamma, which is convex (Smyth, 2004, appendix)."""
    at = 0.5 + 1 / value
    for _ in range(50):
        trigamma = polygamma(1, at)
        step = trigamma * (1 - trigamma / value) / polygamma(2, at)
        at += step
        if -step / at < 1e-8:
            break
    return float(at)


def _residual(means: np.ndarray) -> np.ndarray:
    """Without the effects of methods and of seeds, shape (..., methods, seeds)."""
    rows, columns = means.mean(axis=-1, keepdims=True), means.mean(axis=-2, keepdims=True)
    return means - rows - columns + means.mean(axis=(-1, -2), keepdims=True)


def _bartlett(residual: np.ndarray) -> np.ndarray:
    """Log of the mean variance minus the mean log variance of the methods, shape (...)."""
    variances = (residual**2).sum(axis=-1)
    mean = variances.mean(axis=-1, keepdims=True)
    return np.log(mean[..., 0]) - np.log(np.maximum(variances, 1e-12 * mean)).mean(axis=-1)


def _homogeneous(residual: np.ndarray) -> float:
    methods, seeds = residual.shape
    if methods < 3 or not residual.any():  # the residuals of two methods mirror one another
        return 1.0
    null = _null(methods, seeds)
    above = DRAWS - np.searchsorted(null, _bartlett(residual) - 1e-9)
    return float((1 + above) / (1 + DRAWS))


@cache
def _null(methods: int, seeds: int) -> np.ndarray:
    """Bartlett's statistic where all methods vary alike, sorted, shape (DRAWS,)."""
    drawn = np.random.default_rng([methods, seeds, 5]).normal(size=(DRAWS, methods, seeds))
    return np.sort(_bartlett(_residual(drawn)))


@dataclass(frozen=True, eq=False)
class Layout:
    """Methods that ran with the same seeds on the same test samples.

    Attributes:
        methods: their names.
        values: a metric, shape (methods, runs, samples), with at least two samples; runs in the order of `draws`.
        draws: of each kind of seed, which draw each run belongs to. Kinds are crossed: in a grid of selection seeds
            and fine-tuning seeds there are two, and errors of both add up.
    """

    methods: Sequence[str]
    values: np.ndarray
    draws: Sequence[np.ndarray]

    @cached_property
    def _by_draw(self) -> list[np.ndarray]:
        """The mean of each method in each draw, one array of shape (methods, draws, samples) for each kind."""
        return [
            np.stack([self.values[:, kind == draw].mean(axis=1) for draw in np.unique(kind)], axis=1)
            for kind in self.draws
        ]

    @cached_property
    def between(self) -> list[BetweenSeeds | None]:
        """For each kind of seed; None where there is one draw."""
        return [between_seeds(v.mean(axis=2)) if v.shape[1] > 1 else None for v in self._by_draw]

    def difference(self, a: str, b: str) -> Difference:
        """The mean of `a` minus that of `b`, over all runs."""
        i, j = self.methods.index(a), self.methods.index(b)
        samples = self.values.shape[2]
        of_seeds, weighed, of_samples = 0.0, 0.0, 0.0
        for values, between in zip(self._by_draw, self.between):
            difference = values[i] - values[j]
            draws = len(difference)
            of_samples = max(of_samples, _of_samples(difference))
            if between is not None:
                part = float(between.variance[i, j]) / draws
                of_seeds += part
                weighed += part**2 / float(between.freedom[i, j])
        counts = [v.shape[1] for v in self._by_draw]
        freedom = of_seeds**2 / weighed if weighed else float(min(counts) - 1)
        mean = float((self.values[i] - self.values[j]).mean())
        return Difference(mean, min(counts), samples, of_seeds, freedom, of_samples)


def _of_samples(difference: np.ndarray) -> float:
    """var(w) / N of differences by draw and sample: without the part of single answers, which the variance between
    seeds holds."""
    draws, samples = difference.shape
    by_sample = difference.mean(axis=0)
    variance = by_sample.var(ddof=1) / samples
    if draws == 1:
        return float(variance)
    residual = difference - difference.mean(axis=1, keepdims=True) - by_sample + difference.mean()
    of_answers = (residual**2).sum() / ((draws - 1) * (samples - 1)) / (draws * samples)
    return float(max(0.0, variance - of_answers))
