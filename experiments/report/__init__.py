"""The report of `staff-report`: tables, figures and a page. This file has what a run prints at its end."""

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


def means(folders: Sequence[Path]) -> str | None:
    """The metric of each method and pruning rate over its seeds: mean ± standard deviation, and the number of runs;
    None where no two runs differ in their seeds alone."""
    from experiments.report.records import as_table
    from experiments.report.settings import variants

    table = as_table(read(folder / "metrics.json") for folder in folders)
    if table.empty:
        return None
    table["value"] = [row[row["metric"]] for _, row in table.iterrows()]
    table["variant"] = variants(table)
    keys = ["family", "task", "variant", "pruning_rate", "metric"]
    grouped = table.groupby(keys, sort=False, dropna=False)["value"].agg(["mean", "std", "count"]).reset_index()
    if grouped["count"].max() < 2:
        return None
    spread = [f" ± {std:.2f}" if n > 1 else "" for std, n in zip(grouped["std"], grouped["count"])]
    lines = pd.DataFrame(
        {
            **{name: grouped[name] for name in ("family", "task") if grouped[name].nunique(dropna=False) > 1},
            "method": grouped["variant"],
            "pruning rate": [f"{rate:g}" for rate in grouped["pruning_rate"]],
            "metric": grouped["metric"],
            "mean ± SD": [f"{mean:.2f}{sd}" for mean, sd in zip(grouped["mean"], spread)],
            "n": grouped["count"],
        }
    )
    return f"\nover seeds:\n{lines.to_string(index=False)}"


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
