"""What the page opens with: what was compared, the answer in three sentences, and the verdicts with a plot."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from experiments.report.contrasts import IN_SETS
from experiments.report.records import Context
from experiments.report.rendering import digits_for, metric, number, signed
from experiments.report.settings import SEEDS
from experiments.report.verdicts import Question, Verdict, judged
from staff.evaluation.metrics import named_metric

NAMED = 4  # decided contrasts that a sentence names
WIDTH = 220  # of a plot in a cell, in pixels
FAR = 3.0  # times the typical end of an interval: where a plot is cut off


def compared(contexts: Sequence[Context], table: pd.DataFrame) -> dict[str, str]:
    """Families, tasks, methods, pruning rates and seeds of the runs, as text."""
    compared_in = [context for context in contexts if context.varied == "method"]
    variants = dict.fromkeys(v for context in compared_in for v in context.variants)
    rates = sorted({rate for context in contexts for rate in context.rates if 0 < rate < 1})
    measured = dict.fromkeys(
        f"{_names(c.runs['task'])} ({metric(c)}, {named_metric(c.metric).words})" for c in compared_in or contexts
    )
    seeds = len(table[SEEDS[1:]].drop_duplicates())
    facts = {
        "Model families": _names(table["family"]),
        "Tasks": ", ".join(measured),
        "Methods": _listed([*variants]),
        "Pruning rates": ", ".join(f"{rate:g}" for rate in rates),
        "Runs": f"{len(table):,}, with {seeds} seed{'' if seeds == 1 else 's'}",
    }
    return {name: text for name, text in facts.items() if text}


def _listed(variants: Sequence[str]) -> str:
    """By name, but those of which an audit or a test of scores has many by their number."""
    many = {name.strip(): [v for v in variants if v.startswith(name)] for name in IN_SETS}
    named = [v for v in variants if not any(v in found for found in many.values())]
    return ", ".join([*named, *(f"{name} ({len(found)} settings)" for name, found in many.items() if found)])


def _names(column: pd.Series) -> str:
    return ", ".join(sorted({"custom" if name is None or name != name else str(name) for name in column}))


def headlines(context: Context, question: Question) -> list[Verdict]:
    """Of each contrast its verdict over the most pruning rates."""
    most: dict[str, Verdict] = {}
    for verdict in judged(context, question):
        name = verdict.outcome.contrast.name
        if name not in most or len(verdict.outcome.rates) > len(most[name].outcome.rates):
            most[name] = verdict
    return [*most.values()]


def sentences(contexts: Sequence[Context], question: Question) -> list[str]:
    """What is decided, the largest difference, and what selecting costs; fewer where the runs do not tell."""
    headed = [(context, v) for context in contexts for v in headlines(context, question)]
    if not headed:
        return ["No contrast is registered between these runs, so no verdict is given: see the tables below."]
    made = [_decisions(headed), _largest(contexts, question), _costs(contexts, question)]
    return [sentence for sentence in made if sentence]


def _decisions(headed: Sequence[tuple[Context, Verdict]]) -> str:
    decided = [(context, verdict) for context, verdict in headed if verdict.decided]
    decided.sort(key=lambda pair: not pair[1].words.startswith(("better", "worse")))
    total = f"{len(headed)} registered contrast{'s' if len(headed) > 1 else ''}"
    if not decided:
        subject = "The registered contrast is not" if len(headed) == 1 else f"None of {total} is"
        several = any(len(verdict.outcome.rates) > 1 for _, verdict in headed)
        over = " over its pruning rates together" if several else ""
        return f"{subject} decided{over}: these runs do not show which method is better."
    named = "; ".join(f"{_claim(verdict)} on {context.title}" for context, verdict in decided[:NAMED])
    more = f"; and {len(decided) - NAMED} more" if len(decided) > NAMED else ""
    rest = len(headed) - len(decided)
    left = f" The other {rest} {'is' if rest == 1 else 'are'} undecided." if rest else ""
    return f"{len(decided)} of {total} {'is' if len(decided) == 1 else 'are'} decided: {named}{more}.{left}"


def _claim(verdict: Verdict) -> str:
    """Such as "staff is equal to random within 1 point"."""
    contrast = verdict.outcome.contrast
    other = contrast.others[0] if len(contrast.others) == 1 else "the best other method"
    for words, link in (("better", "than"), ("not worse", "than"), ("worse", "than"), ("equal", "to")):
        if verdict.words.startswith(words):
            return f"{contrast.method} is {words} {link} {other}{verdict.words.removeprefix(words)}"
    return f"{contrast.method} against {other}: {verdict.words}"


def _largest(contexts: Sequence[Context], question: Question) -> str:
    """The largest difference in terms of the margin; a decided one, if there is any."""
    every = [(context, verdict) for context in contexts for verdict in judged(context, question)]
    decided = [pair for pair in every if pair[1].decided] or every
    context, verdict = max(
        decided, key=lambda pair: abs(pair[1].outcome.hardest.mean) / question.margin_of(pair[0].metric)
    )
    digits = digits_for(question.margin_of(context.metric))
    difference, low, high = (signed(value, digits) for value in verdict.outcome.shown)
    if not verdict.outcome.hardest.mean:
        return "The methods of each contrast have the same mean."
    which = "largest decided difference" if verdict.decided else "largest difference"
    return (
        f"The {which} is {difference} {metric(context)} [{low}, {high}], "
        f"{verdict.outcome.contrast.name} on {context.title} at {_rates(verdict)}: {verdict.words}."
    )


def _rates(verdict: Verdict) -> str:
    rates = verdict.outcome.rates
    return f"pruning rate {rates[0]:g}" if len(rates) == 1 else f"the mean of {len(rates)} pruning rates"


def _costs(contexts: Sequence[Context], question: Question) -> str:
    """The seconds of a selection, beside the costliest other method's."""
    found: dict[tuple[str, float], list[str]] = {}
    for context in contexts:
        method = next((v.outcome.contrast.method for v in judged(context, question)), None)
        rate, shown = context.shown
        seconds = {v: float(context.cells[v, rate]["overhead_seconds"].mean()) for v in shown}
        others = {v: s for v, s in seconds.items() if v != method}
        if method in seconds and others:
            most = max(others, key=lambda v: others[v])
            text = f"{number(seconds[method])} s on {context.title} ({most}: {number(others[most])} s)"
            found.setdefault((method, rate), []).append(text)
    if not found:
        return ""
    costs = "; with ".join(
        f"{method} takes, at pruning rate {rate:g}, {', '.join(texts[:NAMED])}"
        + (f", and on {len(texts) - NAMED} more" if len(texts) > NAMED else "")
        for (method, rate), texts in found.items()
    )
    return f"Selecting a coreset with {costs}; in brackets, the costliest other method."


