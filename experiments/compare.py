"""Compare recorded runs with a repetition of them: `staff-compare results/tiny results/rebuilt`.

Runs are matched by name, which ends in a fingerprint of everything that determines their numbers. On the same kind
of processor and with the same versions, every coreset, answer and metric must be equal. Elsewhere rounding differs
and may move a sample to another region; the table shows how large the differences are.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import pandas as pd

from experiments import command
from experiments.recorded import RecordedRun, recorded_runs
from staff.errors import UserError
from staff.runtime.files import local_path

MACHINE = ("cpu", "gpus", "python", "versions")


def compare(first: Path, again: Path, part: bool = False) -> pd.DataFrame:
    """A row for every record under `first`: and how the run of the same name under `again` compares.

    With `part`, for every record under `again` instead: what it was under `first`.

    Columns: run; equal, whether coreset, answers and metrics are the same; machine, whether processor and versions
    are; jaccard of the two coresets; the task's metric in both. Where one of the two lacks the run, all but the
    first are missing.
    """
    was, now = recorded_runs(first), recorded_runs(again)
    rows = []
    for name in now if part else was:
        rows.append({"run": name, **(_compared(was[name], now[name]) if name in was and name in now else {})})
    return pd.DataFrame(rows, columns=["run", "equal", "machine", "jaccard", "first", "again"])


def _compared(first: RecordedRun, again: RecordedRun) -> dict[str, Any]:
    records = [run.record() for run in (first, again)]
    chosen = [_selected(run) for run in (first, again)]
    answers = [_answers(run) for run in (first, again)]
    metrics, machines = [record["metrics"] for record in records], [record["provenance"] for record in records]
    name = records[0]["run"]["metric"]
    return {
        "equal": chosen[0] == chosen[1] and answers[0].equals(answers[1]) and metrics[0] == metrics[1],
        "machine": all(machines[0][part] == machines[1][part] for part in MACHINE),
        "jaccard": len(chosen[0] & chosen[1]) / max(1, len(chosen[0] | chosen[1])) if chosen[0] else 1.0,
        "first": metrics[0].get(name),
        "again": metrics[1].get(name),
    }


def _selected(run: RecordedRun) -> set[str]:
    pool = run.samples()
    return set() if pool is None else set(pool.loc[pool["selected"], "id"])


def _answers(run: RecordedRun) -> pd.DataFrame:
    answers = run.predictions(["id", "prediction"])
    if answers is None:
        raise UserError(f"{run.name} has no predictions.parquet: restore it, or carry out the run again.")
    return answers


@command
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="staff-compare", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("first", type=local_path, help="results folder with the original runs")
    parser.add_argument("again", type=local_path, help="results folder with the repeated runs")
    parser.add_argument("--part", action="store_true", help="compare only the runs that were repeated")
    arguments = parser.parse_args()
    table = compare(arguments.first, arguments.again, arguments.part)
    if table.empty:
        empty = arguments.again if arguments.part else arguments.first
        raise UserError(f"{empty} holds no record: name a results folder with runs.")
    print(table.to_string(index=False, na_rep="-"))
    equal, machine = table["equal"].tolist(), table["machine"].tolist()
    missing = sum(found not in (True, False) for found in equal)
    elsewhere = sum(found is False and same is False for found, same in zip(equal, machine))
    differ = equal.count(False) - elsewhere
    lacking = f"{missing} not in {arguments.first}" if arguments.part else f"{missing} not made again"
    print(f"\n{equal.count(True)} of {len(equal)} runs equal, {lacking}", end="")
    print(f", {elsewhere} differ on another processor or other versions" if elsewhere else "")
    if missing or differ:
        sys.exit(f"{differ} runs differ on the same kind of machine.")


if __name__ == "__main__":
    main()
