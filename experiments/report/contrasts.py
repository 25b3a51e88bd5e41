"""Registered contrasts: the few differences that a campaign was run for, named before it is read.

Every other difference of a report is exploratory. Contrasts are corrected (Holm) among themselves alone, so that
three questions pay for three tests and not for eighty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from experiments.report.comparisons import REFERENCES, comparison, comparison_over
from experiments.report.records import Context
from experiments.report.statistics import LEVEL, Difference
from staff.errors import UserError
from staff.evaluation.metrics import named_metric

BEST = "best"
TWINS = ("random_length", "random_matched")
"""Methods that draw at random what is as long as another's coreset."""

CONTROLS = (*TWINS, "leave_out")
"""Methods that say something of another one, and are no rivals."""

IN_SETS = ("random_matched ", "leave_out ")
"""Begin the names of controls of which an audit, or a test of scores, has many with different settings."""

CEILING = "oracle"
"""Knows what no method may know, and is no rival either."""


@dataclass(frozen=True)
class Contrast:
    """A method against another one, or against the best of several."""

    method: str
    others: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.method} - {self.others[0] if len(self.others) == 1 else 'best other'}"


@dataclass(frozen=True)
class Outcome:
    """What the runs say of a contrast.

    Against the best of J methods the question is about the least of J gains. That it exceeds a value is shown where
    every one of them does, each at the full level (an intersection-union test, Berger 1982); that it falls short of
    one, where any does at 1 / J of the level (Hsu 1984). So the best may be read off the same data.

    Attributes:
        rates: the pruning rates whose mean is compared; one, or all that the methods have in common.
        differences: gains of the method over each other one; above zero the method is better, whatever the
            direction of the metric.
        sign: turns a gain into a difference of the metric.
    """

    contrast: Contrast
    rates: tuple[float, ...]
    differences: tuple[Difference, ...]
    sign: int

    @property
    def hardest(self) -> Difference:
        """The least gain: over the best of the others."""
        return min(self.differences, key=lambda d: d.mean)

    @property
    def seeds(self) -> int:
        return min(d.seeds for d in self.differences)

    def above(self, value: float) -> float:
        """One-sided p of a true gain of `value` or less."""
        return max(d.above(value) for d in self.differences)

    def below(self, value: float) -> float:
        """One-sided p of a true gain of `value` or more."""
        return min(1.0, len(self.differences) * min(d.below(value) for d in self.differences))

    @property
    def p(self) -> float | None:
        """Two-sided, of no difference; None for one seed."""
        return None if self.seeds < 2 else min(1.0, 2 * min(self.above(0.0), self.below(0.0)))

    @property
    def shown(self) -> tuple[float, float, float]:
        """The difference in the metric, and the 95 % interval around it."""
        low = min(d.mean - d.at(LEVEL) for d in self.differences)
        high = min(d.mean + d.at(LEVEL / len(self.differences)) for d in self.differences)
        low, high = sorted((self.sign * low, self.sign * high))
        return self.sign * self.hardest.mean, low, high


def parse(texts: Sequence[str], methods: Sequence[str]) -> list[Contrast]:
    """The contrasts that `texts` name, each METHOD-METHOD, or METHOD-best for the best of all others that select.

    Raises:
        UserError: a text that names no two of `methods`, or may be read in two ways.
    """
    return [*dict.fromkeys(_parsed(text, methods) for text in texts)]


def _parsed(text: str, methods: Sequence[str]) -> Contrast:
    choices = f"choose from {', '.join(methods)}"
    parts = text.split("-")
    splits = [("-".join(parts[:i]).strip(), "-".join(parts[i:]).strip()) for i in range(1, len(parts))]
    known = [(a, b) for a, b in splits if a in methods and b in (*methods, BEST) and a != b]
    if len(known) > 1:
        raise UserError(f"--contrasts {text!r} may be read in {len(known)} ways: rename a method.")
    if not known:
        unknown = [side for split in splits for side in split if side not in (*methods, BEST)]
        if len(splits) == 1 and unknown:
            raise UserError(
                f"--contrasts {text!r} names {unknown[0]!r}, which is not a method of the recorded runs: {choices}."
            )
        raise UserError(f"--contrasts {text!r} is not METHOD-METHOD with two methods of the records: {choices}.")
    (method, other) = known[0]
    return Contrast(method, (other,))


