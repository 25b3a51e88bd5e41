"""One page that holds a whole report and needs nothing else: figures embedded, tables sortable, text escaped.

It also shows how much of each method's score its answers owe to their own prompts (`staff.evaluation.floors`).
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.export import training_samples
from experiments.recorded import RecordedRun
from experiments.report import opening
from experiments.report.comparisons import REFERENCES
from experiments.report.figures import FIGURES
from experiments.report.records import Context, report_command
from experiments.report.rendering import Drawn, Table, is_text, metric
from experiments.report.settings import SEEDS
from experiments.report.verdicts import DEFAULT, Question
from staff.errors import UserError
from staff.evaluation.floors import best_constant, specificity, typical_count
from staff.evaluation.metrics.rouge import of_every_pair, rouge_l_matrix

SAMPLES = 3  # test samples whose answers are shown
FOOT = "seeds for "  # how a row begins that stands below a table's own
ROWS = 100  # of a table; its file has the others
FIGURE_BYTES = 3_000_000  # of all figures in the page; the others lie in their files


@dataclass(frozen=True)
class Section:
    """What the page shows of one context."""

    context: Context
    tables: Sequence[Table]
    figures: Sequence[Drawn]


def write(
    file: Path, sections: Sequence[Section], table: pd.DataFrame, question: Question = DEFAULT, options: str = ""
) -> Path:
    """Write the page of the runs in `table`, made by the report's command with `options`, which ask `question`."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    contexts = [section.context for section in sections]
    embedded = _embedded(sections)
    first, last = (str(day(table["finished"]))[:10] for day in (min, max))
    text = environment.get_template("page.html").render(
        runs=len(table),
        period=first if first == last else f"{first} to {last}",
        commits=_commits(table),
        made_by=report_command(file.parent) + options,
        compared=opening.compared(contexts, table),
        sentences=[_short(text, contexts) for text in opening.sentences(contexts, question)],
        forest=opening.forest(contexts, question),
        parts=parts(contexts),
        sections=[_section(section, embedded) for section in sections],
    )
    file.write_text(text, encoding="utf-8")
    return file


def _commits(table: pd.DataFrame) -> str:
    """The commits that the runs were made with, and whether any had changes of its own."""
    found = {
        f"{str(commit)[:10]}{' with uncommitted changes' if dirty is True else ''}"
        for commit, dirty in zip(table["git_commit"], table["git_dirty"])
        if commit == commit and commit is not None
    }
    return ", ".join(sorted(found)) or "no known commit"


def _section(section: Section, embedded: dict[Path, str]) -> dict[str, Any]:
    rate, runs = section.context.shown
    return {
        "context": section.context,
        "metric": metric(section.context),
        "rate": f"{rate:g}",
        "tables": [
            {**_table(table), "title": _title(table.name.removesuffix(f"-{section.context.name}"))}
            for table in section.tables
        ],
        "pictures": [
            {
                "kind": drawn.file.name.removesuffix(f"-{section.context.name}"),
                "caption": drawn.caption,
                "file": f"figures/{drawn.file.name}.svg",
                "data": embedded.get(drawn.file),
            }
            for drawn in section.figures
        ],
        "answers": _answers(section.context, runs) if section.context.varied == "method" else [],
    }


def _title(kind: str) -> str:
    """Such as "Break even" and "Audit staff, pruning rate 0.9", by the name of a table's file."""
    kind = {"specific": "floors"}.get(kind, kind)
    words, rate = re.sub(r"-p(?=[\d.]+$)", "\n", kind).partition("\n")[::2]
    return words.replace("-", " ").capitalize() + (f", pruning rate {rate}" if rate else "")


def _short(text: str, contexts: Sequence[Context]) -> str:
    """Without the family in the titles of contexts where all have the same one."""
    families = {str(context.runs["family"].iloc[0]) for context in contexts}
    return text.replace(f", {families.pop()} family", "") if len(families) == 1 else text


def _embedded(sections: Sequence[Section]) -> dict[Path, str]:
    """The figures that the page holds, base64: those that tell most first, as long as the page stays small."""
    drawn = [(d.file, section.context) for section in sections for d in section.figures]

    def rank(place: tuple[Path, Context]) -> tuple[bool, int]:
        file, context = place
        return context.varied != "method", [file.name.startswith(kind) for kind in FIGURES].index(True)

    found, left = {}, FIGURE_BYTES
    for file, _ in sorted(drawn, key=rank):
        data = base64.b64encode(compact(Path(f"{file}.svg").read_text(encoding="utf-8")).encode()).decode()
        if len(data) <= left:
            found[file], left = data, left - len(data)
    return found


def compact(svg: str) -> str:
    """The same picture in less text: numbers to a hundredth of a point, without comments and metadata."""
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"(?<=\d\.\d\d)\d+(?=[\s\"),])", "", svg)
    return re.sub(r"\s*\n\s*", " ", svg)


def _table(table: Table) -> dict[str, Any]:
    kinds = {column: "text" if is_text(table.cells[column]) else "" for column in table.cells}
    rows = [
        [
            {"value": value, "text": kinds[column], "mark": table.marks.get((i, column))}
            for column, value in row.items()
        ]
        for i, row in enumerate(table.cells.to_dict("records"))
    ]
    foot = [row for row in rows if str(row[0]["value"]).startswith(FOOT)]  # which is no row to be sorted
    rows = [row for row in rows if row not in foot]
    left = f"{len(rows) - ROWS:,} more rows in tables/{table.name}.md. " if len(rows) > ROWS else ""
    return {"heads": list(kinds.items()), "rows": rows[:ROWS], "foot": foot, "caption": left + table.caption}


