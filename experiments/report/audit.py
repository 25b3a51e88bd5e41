"""What a method's gain over random is made of, and whether its score tells which samples are useful.

The runs of `experiment=audit` and `experiment=score_validity`: a method beside its twins (`random_matched`), beside
random and itself at equal steps, and beside the pool without its highest and its lowest ranks (`leave_out`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pandas as pd

from experiments.campaign import fields
from experiments.report.comparisons import comparison
from experiments.report.records import Context
from experiments.report.rendering import NONE, Table, basis, digits, metric, p_value, signed
from experiments.report.settings import is_ignored
from experiments.report.statistics import LEVEL, Difference, holm
from staff.evaluation.metrics import named_metric

TWIN, LEFT_OUT = "baselines.random_matched.RandomMatched", "baselines.leave_out.LeaveOut"
OTHERS = {
    "baselines.random.Random": "random",
    "baselines.full.Full": "full",
    "baselines.full.Raw": "raw target",
}
STEPS = ", equal steps"
BEYOND = {"length": "answer lengths", "tokens": "tokens", "group": "groups"}


def tables(context: Context) -> list[Table]:
    """A table for each audited method and each score that was tried; none without twins or runs that leave out."""
    made = []
    for kind, name, audited in _audited(context):
        for rate in [rate for rate in audited.rates if 0 < rate < 1]:
            table = _audit(audited, name, rate) if kind == TWIN else _validity(audited, name, rate)
            made += [] if table is None else [table]
    return made


def _audited(context: Context) -> Iterator[tuple[str, str, Context]]:
    """The kind of control, the method that it belongs to, and the runs to compare, each with its part in them as
    variant: those that differ in nothing but the method, seeds and `finetune.match`."""
    runs = context.all_runs
    if runs is None or not runs["selects"].isin([TWIN, LEFT_OUT]).any():
        return
    configs = {str(name): context.recorded[str(name)].record()["config"] for name in runs["name"]}
    around = runs["name"].map({name: _surroundings(config) for name, config in configs.items()})
    for _, alike in runs.groupby(around):
        for kind in (TWIN, LEFT_OUT):
            controls = alike[alike["selects"] == kind]
            references = controls["name"].map(lambda name: _text(configs[name]["method"]["reference"]))
            for reference, own in controls.groupby(references):
                config = configs[str(own["name"].iloc[0])]
                name = _name(json.loads(reference), alike, configs)
                # A family may set other hyper-parameters of a method than of a reference; then the class decides.
                known = any(_text(configs[str(n)]["method"]) == reference for n in alike["name"])
                match = config["finetune"].get("match")
                label = {n: _part(c, reference, match, known) for n, c in configs.items()}
                parts = alike.assign(variant=alike["name"].map(label)).dropna(subset="variant")
                yield (
                    kind,
                    name,
                    replace(context, runs=parts, all_runs=None, _values=context._values, _texts=context._texts),
                )


def _surroundings(config: dict[str, Any]) -> str:
    """Everything but the method, the seeds and the number of steps."""
    apart = ("method", "finetune.match")
    varying = [(k, str(v)) for k, v in fields(config) if not is_ignored(k) and not k.startswith(apart)]
    return json.dumps(sorted(varying))


def _text(method: dict[str, Any]) -> str:
    return json.dumps(method, sort_keys=True)


def _name(reference: dict[str, Any], runs: pd.DataFrame, configs: dict[str, Any]) -> str:
    """The name of the method with this configuration; else that of its class."""
    own = [n for n in runs["name"] if configs[n]["method"] == reference]
    same = [n for n in runs["name"] if configs[n]["method"].get("_target_") == reference["_target_"]]
    names = runs.set_index("name")["method"]
    return str(names[(own or same)[0]]) if own or same else reference["_target_"].rpartition(".")[2]


def _part(config: dict[str, Any], reference: str, match: str | None, known: bool) -> str | None:
    """What a run is in the audit of `reference`; None: nothing. `match` is `finetune.match` of its controls, and
    `known` whether a run of exactly the reference is there."""
    method = config["method"]
    steps = STEPS if config["finetune"].get("match") != match else ""
    if method["_target_"] in (TWIN, LEFT_OUT):
        if _text(method["reference"]) != reference or steps:
            return None
        return f"twin {','.join(method['match'])}" if "match" in method else f"without {method['out']}"
    if method["_target_"] in OTHERS:
        name = OTHERS[method["_target_"]]
        return name if name == "raw target" else name + steps
    own = _text(method) == reference if known else method["_target_"] == json.loads(reference)["_target_"]
    return "method" + steps if own else None


def _differences(context: Context, rate: float, rows: list[tuple[str, str, str]]) -> list[tuple[str, Difference]]:
    """The gain of the second part over the third of each row, above zero where it is better."""
    compared, sign = comparison(context, rate), named_metric(context.metric).sign
    found = [(text, compared.between(a, b) if sign > 0 else compared.between(b, a)) for text, a, b in rows]
    return [(text, difference) for text, difference in found if difference is not None]


def _cells(found: list[tuple[str, Difference]], head: str, digits: int) -> tuple[pd.DataFrame, list[float | None]]:
    tested = iter(holm([p for _, d in found if (p := d.p) is not None]))
    p_values = [None if d.p is None else float(next(tested)) for _, d in found]
    rows = [
        {
            head: text,
            "difference": signed(d.mean, digits),
            "95 % interval": f"[{signed(d.mean - d.half, digits)}, {signed(d.mean + d.half, digits)}]",
            "p (Holm)": p_value(p),
            "seeds": str(d.seeds),
        }
        for (text, d), p in zip(found, p_values)
    ]
    return pd.DataFrame(rows), p_values


def _audit(context: Context, name: str, rate: float) -> Table | None:
    """How much of the gain over random is left beyond what each twin has, and at equal steps."""
    twins = [v for v in context.variants if v.startswith("twin ")]
    beyond = {v: _listed([BEYOND[m] for m in v.removeprefix("twin ").split(",")]) for v in twins}
    rows = [("over random", "method", "random")]
    rows += [(f"beyond {beyond[v]}", "method", v) for v in sorted(twins, key=lambda v: v.count(","))]
    rows += [("over random at equal steps", "method" + STEPS, "random" + STEPS)]
    rows += [("over the raw target", "method", "raw target")]
    found = _differences(context, rate, rows)
    if not found:
        return None
    cells, p_values = _cells(found, "gain", digits(context))
    gain = found[0][1] if found[0][0] == "over random" else None
    shown = gain is not None and gain.half < gain.mean
    left = [
        f"{d.mean / gain.mean:.0%}" if shown and gain is not None and not text.endswith("target") else NONE
        for text, d in found
    ]
    cells.insert(3, "left of the gain", left)
    caption = (
        f"What the gain of {name} over random is made of, in {metric(context)} "
        f"({named_metric(context.metric).unit}s, above zero: {name} is better) on {context.title}, pruning rate "
        f"{rate:g}. Beyond answer lengths, tokens or groups: over random coresets that have those of {name}'s. At "
        "equal steps: both fine-tuned for as many steps as on the whole pool. "
        + (
            _answer(name, found, p_values)
            if shown
            else f"No gain over random is shown, so that there is none to divide ({NONE})."
        )
        + f" Intervals hold the errors of seeds and of test samples.{basis(context)}"
    )
    return Table(f"audit-{name}-p{rate:g}-{context.name}", caption, cells)


def _answer(name: str, found: list[tuple[str, Difference]], p_values: list[float | None]) -> str:
    """Which rows are shown to be above zero, in a sentence or two."""
    asked = [
        (text, d, p) for (text, d), p in zip(found, p_values) if text not in ("over random", "over the raw target")
    ]
    left = [text for text, d, p in asked if p is not None and p <= LEVEL and d.mean > 0]
    gone = [text for text, _, _ in asked if text not in left]
    said = f"A gain of {name} is left {', '.join(left)}." if left else ""
    return f"{said} No gain is shown {', '.join(gone)}.".strip() if gone else said


def _listed(words: list[str]) -> str:
    return " and ".join([*([", ".join(words[:-1])] if words[1:] else []), words[-1]])


def _validity(context: Context, name: str, rate: float) -> Table | None:
    """Whether the score of a method measures utility: what is lost without its highest and its lowest ranks."""
    rows = [
        ("without its highest ranks, against without random ones", "without highest", "random"),
        ("without its lowest ranks, against without random ones", "without lowest", "random"),
        ("without its lowest ranks, against without its highest", "without lowest", "without highest"),
        ("without its highest ranks, against the whole pool", "without highest", "full"),
        ("without its lowest ranks, against the whole pool", "without lowest", "full"),
    ]
    found = _differences(context, rate, rows)
    if not found:
        return None
    cells, p_values = _cells(found, "pool", digits(context))
    by_text = {text: (d, p) for (text, d), p in zip(found, p_values)}
    caption = (
        f"Does the score of {name} show which samples are useful? The target is fine-tuned without the {rate:.0%} "
        "of the pool that it ranks highest, without those that it ranks lowest, and without random ones. "
        f"{metric(context)} ({named_metric(context.metric).unit}s, above zero: better) on {context.title}. "
        f"{_utility(by_text.get(rows[2][0]))} Intervals hold the errors of seeds and of test samples."
        f"{basis(context)}"
    )
    return Table(f"score-validity-{name}-p{rate:g}-{context.name}", caption, cells)


def _utility(lowest_over_highest: tuple[Difference, float | None] | None) -> str:
    """The verdict, by what is lost with the highest ranks rather than with the lowest."""
    difference, p = lowest_over_highest or (None, None)
    if difference is None or p is None:
        return "One seed: no verdict."
    if p > LEVEL:
        return "It is not shown to measure utility: the difference in the third row may be chance."
    if difference.mean > 0:
        return "It measures utility: without its highest ranks the target is worse than without its lowest."
    return "It measures utility in reverse: without its highest ranks the target is better."
