"""The table of verdicts: what each registered contrast came to, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import pandas as pd

from experiments.report.comparisons import REFERENCES, comparison
from experiments.report.contrasts import Contrast, Outcome, outcomes, registered
from experiments.report.records import Context
from experiments.report.rendering import INTERVAL_OVER, NONE, Table, basis, digits_for, metric, p_value, signed
from experiments.report.seeds import PLANNED, Contest, progress
from experiments.report.statistics import LEVEL, MOST, Difference, holm, seeds_needed, seeds_to_decide
from staff.evaluation.metrics import named_metric


@dataclass(frozen=True)
class Question:
    """What the user asks of a campaign.

    Attributes:
        contrasts: registered before the results are read; None: the default ones.
        rates: pruning rates of the contrasts; None: all that select a part of the pool.
        margin: two methods within it count as equal, in the metric's units; None: the metric's own.
        effect: a difference that is worth finding, by which seeds are planned; None: the margin.
    """

    contrasts: tuple[Contrast, ...] | None = None
    rates: tuple[float, ...] | None = None
    margin: float | None = None
    effect: float | None = None

    def rates_of(self, context: Context) -> list[float]:
        return [r for r in context.rates if 0 < r < 1 and (self.rates is None or r in self.rates)]

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
    found = outcomes(context, registered(context, question.contrasts), question.rates_of(context))
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
        needed, digits = seeds_needed(outcome.hardest, effect), digits_for(margin)
        row = {
            "contrast": outcome.contrast.name,
            "pruning rate": f"{outcome.rates[0]:g}" if len(outcome.rates) == 1 else f"mean of {len(outcome.rates)}",
            "difference": signed(difference, digits),
            "95 % interval": f"[{signed(low, digits)}, {signed(high, digits)}]",
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
        f"Holm's correction over {len(made)} row{'' if len(made) == 1 else 's'}. "
        f"Equal within {margin:g}: by two one-sided tests. More seeds "
        "would decide: with power 0.8, if the measured difference and variances are the true ones. Seeds for "
        f"{effect:g}: how many find a true difference of {effect:g} four times in five, two-sided at 5 %, "
        f"uncorrected; {NONE} where {MOST:,} do not, because the test samples are too few, or one seed ran."
        f"{best}{basis(context)}"
    )
    return Table(f"verdicts-{context.name}", caption, pd.DataFrame(rows))


def looks(context: Context, question: Question = DEFAULT) -> Table | None:
    """Where each contrast with a single other method stands in the sequential design, from its first look on."""
    sign, contests = named_metric(context.metric).sign, {}
    for contrast in registered(context, question.contrasts):
        for rate in question.rates_of(context) if len(contrast.others) == 1 else []:
            means = {name: _by_seed(runs, sign) for name, runs in comparison(context, rate).answers.items() if runs}
            pair = contrast.method, contrast.others[0]
            kept = {name: by_seed for name, by_seed in means.items() if name in pair or name not in REFERENCES}
            if set(pair) <= set(kept) and set(kept[pair[0]]) & set(kept[pair[1]]):
                contests[contrast.name, f"{rate:g}"] = Contest(*pair, kept)
    margin = question.margin_of(context.metric)
    digits, made = digits_for(margin), progress(contests, margin=margin)
    if not any(decision.seeds for decision in made.decisions.values()):
        return None
    rows = [
        {
            "contrast": name,
            "pruning rate": rate,
            "looked at": f"{decision.seeds} seeds",
            "difference": NONE
            if not decision.seeds
            else f"{signed(sign * decision.mean, digits)} ± {decision.half:.{digits}f}",
            "verdict": decision.verdict
            or ("open; not worse" if decision.mean - decision.half > -margin else "open"),
        }
        for (name, rate), decision in made.decisions.items()
    ]
    planned = ", ".join(map(str, PLANNED))
    then = f"Selection seeds to add next: {', '.join(map(str, made.add))}. " if made.add else ""
    caption = (
        f"Sequential looks at {planned} selection seeds on {context.title}: intervals hold the truth at all looks "
        "and contrasts of the table together (O'Brien and Fleming's spending, Bonferroni), with the error of seeds "
        f"and not that of the test samples. A contrast that is decided needs no more seeds. Not "
        f"worse: by {margin:g}. {then}{basis(context)}"
    )
    return Table(f"looks-{context.name}", caption.strip(), pd.DataFrame(rows))


def _by_seed(runs: Mapping[tuple[int, int], np.ndarray], sign: int) -> dict[int, float]:
    """The mean over test samples by selection seed, over its fine-tuning seeds; higher is better."""
    means: dict[int, list[float]] = {}
    for (selection, _), values in runs.items():
        means.setdefault(selection, []).append(sign * float(values.mean()))
    return {seed: float(np.mean(found)) for seed, found in means.items()}