def _answers(context: Context, runs: dict[str, RecordedRun]) -> list[dict[str, Any]]:
    """The first test samples: references, and what each method's run answered."""
    columns = ["id", "prediction", "references", context.metric]
    shown: dict[str, dict[str, Any]] = {}
    for variant, run in runs.items():
        answered = run.predictions(columns)
        if answered is None or not set(columns) <= set(answered.columns):
            continue
        for id, text, references, value in answered[columns].head(SAMPLES).itertuples(index=False):
            sample = shown.setdefault(str(id), {"id": id, "references": list(references), "answers": []})
            sample["answers"].append((variant, text, f"{value:.1f}"))
    return list(shown.values())


MOST = 150  # runs that are split for a page
SEEDS_SHOWN = 3
WIDTH = 320  # of a bar, in pixels
Constants = dict[tuple[str, str], str | None]
"""The best constant answer by metric and training data."""


def parts(contexts: Sequence[Context]) -> list[dict[str, Any]]:
    """Of each context by a metric of answers: both parts of each method's score, in pixels and points.

    As recorded, or by ROUGE-L from the stored answers, where every pair is scored in a moment.
    """
    shown = [
        c for c in contexts if c.varied == "method" and (of_every_pair(c.metric) or _recorded(c.runs, c.metric))
    ]
    rows = sum(len(c.variants) for c in shown)
    seeds = int(np.clip(MOST // max(rows, 1), 1, SEEDS_SHOWN))
    known: Constants = {}
    return [made for context in shown if (made := _context(context, seeds, known))]


def _context(context: Context, seeds: int, known: Constants) -> dict[str, Any] | None:
    rate, _ = context.shown
    measured = all(context.metric in floors for floors in context.runs["floors"])
    some = None if measured else seeds
    found = {v: split for v in context.variants if (split := _split(context, v, rate, some))}
    if not found:
        return None
    lines = {"everything": sum(found["full"])} if "full" in found else {}
    constant = _constant(context, known)
    if constant is not None:
        lines["best constant answer"] = constant
    widest = (generic + max(specific, 0.0) for generic, specific in found.values())
    top = 1.05 * max(*widest, *lines.values(), 1e-9)

    def place(value: float) -> float:
        return round(value / top * WIDTH, 1)

    return {
        "context": context,
        "metric": metric(context),
        "rate": f"{rate:g}",
        "seeds": some,
        "lines": [(name, place(value), f"{value:.1f}") for name, value in lines.items()],
        "rows": [
            {
                "name": variant,
                "generic": place(generic),
                "specific": place(max(specific, 0.0)),
                "texts": (f"{generic + specific:.1f}", f"{generic:.1f}", f"{specific:+.1f}"),
                "below": constant is not None and generic + specific < constant,
            }
            for variant, (generic, specific) in found.items()
        ],
    }


def _split(context: Context, variant: str, rate: float, seeds: int | None) -> tuple[float, float] | None:
    """The mean score against other samples' references, and what is left of the own score; over so many seeds."""
    runs = context.cells.get((variant, REFERENCES.get(variant, rate)))
    if runs is None:
        return None
    others, specific = [], []
    if floors := _recorded(runs.sort_values(SEEDS).head(seeds), context.metric):
        shuffled = np.array([floor["shuffled"] for floor in floors])
        return float(shuffled.mean()), float(np.mean([floor["score"] for floor in floors] - shuffled))
    for name in runs.sort_values(SEEDS)["name"].head(seeds):
        table = context.recorded[str(name)].predictions(["id", "prediction", "references"])
        if table is not None and len(table) > 1:
            references = [tuple(group) for group in table["references"]]
            split = specificity(context.metric, [*table["prediction"]], references, [*map(str, table["id"])])
            others.append(split.others.mean())
            specific.append(split.specific.mean())
    return (float(np.mean(others)), float(np.mean(specific))) if others else None


def _recorded(runs: pd.DataFrame, by: str) -> list[dict[str, Any]]:
    """What runs recorded of the floors under a metric."""
    return [found[by] for found in runs["floors"] if by in found]


def _constant(context: Context, known: Constants) -> float | None:
    """The score of the constant answer chosen on training answers, where these are on this machine."""
    if floors := _recorded(context.runs, context.metric):
        return float(floors[0]["constant"])
    run = context.recorded[str(context.runs["name"].iloc[0])]
    data, table = run.record()["identity"]["data"], run.predictions(["references"])
    if table is None or data["source"]:  # of the hub: a report fetches nothing
        return None
    asked = (context.metric, data["train"])
    references = [tuple(group) for group in table["references"]]
    if asked not in known:
        try:
            answers, count = [s.answer for s in training_samples(run)], typical_count(references)
            known[asked] = best_constant(context.metric, answers, references=count).text
        except UserError:  # the data is elsewhere, or has changed
            known[asked] = None
    answer = known[asked]
    return None if answer is None else float(rouge_l_matrix([answer], references, context.metric).mean())
