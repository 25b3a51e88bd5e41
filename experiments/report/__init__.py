"""Records into tables, figures and a page: `staff-report`; here, what a run prints at its end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.recorded import read

STR_NOTE = "STR: selection time / time to fine-tune the target on the whole pool (~ estimated from FLOPs)."


def overview(folders: Sequence[Path]) -> str:
    """A line for each record: what was selected, what it gave, and what selecting it cost."""
    if not folders:
        return "no records"
    records = [read(folder / "metrics.json") for folder in folders]
    lines = pd.DataFrame([_line(record) for record in records])
    if len(set(lines["seed"])) == 1:
        lines = lines.drop(columns="seed")
    where = "\n".join(f"  {folder}/metrics.json" for folder in folders)
    warned = "".join(
        f"\nwarning: {record['run']['name']}: {text}" for record in records for text in record.get("warnings", ())
    )
    return f"\n{lines.to_string(index=False)}\n\n{STR_NOTE}\n{where}{warned}"


def _line(record: dict[str, Any]) -> dict[str, Any]:
    run, overhead = record["run"], record["overhead"]
    metric = record["config"]["task"]["metrics"][0]
    ratio = "-" if overhead["str"] is None else f"{overhead['str']:.3f}"
    estimated = "~" if overhead["str_basis"] != "measured" and ratio != "-" else ""
    return {
        "method": {"raw": "raw target"}.get(run["method"], run["method"]),
        "pruning rate": "-" if run["method"] == "raw" else f"{run['pruning_rate']:g}",
        "seed": run["seed"],
        "coreset size": record["coreset"]["size"],
        metric: f"{record['metrics'][metric]:.2f}" if record["metrics"] else "-",
        "selection overhead (s)": f"{overhead['seconds']:.3f}",
        "STR": f"{estimated}{ratio}",
    }
