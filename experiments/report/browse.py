"""A page of the samples that a run chose from: `staff-report --browse RUN`.

Every sample of the pool, selected or not, with its text, scores, group and region; sorted and searched in the
browser, without a network. The texts are read again from the run's own data, and refused where they have changed.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.export import training_samples
from experiments.recorded import RecordedRun, recorded_run, regions_of
from staff.data.samples import Sample
from staff.errors import UserError

MOST = 20_000  # rows that a browser holds without effort


def browse(run: Path, output: Path | None = None) -> Path:
    """Write the page of the run in folder `run` to `output` (RUN/browse.html by default), and return that.

    Raises:
        UserError: no recorded run, or data that is not there or has changed since.
    """
    recorded = recorded_run(run)
    output = output or run / "browse.html"
    if output.is_dir():
        raise UserError(f"--output {output} is a folder: name a file.")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page(recorded), encoding="utf-8")
    return output


def page(run: RecordedRun) -> str:
    """The page as text.

    Raises:
        UserError: see `browse`.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    record, pool = run.record(), run.samples()
    if pool is None:
        raise UserError(f"{run.name} has no samples.parquet: carry out the run again.")
    shown, every = rows(pool, run.regions(), training_samples(run)), len(pool)
    about, count = record["run"], int(pool["selected"].sum())
    selected = f"{count:,} of {every:,} samples of the pool are selected"
    left = "" if len(shown) == every else f"; {len(shown):,} are shown, selected ones before others"
    method, task = about["method"] or "custom", about["task"] or "custom"
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("browse.html").render(
        name=run.name,
        title=f"{method} on {task}, pruning rate {about['pruning_rate']:g}",
        about=f"{run.name}: {selected}{left}. Click a column heading to sort, a row to read it in full.",
        data=Markup(_json(shown)),
    )


def rows(pool: pd.DataFrame, regions: pd.DataFrame | None, samples: Sequence[Sample]) -> pd.DataFrame:
    """The samples of a pool with their texts: at most `MOST`, those that were selected before others.

    Args:
        pool: id, selected, answer_tokens and every score.
        regions: what the method reports of its regions, for the region of each sample.
        samples: of the training split.
    """
    if len(pool) > MOST:
        chosen, others = np.flatnonzero(pool["selected"]), np.flatnonzero(~pool["selected"])
        chosen = chosen[:MOST]
        spread = np.linspace(0, len(others) - 1, MOST - len(chosen)).astype(int)
        pool = pool.iloc[np.sort([*chosen, *others[spread]])]
    wanted = set(pool["id"])
    by_id = {sample.id: sample for sample in samples if sample.id in wanted}
    found = [by_id[id] for id in pool["id"]]
    table = pd.DataFrame({"selected": pool["selected"].to_numpy(), "id": pool["id"].to_numpy()})
    table["prompt"], table["answer"] = [s.prompt for s in found], [s.answer.strip() for s in found]
    if any(sample.group is not None for sample in found):
        table["group"] = [sample.group for sample in found]
    if (region := regions_of(pool, regions)) is not None:
        table["region"] = region
    scores = pool.drop(columns=["id", "selected"]).rename(columns={"answer_tokens": "answer tokens"})
    return pd.concat([table, scores.reset_index(drop=True)], axis=1)


def _json(table: pd.DataFrame) -> str:
    """The columns and rows for the script, safe within a script element of HTML."""
    columns = [{"name": str(name), "kind": _kind(table[name])} for name in table]
    values = zip(*(_values(table[name], column["kind"]) for name, column in zip(table, columns)))
    text = json.dumps({"columns": columns, "rows": [*values]}, ensure_ascii=False, separators=(",", ":"))
    # "</script" or "<!--" in a text would end the element or change how it is read.
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _kind(column: pd.Series) -> str:
    if pd.api.types.is_bool_dtype(column):
        return "flag"
    return "number" if pd.api.types.is_numeric_dtype(column) else "text"


def _values(column: pd.Series, kind: str) -> list[Any]:
    if kind == "flag":
        return column.astype(int).tolist()
    if kind == "text":
        return [None if value is None or value != value else str(value) for value in column]
    known = np.isfinite(column.to_numpy(float))
    return [float(f"{value:.6g}") if ok else None for value, ok in zip(column.tolist(), known)]
