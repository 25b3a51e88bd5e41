"""Show how much of each score depends on the prompt: `staff-floors --data FOLDER`.

Writes, for each task, a table with the score of the best constant answer. The table splits the score of each method
into what its answers earn against other samples' references, and the rest (`staff.evaluation.floors`). Reads the
answers of the runs, and the training answers from --data.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hydra.utils import instantiate

from experiments import command
from experiments.report.comparisons import REFERENCES, Comparison
from experiments.report.records import Context, collect, contexts
from experiments.report.rendering import NONE, Table, shown_as
from experiments.report.statistics import Difference, t_interval
from staff.data import Task
from staff.errors import UserError
from staff.evaluation.floors import Specificity, best_constant, specificity, typical_count
from staff.evaluation.metrics import named_metric
from staff.runtime.files import local_path

COMMAND = "staff-floors"


@dataclass(frozen=True)
class Answered:
    """A run's answers, with the test samples they belong to."""

    variant: str
    seeds: tuple[int, int]
    answers: list[str]
    references: list[tuple[str, ...]]
    ids: list[str]


def answered(context: Context, rate: float) -> Iterator[Answered]:
    """Every run at a pruning rate whose predictions are there, and those of methods that select nothing."""
    for variant in context.variants:
        runs = context.cells.get((variant, REFERENCES.get(variant, rate)), pd.DataFrame())
        for run in runs.to_dict("records"):
            table = context.recorded[str(run["name"])].predictions(["id", "prediction", "references"])
            if table is None:
                continue
            references = [tuple(group) for group in table["references"]]
            seeds = int(run["selection_seed"]), int(run["finetune_seed"])
            yield Answered(variant, seeds, [*table["prediction"]], references, [*map(str, table["id"])])


def recorded(context: Context) -> Table | None:
    """Score, shuffled and specific score of every method by every metric of answers, as the runs recorded them when
    they ended, and the best constant answer; None where no run did."""
    rows = []
    for metric in dict.fromkeys(name for found in context.runs["floors"] for name in found):
        known = {
            cell: floors
            for cell, runs in context.cells.items()
            if (floors := [found[metric] for found in runs["floors"] if metric in found])
        }
        constants = {(floor["constant_answer"], floor["constant"]) for each in known.values() for floor in each}
        for text, score in sorted(constants):
            name = f'constant answer "{_shortened(text)}"'
            rows.append({"metric": metric, "answers of": name, "pruning rate": NONE, "score": f"{score:.2f}"})
        for (variant, rate), floors in sorted(
            known.items(), key=lambda kv: (context.variants.index(kv[0][0]), kv[0][1])
        ):
            score, shuffled, constant = (
                float(np.mean([floor[name] for floor in floors])) for name in ("score", "shuffled", "constant")
            )
            row = {"metric": metric, "answers of": variant, "pruning rate": f"{rate:g}", "score": f"{score:.2f}"}
            row |= {"shuffled": f"{shuffled:.2f}", "specific": f"{score - shuffled:+.2f}"}
            rows.append({**row, "floor": "below the constant answer" if score < constant else ""})
    if not rows:
        return None
    error = max(floor["error"] for found in context.runs["floors"] for floor in found.values())
    caption = (
        f"Floors on {context.title}, by every metric of answers; means over seeds of the samples' own values. "
        "Shuffled: the same answers against other samples' references, which keeps template, length and style "
        f"(Monte Carlo error at most {error:.2f}). Specific: score minus shuffled, what is said of the prompt. The "
        "constant answer is the best of frequent openings, endings and whole answers and a medoid of the pool's "
        "answers, chosen on these."
    )
    return Table(f"specific-{context.name}", caption, pd.DataFrame(rows).fillna(NONE))


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:60]}..."


def task_of(context: Context) -> dict[str, Any]:
    """The task's configuration, as the first run has it."""
    return context.recorded[str(context.runs["name"].iloc[0])].record()["config"]["task"]


def training_answers(config: dict[str, Any], data: Path) -> list[str]:
    """The answers of the pool that runs of a task selected from, read again below `data`, or made again.

    Raises:
        UserError: a file that is not there or does not read as the task.
    """
    if "data_dir" not in config:  # a task that reads no file, such as planted
        return [sample.answer for sample in instantiate(config, _convert_="all").load("train")]
    known = {field.name: config[field.name] for field in fields(Task) if field.name in config}
    folder = Path(str(known["data_dir"] or known["name"])).name
    return [sample.answer for sample in Task(**{**known, "data_dir": str(data / folder)}).load("train")]


