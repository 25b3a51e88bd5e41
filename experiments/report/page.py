"""One page that holds a whole report and needs nothing else: figures embedded, tables sortable, text escaped."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.recorded import RecordedRun
from experiments.report.drawing import Drawn
from experiments.report.records import Context, report_command
from experiments.report.tables import Table, is_text, metric

SAMPLES = 3  # test samples whose answers are shown


@dataclass(frozen=True)
class Section:
    """What the page shows of one context."""

    context: Context
    tables: Sequence[Table]
    figures: Sequence[Drawn]


def write(
    file: Path, sections: Sequence[Section], table: pd.DataFrame, options: str = "", first: Drawn | None = None
) -> Path:
    """Write the page of the runs in `table`, made by the report's command with `options`; `first` heads it."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    folder = FileSystemLoader(Path(__file__).parent)
    environment = Environment(loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    begun, ended = (str(day(table["finished"]))[:10] for day in (min, max))
    text = environment.get_template("page.html").render(
        runs=len(table),
        period=begun if begun == ended else f"{begun} to {ended}",
        commits=_commits(table),
        made_by=report_command(file.parent) + options,
        picture=first and _picture(first),
        sections=[_section(section) for section in sections],
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


def _section(section: Section) -> dict[str, Any]:
    rate, runs = section.context.shown
    return {
        "context": section.context,
        "metric": metric(section.context),
        "rate": f"{rate:g}",
        "tables": [
            {**_table(table), "title": table.name.removesuffix(f"-{section.context.name}").capitalize()}
            for table in section.tables
        ],
        "pictures": [_picture(drawn) for drawn in section.figures],
        "answers": _answers(section.context, runs) if section.context.varied == "method" else [],
    }


def _picture(drawn: Drawn) -> dict[str, str]:
    data = Path(f"{drawn.file}.svg").read_bytes()
    return {"caption": drawn.caption, "data": base64.b64encode(data).decode()}


def _table(table: Table) -> dict[str, Any]:
    kinds = {column: "text" if is_text(table.cells[column]) else "" for column in table.cells}
    rows = [
        [
            {"value": value, "text": kinds[column], "mark": table.marks.get((i, column))}
            for column, value in row.items()
        ]
        for i, row in enumerate(table.cells.to_dict("records"))
    ]
    return {"heads": list(kinds.items()), "rows": rows, "caption": table.caption}


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
