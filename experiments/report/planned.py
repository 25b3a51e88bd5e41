"""How many seeds a sweep needs for an effect, by the variances of runs that were recorded before: `staff-plan`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from experiments.report.comparisons import pairs
from experiments.report.records import Context, collect, contexts
from experiments.report.rendering import shown_as
from experiments.report.statistics import MOST, POWER, Difference, seeds_needed, typical
from staff.errors import UserError
from staff.evaluation.metrics import named_metric


@dataclass
class Planned:
    """What a sweep will compare: methods of a family on a task's test samples, by its first metric."""

    family: str
    task: str
    metric: str
    samples: int
    rates: set[float] = field(default_factory=set)
    seeds: set[tuple[int, int]] = field(default_factory=set)


def checked_effect(effect: float) -> float:
    """`effect`, where it can be planned for.

    Raises:
        UserError: it is not above zero.
    """
    if not 0 < effect < float("inf"):
        raise UserError(f"--effect {effect:g} must be a number above 0, in the metric's units.")
    return effect


def sentences(planned: Iterable[Planned], results: Path, effect: float) -> Iterator[str]:
    """For each comparison that is planned, the seeds that find a true difference of `effect`, by pruning rate.

    Variances are those between the methods recorded in `results`, of the same family if it was recorded there; the
    part of the test samples is scaled to their number in the plan.
    """
    table = collect(results)
    known = [] if table.empty else [c for c in contexts(table, results) if c.varied == "method"]
    for sweep in planned:
        alike = [c for c in known if c.metric == sweep.metric and _is(c, "task", sweep.task)]
        alike.sort(key=lambda c: not _is(c, "family", sweep.family))
        needed = next((found for c in alike if (found := _needed(c, sweep, effect))), None)
        unit = named_metric(sweep.metric).unit
        size = f"{effect:g} {unit}{'' if effect == 1 else 's'} of {shown_as(sweep.metric)}"
        unknown = (
            f"unknown, since {results} holds no two methods with two seeds on this task: name other results by "
            "--measured, or run a pilot of two methods with three seeds."
        )
        yield f"seeds for {size} on {sweep.task}: {needed or unknown}"


def _is(context: Context, column: str, name: str) -> bool:
    return str(context.runs[column].iloc[0]) == name


def _needed(context: Context, sweep: Planned, effect: float) -> str | None:
    """None where no two methods have two seeds at a rate."""
    by_rate: dict[float, list[Difference]] = {}
    for pair in pairs(context):
        if pair.difference.seeds > 1:
            scale = pair.difference.samples / sweep.samples
            of_samples = pair.difference.of_samples * scale
            scaled = replace(pair.difference, samples=sweep.samples, of_samples=of_samples)
            by_rate.setdefault(pair.rate, []).append(scaled)
    if not by_rate:
        return None
    rates = sorted(set(by_rate) & sweep.rates) or sorted(by_rate)
    found = ", ".join(f"{_count(by_rate[rate], effect)} at pruning rate {rate:g}" for rate in rates)
    seeds = sorted({d.seeds for rate in rates for d in by_rate[rate]})
    return (
        f"{found} (the sweep has {len(sweep.seeds)}); two-sided at 5 %, power {POWER:g}, by the variances between "
        f"methods of {context.title} with {' to '.join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))} seeds."
    )


def _count(differences: Sequence[Difference], effect: float) -> str:
    needed = seeds_needed(typical(differences), effect)
    return f"no number up to {MOST:,} (too few test samples)" if needed is None else str(needed)
