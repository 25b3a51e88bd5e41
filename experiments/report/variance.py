"""Variance of paired differences: what lies between seeds, and between test samples.

The model. Method v with seed s scores y(v, s, n) on test sample n. For two methods a and b over the same S seeds
and N samples,

    y(a, s, n) - y(b, s, n) = delta + u(s) + w(n) + e(s, n),

with independent errors of mean zero: u between seeds, w between test samples, e in single answers. The difference
of the means estimates delta with variance var(u) / S + var(w) / N + var(e) / (S N).

Let m(v, s) be the mean over the samples. A layout is the methods of one pruning rate (or of the mean over several)
that have the same S seeds:

    m(v, s) = mu(v) + c(s) + f(v, s),    var f(v, s) = tau2(v).

The effect c of the seed is common to all methods and cancels in differences. The variance between seeds of the
difference of a and b is var(u) + var(e) / N = tau2(a) + tau2(b). Each pair keeps its own component between samples.

Which pairs share a variance:

1. A method that varies much more than the others leaves the group: the one with the largest ratio of its variance
   to that of the rest, and so on. If all vary alike, the ratio has an F distribution with S - 1 and
   (K - 2)(S - 1) degrees of freedom; the level is 5 %, divided by the number K of methods left (Bonferroni). A pair
   with such a method has its own variance, with S - 1 degrees of freedom (the paired t test).
2. The group shares a pooled tau2, the residual mean square of methods by seeds, with (K - 1)(S - 1) degrees of
   freedom. A method whose own tau2(v), by Grubbs's unbiased estimate (1948), is larger keeps that, with S - 1.
3. The degrees of freedom of a difference follow from Welch (1938) and Satterthwaite (1946), and are at most
   (K - 1)(S - 1): 10 for six methods with three seeds that are all pooled, 16 for nine.

Why the larger: with three seeds no test shows reliably which method is noisy, and a noisy one must not borrow the
small variance of the others. Tests at 5 % of one of six methods that has three times the standard deviation of the
others reject 19 % of true nulls if all are pooled, 10 % if variances are moderated (Smyth, 2004), and 6 % by this
rule. The price is power where all vary alike. Methods that share draws with one another vary less than the model
says, so their intervals are too wide rather than too narrow.

Size and power by simulation are tabulated in `experiments/README.md` and checked in
`tests/test_report_statistics.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.special import fdtrc

from experiments.report.statistics import LEVEL, Difference


@dataclass(frozen=True)
class BetweenSeeds:
    """The variance over seeds of the difference of each two methods.

    Attributes:
        variance: in points squared, shape (..., methods, methods).
        freedom: its degrees of freedom, likewise.
    """

    variance: np.ndarray
    freedom: np.ndarray


def between_seeds(means: np.ndarray) -> BetweenSeeds:
    """Of the means of methods by seed, shape (..., methods, seeds), at least two of each."""
    once = means.shape[-1] - 1
    paired = (means[..., :, None, :] - means[..., None, :, :]).var(axis=-1, ddof=1)
    group, squares = _group(means)
    size = group.sum(axis=-1, keepdims=True)
    most = (size - 1) * once
    pooled = squares.sum(axis=-1, keepdims=True) / most
    own = size / np.maximum(size - 2, 1) * (squares / once - pooled / size)
    spread = np.maximum(own, pooled)
    weight = spread**2 / np.where(own > pooled, once, most)
    variance, weights = (part[..., :, None] + part[..., None, :] for part in (spread, weight))
    welch = np.divide(variance**2, weights, out=np.full_like(variance, np.inf), where=weights > 0)
    shared = (group[..., :, None] & group[..., None, :]) & (size > 2)[..., None]
    freedom = np.where(shared, np.minimum(welch, most[..., None]), once)
    return BetweenSeeds(np.where(shared, variance, paired), freedom)


def _group(means: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which methods remain after the outlying ones have left, and their sums of squared residuals (0 for the
    others), both of shape (..., methods)."""
    methods, seeds = means.shape[-2:]
    centred = means - means.mean(axis=-1, keepdims=True)
    group = np.ones(means.shape[:-1], dtype=bool)
    while True:
        size = group.sum(axis=-1, keepdims=True)
        of_seed = np.where(group[..., None], centred, 0).sum(axis=-2, keepdims=True) / size[..., None]
        squares = np.where(group, ((centred - of_seed) ** 2).sum(axis=-1), 0)
        total = squares.sum(axis=-1, keepdims=True)
        own = squares * size / (size - 1)
        ratio = own * (size - 2) / np.maximum(total - own, 1e-12 * total + np.finfo(float).tiny)
        p = fdtrc(seeds - 1, np.maximum(size - 2, 1) * (seeds - 1), ratio)
        noisiest = np.arange(methods) == ratio.argmax(axis=-1)[..., None]
        leaves = noisiest & (p <= LEVEL / size)
        if not leaves.any():
            return group, squares
        group &= ~leaves


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
