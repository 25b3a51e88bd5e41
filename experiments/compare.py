"""Set records that were made again beside the first: `python -m experiments.compare results/tiny results/rebuilt`.

Runs are matched by name, which holds the fingerprint of all that determines their numbers. On the same kind of
processor and with the same versions every coreset, answer and metric must be equal; elsewhere rounding differs, a
sample may cross a region's edge, and the table tells how far that goes.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from experiments.report import read

MACHINE = ("cpu", "gpus", "python", "versions")


def compare(first: Path, again: Path) -> pd.DataFrame:
    """A row for every record under `first`: what the run of the same name under `again` came to.

    Columns: run; equal, whether coreset, answers and metrics are the same; machine, whether processor and versions
    are; jaccard of the two coresets; the task's metric in both. Where the run was not made again, all but the
    first are missing.
    """
    rows = []
    for file in sorted(first.glob("runs/*/metrics.json")):
        other = again / "runs" / file.parent.name
        rows.append({"run": file.parent.name})
        if (other / "metrics.json").is_file():
            rows[-1] |= _compared(file.parent, other)
    return pd.DataFrame(rows, columns=["run", "equal", "machine", "jaccard", "first", "again"])


def _compared(first: Path, again: Path) -> dict[str, Any]:
    records = [read(folder / "metrics.json") for folder in (first, again)]
    chosen = [_selected(folder) for folder in (first, again)]
    answers = [_answers(folder) for folder in (first, again)]
    metrics, machines = [record["metrics"] for record in records], [record["provenance"] for record in records]
    name = records[0]["run"]["metric"]
    return {
        "equal": chosen[0] == chosen[1] and answers[0].equals(answers[1]) and metrics[0] == metrics[1],
        "machine": all(machines[0][part] == machines[1][part] for part in MACHINE),
        "jaccard": len(chosen[0] & chosen[1]) / max(1, len(chosen[0] | chosen[1])) if chosen[0] else 1.0,
        "first": metrics[0][name],
        "again": metrics[1][name],
    }


def _selected(folder: Path) -> set[str]:
    pool = pd.read_parquet(folder / "samples.parquet", columns=["id", "selected"])
    return set(pool.loc[pool["selected"], "id"])


def _answers(folder: Path) -> pd.DataFrame:
    return pd.read_parquet(folder / "predictions.parquet", columns=["id", "prediction"])


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.compare", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("first", type=Path, help="folder that holds the runs/ that were there first")
    parser.add_argument("again", type=Path, help="folder that holds the runs/ that were made again")
    arguments = parser.parse_args()
    table = compare(arguments.first, arguments.again)
    if table.empty:
        sys.exit(f"{arguments.first}/runs holds no record: name the results folder that is to be compared with.")
    print(table.to_string(index=False, na_rep="-"))
    equal, machine = table["equal"].tolist(), table["machine"].tolist()
    missing = sum(found not in (True, False) for found in equal)
    elsewhere = sum(found is False and same is False for found, same in zip(equal, machine))
    differ = equal.count(False) - elsewhere
    print(f"\n{equal.count(True)} of {len(equal)} runs equal, {missing} not made again", end="")
    print(f", {elsewhere} differ on another processor or other versions" if elsewhere else "")
    if missing or differ:
        sys.exit(f"{differ} runs differ on the same kind of machine.")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # a reader such as `head` may have had enough
    main()