def table(context: Context, rate: float, training: list[str], metric: str) -> Table | None:
    """Floors and specific scores at a pruning rate; None where no predictions are there."""
    runs = [*answered(context, rate)]
    if not runs:
        return None
    split = [specificity(metric, run.answers, run.references, run.ids) for run in runs]
    of_others, of_prompt = (
        Comparison(
            {v: {r.seeds: values(s) for r, s in zip(runs, split) if r.variant == v} for v in context.variants}
        )
        for values in (lambda s: s.others, lambda s: s.specific)
    )
    rows = [*_constants(metric, training, runs[0])]
    for variant in context.variants:
        found = [s for run, s in zip(runs, split) if run.variant == variant]
        if not found:
            continue
        row = {"answers of": variant, "seeds": str(len(found)), **_means(found)}
        for name, compared in (("others", of_others), ("specific", of_prompt)):
            against = compared.between(variant, "random") if variant not in ("random", "raw target") else None
            row[f"{name}, minus random"] = _difference(against)
        rows.append(row)
    error = max(s.error for s in split)
    pairs = "every pair of samples" if error == 0 else f"20 derangements, Monte Carlo error at most {error:.2f}"
    caption = (
        f"{shown_as(metric)} on {context.title} ({len(runs[0].ids)} test samples), pruning rate "
        f"{rate:g}, by what it says of the prompt. Score: against the sample's own references. Others: against "
        f"those of another sample ({pairs}), which keeps template, length and style. Specific: score minus others. "
        "Means over seeds, ± 95 % t-interval over seeds; differences with the errors of seeds and of test samples. "
        "The constant is the best of frequent openings, endings and whole answers and a medoid of the training "
        "answers: chosen on training answers, or in hindsight on the test references, which no method may do."
    )
    name = f"floors-{context.name}" + ("" if metric == context.metric else f"-{metric}")
    return Table(name, caption, pd.DataFrame(rows).fillna(NONE))


def _constants(metric: str, training: list[str], run: Answered) -> Iterator[dict[str, str]]:
    for chosen, judges in (("chosen on training answers", None), ("in hindsight", run.references)):
        constant = best_constant(metric, training, judges, typical_count(run.references))
        split = specificity(metric, [constant.text] * len(run.ids), run.references, run.ids)
        name = f'constant {chosen} ({constant.kind}): "{_shortened(constant.text)}"'
        yield {"answers of": name, "seeds": NONE, **_means([split])}


def _means(found: list[Specificity]) -> dict[str, str]:
    columns = {"score": "own", "others": "others", "specific": "specific"}
    return {
        column: _interval(*t_interval([float(np.mean(getattr(s, name))) for s in found]))
        for column, name in columns.items()
    }


def _interval(mean: float, half: float | None) -> str:
    """Without an interval where all seeds answer the same."""
    shown = f"{round(mean, 2) + 0.0:.2f}"
    return shown if half is None or half < 1e-9 else f"{shown} ± {half:.2f}"


def _difference(found: Difference | None) -> str:
    return NONE if found is None else f"{found.mean:+.2f} ± {found.half:.2f}"


@command
def main() -> None:
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument(
        "--results",
        type=local_path,
        default=Path("results"),
        help="folder with runs/ or packed runs (default: results)",
    )
    parser.add_argument(
        "--data", type=local_path, required=True, help="folder with a folder of JSON Lines for each task"
    )
    parser.add_argument("--rate", type=float, default=0.9, help="pruning rate (default: 0.9)")
    parser.add_argument("--metric", help="metric (default: the first of each task)")
    arguments = parser.parse_args()
    options = "" if arguments.rate == 0.9 else f" --rate {arguments.rate:g}"
    options += f" --metric {arguments.metric}" if arguments.metric else ""
    runs, written = collect(arguments.results), 0
    if runs.empty:
        raise UserError(f"{arguments.results}/runs holds no record: name another folder by --results.")
    for context in contexts(runs, arguments.results):
        if context.varied != "method" or arguments.rate not in context.rates:
            continue
        task, metric = task_of(context), arguments.metric or context.metric
        if metric not in task["metrics"] or named_metric(metric).needs != "answers":
            continue
        made = table(context, arguments.rate, training_answers(task, arguments.data), metric)
        if made is not None:
            made.write(
                arguments.results / "tables", f"{COMMAND} --results {arguments.results} --data DATA{options}"
            )
            print(made.markdown())
            written += 1
    if not written:
        by = f" by {arguments.metric}" if arguments.metric else ""
        raise UserError(
            f"No task in {arguments.results} has scored answers at pruning rate {arguments.rate:g}{by}: choose "
            "another --rate or --metric."
        )


if __name__ == "__main__":
    main()
