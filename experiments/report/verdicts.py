"""The table of verdicts: what each registered contrast came to, in words; at once, or in a sequential design.

A sequential design looks at 5, 10 and 20 selection seeds, and stops each contrast as soon as it is decided. Looking
three times at 5 % each finds something in 11 % of cases where nothing is. Here the 5 % are spent over the looks: by
the fraction t of the planned seeds, each side has spent 2 - 2 Phi(z / sqrt(t)) of its 2.5 %, where z is the normal
quantile at 98.75 % (Lan and DeMets, 1983, after O'Brien and Fleming, 1979). Nearly all is left for the last look.
The levels are found for normal statistics and applied to p-values of Student's t (Jennison and Turnbull, 2000,
section 3.8). Several contrasts share the level equally (Bonferroni).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from scipy.optimize import brentq

from experiments.report.comparisons import comparison
from experiments.report.contrasts import Contrast, Outcome, outcomes, registered
from experiments.report.records import Context
from experiments.report.rendering import INTERVAL_OVER, NONE, Table, basis, metric, p_value
from experiments.report.statistics import LEVEL, MOST, Difference, holm, seeds_needed, seeds_to_decide
from staff.evaluation.metrics import named_metric


@dataclass(frozen=True)
class Question:
    """What the user asks of a campaign.

    Attributes:
        contrasts: registered before the results are read; None: the default ones.
        margin: two methods within it count as equal, in the metric's units; None: the metric's own.
        effect: a difference that is worth finding, by which seeds are planned; None: the margin.
    """

    contrasts: tuple[Contrast, ...] | None = None
    margin: float | None = None
    effect: float | None = None

    def margin_of(self, metric: str) -> float:
        return named_metric(metric).margin if self.margin is None else self.margin

    def effect_of(self, metric: str) -> float:
        return self.margin_of(metric) if self.effect is None else self.effect


DEFAULT = Question()


@dataclass(frozen=True)
class Verdict:
    """`p` is Holm's over all contrasts of the table, None for one seed."""

    outcome: Outcome
    p: float | None
    words: str

    @property
    def decided(self) -> bool:
        return self.p is not None and not self.words.startswith("undecided")


def verdicts(found: Sequence[Outcome], margin: float, unit: str = "point") -> list[Verdict]:
    """What each outcome came to; of each kind of verdict, one or more are wrong in at most 5 % of campaigns.

    Better or worse: a two-sided test. Equal: two one-sided tests at 5 % each (Schuirmann, 1987). Not worse: the
    gain is above minus the margin, one-sided at 2.5 %, as is usual for non-inferiority. Each of the three is
    corrected by Holm over all outcomes.
    """
    tested = [outcome for outcome in found if outcome.p is not None]
    differs = holm([outcome.p for outcome in tested])
    equal = holm([max(outcome.above(-margin), outcome.below(margin)) for outcome in tested])
    not_worse = holm([min(1.0, 2 * outcome.above(-margin)) for outcome in tested])
    p_values = iter(zip(differs, equal, not_worse))
    made = []
    for outcome in found:
        if outcome.p is None:
            made.append(Verdict(outcome, None, "one seed: no verdict"))
            continue
        p = next(p_values)
        within = f"{margin:g} {unit}{'' if margin == 1 else 's'}"
        words = _words(outcome, *p, within) or _undecided(outcome.hardest, margin, LEVEL / len(tested))
        made.append(Verdict(outcome, float(p[0]), words))
    return made


def _words(outcome: Outcome, differs: float, equal: float, not_worse: float, within: str) -> str | None:
    """By corrected p-values; None where none is small enough."""
    if differs <= LEVEL:
        word = "better" if outcome.hardest.mean > 0 else "worse"
        return f"{word}, by less than {within}" if equal <= LEVEL else word
    if equal <= LEVEL:
        return f"equal within {within}"
    if not_worse <= LEVEL:
        return f"not worse by {within}"
    return None


def _undecided(difference: Difference, margin: float, level: float) -> str:
    needed = seeds_to_decide(difference, margin, level)
    if needed is None:
        return "undecided: more seeds alone would not decide"
    more = needed - difference.seeds
    return f"undecided: {more} more seed{'s' if more > 1 else ''} would decide"


@cache
def judged(context: Context, question: Question = DEFAULT) -> list[Verdict]:
    """The verdicts on a context's registered contrasts."""
    found = outcomes(context, registered(context, question.contrasts))
    return verdicts(found, question.margin_of(context.metric), named_metric(context.metric).unit)


def tables(context: Context, question: Question = DEFAULT) -> list[Table]:
    """Those that the context's runs have something to say to."""
    return [made for made in (table(context, question), looks(context, question)) if made is not None]