def forest(contexts: Sequence[Context], question: Question) -> list[dict[str, Any]]:
    """The headline verdicts of each context, with their places on an axis that contexts of one metric share.

    The method is better on the right, whatever the direction of the metric.
    """
    headed = {context: made for context in contexts if (made := headlines(context, question))}
    by_metric: dict[str, list[Verdict]] = {}
    for context, made in headed.items():
        by_metric.setdefault(context.metric, []).extend(made)
    axes = {name: Axis.around(found, question.margin_of(name)) for name, found in by_metric.items()}
    groups = []
    for context, made in headed.items():
        axis, sign = axes[context.metric], named_metric(context.metric).sign
        margin = question.margin_of(context.metric)
        groups.append(
            {
                "context": context,
                "metric": f"{metric(context)}, {named_metric(context.metric).words}",
                "rows": [_row(verdict, axis, sign, digits_for(margin)) for verdict in made],
                "band": (axis.place(-margin), axis.place(margin)),
                "zero": axis.place(0.0),
                "ticks": [(axis.place(tick), f"{sign * tick + 0.0:+g}" if tick else "0") for tick in axis.ticks],
            }
        )
    return groups


def _row(verdict: Verdict, axis: Axis, sign: int, digits: int) -> dict[str, Any]:
    outcome = verdict.outcome
    difference, low, high = outcome.shown
    start, end = sorted((sign * low, sign * high))
    kind = next((k for k in ("better", "worse") if verdict.words.startswith(k)), "decided")
    return {
        "name": outcome.contrast.name,
        "rates": f"{outcome.rates[0]:g}" if len(outcome.rates) == 1 else f"mean of {len(outcome.rates)}",
        "difference": signed(difference, digits),
        "interval": f"[{signed(low, digits)}, {signed(high, digits)}]",
        "words": verdict.words,
        "seeds": outcome.seeds,
        "kind": kind if verdict.decided else "undecided",
        "mean": axis.place(outcome.hardest.mean),
        "ends": (axis.place(start), axis.place(end)),
        "cut": (start < -axis.reach, end > axis.reach),
    }


class Axis:
    """Gains from -`reach` to `reach` on `WIDTH` pixels."""

    def __init__(self, reach: float):
        self.reach = reach
        step = 10 ** np.floor(np.log10(reach))
        step = next(s for s in (step, step / 2, step / 5) if reach / s >= 1.5)
        self.ticks = [k * step for k in (-1, 0, 1)] if reach < 2 * step else [k * 2 * step for k in (-1, 0, 1)]

    @classmethod
    def around(cls, verdicts: Sequence[Verdict], margin: float) -> Axis:
        """As far as the intervals go, but for a few that go much farther than most."""
        ends = [max(abs(end) for end in v.outcome.shown[1:]) for v in verdicts]
        means = [abs(v.outcome.hardest.mean) for v in verdicts]
        return cls(1.08 * max(margin, *means, min(max(ends), FAR * float(np.median(ends)))))

    def place(self, gain: float) -> float:
        share = np.clip(gain / self.reach, -1, 1)
        return round(float((share + 1) / 2 * (WIDTH - 8) + 4), 1)
