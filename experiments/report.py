"""Records into tables: `python -m experiments.report` writes metrics.csv and prints means over seeds."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

SEEDS = ["seed", "selection_seed", "finetune_seed"]
STR_NOTE = "STR: selection time / time to fine-tune the target on the whole pool (~ estimated from FLOPs)."


def overview(folders: Sequence[Path]) -> str:
    """A line for each record: what was selected, what it gave, and what selecting it cost."""
    if not folders:
        return "no records"
    records = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
    lines = pd.DataFrame([_line(record) for record in records])
    if len(set(lines["seed"])) == 1:
        lines = lines.drop(columns="seed")
    where = "\n".join(f"  {folder}/metrics.json" for folder in folders)
    return f"\n{lines.to_string(index=False)}\n\n{STR_NOTE}\n{where}"


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
        metric: f"{record['metrics'][metric]:.2f}",
        "selection overhead (s)": f"{overhead['seconds']:.3f}",
        "STR": f"{estimated}{ratio}",
    }


def collect(results: Path) -> pd.DataFrame:
    """All records under `results`: a row per run, with every setting in which the runs differ."""
    rows = []
    for file in sorted(results.glob("runs/*/metrics.json")):
        record = json.loads(file.read_text())
        overhead = {f"overhead_{k}": v for k, v in record["overhead"].items() if not isinstance(v, list)}
        settings = pd.json_normalize({"setting": {**record["config"], **record["identity"]}}, max_level=4)
        row = settings.iloc[0].map(lambda v: json.dumps(v) if isinstance(v, list | dict) else v).to_dict()
        row = {k: v for k, v in row.items() if not k.startswith(("setting.tracking", "setting.results_dir"))}
        rows.append({**record["run"], **record["metrics"], **overhead, **record["counts"], **row})
    table = pd.DataFrame(rows)
    settings = [column for column in table.columns if str(column).startswith("setting.")]
    constant = [column for column in settings if _values(table, column) == 1]
    return table.drop(columns=constant)


def summary(table: pd.DataFrame) -> str:
    """Mean and standard deviation over seeds, never over runs that differ in anything else."""
    told_by = {f"setting.{name}" for name in ("method._target_", "pruning_rate", "store_dir", *SEEDS)}
    differ = [c for c in table.columns if str(c).startswith("setting.") and c not in told_by]
    # A method's own settings are told by its name, unless one name stands for several.
    for name in [c for c in differ if c.startswith("setting.method.")]:
        if all(_values(runs, name) == 1 for _, runs in table.groupby("method")):
            differ.remove(name)
    keys = ["family", "task", "method", "pruning_rate", *differ]
    keys = [key for key in keys if key in ("method", "pruning_rate") or _values(table, key) > 1]
    metrics = list(table["metric"].unique())
    numbers = [*metrics, "overhead_seconds", "overhead_str"]
    grouped = table.groupby(keys, dropna=False)[numbers].agg(["mean", "std"])
    grouped.columns = [" ".join(column) for column in grouped.columns]
    grouped.insert(0, "seeds", table.groupby(keys, dropna=False).size())
    said = f"runs are told apart by {', '.join(str(key).removeprefix('setting.') for key in keys)}"
    return f"{grouped.round(3).reset_index().to_string(index=False)}\n\n{said}; averaged over seeds alone."


def _values(table: pd.DataFrame, column: str) -> int:
    """How many different values a column holds, missing ones counted as one."""
    return len(set(table[column].astype(str)))


def unfinished(results: Path) -> tuple[list[str], list[str]]:
    """Jobs of sweeps and single runs that failed, and jobs of sweeps that were never finished."""
    expected: dict[str, None] = {}
    failed: dict[str, str] = {}
    done: set[str] = set()
    for jobs in sorted(results.glob("sweeps/*/jobs.json")):
        sweep = jobs.parent
        expected |= dict.fromkeys(json.loads(jobs.read_text()))
        for file in sorted(sweep.glob("[0-9]*.json")):
            word = json.loads(file.read_text())
            if "failure" in word:
                failed[word["job"]] = word["failure"]
            elif (Path(word["folder"]) / "metrics.json").is_file():
                done.add(word["job"])
    failures = [f"{job}: {why}" for job, why in failed.items() if job not in done]
    alone = [file.parent for file in sorted(results.glob("runs/*/failure.txt"))]
    failures += [f"{f.name}: see {f / 'failure.txt'}" for f in alone if not (f / "metrics.json").is_file()]
    return failures, [job for job in expected if job not in done and job not in failed]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder that holds runs/ and sweeps/")
    parser.add_argument(
        "--allow-missing", action="store_true", help="a partial look: failed or missing runs are no error"
    )
    arguments = parser.parse_args()
    table = collect(arguments.results)
    if table.empty:
        sys.exit(
            f"{arguments.results}/runs holds no record: run `staff` first, or name another folder by --results."
        )
    table.to_csv(arguments.results / "metrics.csv", index=False)
    print(f"{summary(table)}\n\n{len(table)} runs: {arguments.results / 'metrics.csv'}")
    failures, missing = unfinished(arguments.results)
    for kind, jobs in (("failed", failures), ("missing", missing)):
        for job in jobs:
            print(f"{kind}: {job}")
    if (failures or missing) and not arguments.allow_missing:
        sys.exit(
            f"{len(failures)} failed, {len(missing)} missing: the sweep's command again runs them "
            "(to forget a sweep, delete its folder under sweeps/)."
        )


if __name__ == "__main__":
    main()