def table(context: Context, question: Question = DEFAULT) -> Table | None:
    """The verdict on each contrast; None where there is no contrast."""
    margin, effect = question.margin_of(context.metric), question.effect_of(context.metric)
    made = judged(context, question)
    if not made:
        return None
    rows = []
    for verdict in made:
        outcome = verdict.outcome
        difference, low, high = outcome.shown
        needed = seeds_needed(outcome.hardest, effect)
        row = {
            "contrast": outcome.contrast.name,
            "pruning rate": f"{outcome.rates[0]:g}" if len(outcome.rates) == 1 else f"mean of {len(outcome.rates)}",
            "difference": f"{difference:+.2f}",
            "95 % interval": f"[{low:+.2f}, {high:+.2f}]",
            "interval over": INTERVAL_OVER[outcome.seeds > 1],
            "p (Holm)": NONE if verdict.p is None else p_value(verdict.p),
            "verdict": verdict.words,
            "seeds": str(outcome.seeds),
            f"seeds for {effect:g}": NONE if needed is None else str(needed),
        }
        rows.append(row)
    by_default = "the default contrasts" if question.contrasts is None else "contrasts named by the user"
    several = next((o.contrast for o in (v.outcome for v in made) if len(o.contrast.others) > 1), None)
    best = f" Best other: of {', '.join(several.others)}." if several else ""
    caption = (
        f"Registered contrasts in {metric(context)} ({named_metric(context.metric).words}) on {context.title}: "
        f"{by_default}; all other tables are exploratory. Intervals are not widened for the number of contrasts; "
        "verdicts are, by "
        f"Holm's correction over the {len(made)} rows. Equal within {margin:g}: by two one-sided tests. More seeds "
        "would decide: with power 0.8, if the measured difference and variances are the true ones. Seeds for "
        f"{effect:g}: how many find a true difference of {effect:g} four times in five, two-sided at 5 %, "
        f"uncorrected; {NONE} where {MOST:,} do not, because the test samples are too few, or one seed ran."
        f"{best}{basis(context)}"
    )
    return Table(f"verdicts-{context.name}", caption, pd.DataFrame(rows))


def looks(context: Context, question: Question = DEFAULT) -> Table | None:
    """Where each contrast with a single other method stands in the sequential design, from its first look on."""
    sign, gains = named_metric(context.metric).sign, {}
    for contrast in registered(context, question.contrasts):
        for rate in [rate for rate in context.rates if 0 < rate < 1 and len(contrast.others) == 1]:
            answers = comparison(context, rate).answers
            ours, theirs = (answers.get(v, {}) for v in (contrast.method, *contrast.others))
            common = [seeds for seeds in ours if seeds in theirs]
            by_run = pd.Series([sign * float((ours[s] - theirs[s]).mean()) for s in common], dtype=float)
            if common:
                gains[contrast.name, f"{rate:g}"] = by_run.groupby([selection for selection, _ in common]).mean()
    margin = question.margin_of(context.metric)
    made = progress({name: by_seed.to_dict() for name, by_seed in gains.items()}, margin=margin)
    if not any(decision.seeds for decision in made.decisions.values()):
        return None
    rows = [
        {
            "contrast": name,
            "pruning rate": rate,
            "looked at": f"{decision.seeds} seeds",
            "difference": NONE if not decision.seeds else f"{sign * decision.mean:+.2f} ± {decision.half:.2f}",
            "verdict": decision.verdict or "open",
        }
        for (name, rate), decision in made.decisions.items()
    ]
    planned = ", ".join(map(str, PLANNED))
    then = f"Selection seeds to add next: {', '.join(map(str, made.add))}. " if made.add else ""
    caption = (
        f"Sequential looks at {planned} selection seeds on {context.title}: intervals hold the truth at all looks "
        "and contrasts of the table together (O'Brien and Fleming's spending, Bonferroni), with the error of seeds "
        f"and not that of the test samples. A contrast that is decided needs no more seeds. {then}{basis(context)}"
    )
    return Table(f"looks-{context.name}", caption.strip(), pd.DataFrame(rows))


PLANNED = (5, 10, 20)


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
    gains: Mapping[Any, Mapping[int, float]],
    planned: Sequence[int] = PLANNED,
    margin: float = 0.0,
    level: float = LEVEL,
) -> Progress:
    """Which contrasts are decided at which look, and which seeds to add for the others.

    A contrast is better or worse where its repeated interval leaves zero out, and equal where the interval lies
    within `margin` (Jennison and Turnbull, 2000, chapter 9). The intervals hold the error of seeds on these test
    samples, not that of the samples.

    Args:
        gains: of each contrast, by selection seed; above zero where the method is better.
        planned: numbers of seeds at which to look, ascending; looks are taken at the lowest seeds.
        level: the size over all contrasts and looks.
    """
    levels = nominal_levels(tuple(planned), level / max(1, len(gains)))
    decisions = {name: _decision(by_seed, planned, levels, margin) for name, by_seed in gains.items()}
    open_ = [name for name, decision in decisions.items() if decision.verdict is None]
    have = set.intersection(*(set(gains[name]) for name in open_)) if open_ else set()
    wanted = next((count for count in planned if count > len(have)), 0) if open_ else 0
    seeds = (seed for seed in range(len(have) + wanted) if seed not in have)
    return Progress(decisions, tuple(seed for seed, _ in zip(seeds, range(wanted - len(have)))))


def _decision(
    gains: Mapping[int, float], planned: Sequence[int], levels: Sequence[float], margin: float
) -> Decision:
    values, decision = np.array([gains[seed] for seed in sorted(gains)]), Decision(None)
    for count, level in zip(planned, levels):
        if count > len(values) or decision.verdict is not None:
            break
        taken = values[:count]
        half = float(stats.t.isf(level / 2, count - 1) * taken.std(ddof=1) / np.sqrt(count))
        mean = float(taken.mean())
        verdict = ("better" if mean > 0 else "worse") if abs(mean) > half else None
        if verdict is None and abs(mean) + half < margin:
            verdict = "equal"
        decision = Decision(verdict, count, mean, half)
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