def registered(context: Context, named: Sequence[Contrast] | None) -> list[Contrast]:
    """The contrasts of a context: those of `named` whose methods it has, or the default ones.

    By default the user's method (STAFF where all methods are the framework's own) against random, against the best
    other one, and against its twin of matched length. An ablation has none by default.
    """
    if named is not None:
        found = [
            Contrast(c.method, _rivals(context, c.method)) if c.others == (BEST,) else c
            for c in named
            if c.method in context.variants
        ]
        return [c for c in found if c.others and set(c.others) <= set(context.variants)]
    if context.varied != "method":
        return []
    found = []
    for method in _focal(context):
        rivals = _rivals(context, method)
        random = _runs_of(context, "random")
        found += [Contrast(method, (other,)) for other in random]
        found += [Contrast(method, rivals)] if set(rivals) - set(random) else []
        found += [Contrast(method, (twin,)) for twin in _twin(context, method)]
    return found


def _focal(context: Context) -> list[str]:
    """The user's own methods, or else STAFF."""
    selects = context.runs.groupby("variant")["selects"].first()
    own = [v for v in context.variants if not str(selects[v]).startswith(("staff.", "baselines."))]
    staff = [v for v in context.variants if context.is_staff(v)]
    return own or _runs_of(context, "staff") or staff[:1]


def _runs_of(context: Context, *methods: str) -> list[str]:
    """The variants of these methods, with or without settings in their labels."""
    return [v for v in context.variants if any(f"{v} ".startswith(f"{method} ") for method in methods)]


def _twin(context: Context, method: str) -> list[str]:
    """Random draws with the answer lengths of this method's coresets, and not of another's; of several names for
    the same, the one with most runs.

    A family may set other hyper-parameters of a method than of a reference. So the class decides where no run here
    is exactly what a twin refers to.
    """
    twins, runs = _runs_of(context, *TWINS), context.runs["variant"].value_counts()
    if not twins:
        return []
    first = context.runs.groupby("variant")["name"].first()
    configs = {v: context.recorded[str(name)].record()["config"]["method"] for v, name in first.items()}
    found = []
    for twin in twins:
        reference = configs[twin].get("reference", {})
        same = configs[method] == reference
        alike = reference not in configs.values() and configs[method].get("_target_") == reference.get("_target_")
        by_length = configs[twin].get("match", ["length"]) == ["length"]  # an older random_length had no match
        if by_length and (same or alike):
            found.append(twin)
    return sorted(found, key=lambda twin: -runs[twin])[:1]


def _rivals(context: Context, method: str) -> tuple[str, ...]:
    """Every other method that selects, but for controls, the oracle, and STAFF's presets beside STAFF."""
    apart = {method, *_runs_of(context, *REFERENCES, *CONTROLS, CEILING)}
    kin = {v for v in context.variants if context.is_staff(v)} if context.is_staff(method) else set()
    return tuple(v for v in context.variants if v not in apart | kin)


def outcomes(context: Context, contrasts: Sequence[Contrast], rates: Sequence[float]) -> list[Outcome]:
    """Of each contrast at each of these pruning rates, and over all of them where there are several."""
    found = []
    for contrast in contrasts:
        each = [outcome for rate in rates if (outcome := _outcome(context, contrast, (rate,)))]
        found += each
        if len(each) > 1:
            every = tuple(outcome.rates[0] for outcome in each)
            found += [outcome] if (outcome := _outcome(context, contrast, every)) else []
    return found


def _outcome(context: Context, contrast: Contrast, rates: tuple[float, ...]) -> Outcome | None:
    """None where the methods have no seeds in common there; of several others, those that have are compared."""
    compared = comparison(context, rates[0]) if len(rates) == 1 else comparison_over(context, rates)
    sign = named_metric(context.metric).sign
    between = [
        compared.between(contrast.method, other) if sign > 0 else compared.between(other, contrast.method)
        for other in contrast.others
    ]
    differences = tuple(difference for difference in between if difference is not None)
    return Outcome(contrast, rates, differences, sign) if differences else None
