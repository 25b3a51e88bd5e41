"""One page that holds a whole report and needs nothing else: figures embedded, tables sortable, text escaped."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.recorded import RecordedRun
from experiments.report import opening
from experiments.report.drawing import Drawn
from experiments.report.figures import FIGURES
from experiments.report.parts import parts
from experiments.report.records import Context, report_command
from experiments.report.tables import Table, is_text, metric
from experiments.report.verdicts import DEFAULT, Question

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
            {**_table(table), "title": table.name.removesuffix(f"-{section.context.name}").capitalize()}
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
