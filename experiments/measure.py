"""Apply metrics to stored answers: `staff-measure RESULTS --metrics rougeL chrf`.

Use it for a new metric, or one whose numbers have changed. No answers are generated, and runs keep their names.
RESULTS has run folders, the tables of a campaign, or both; the values are added to each.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from experiments import command
from experiments.campaign import pack
from experiments.recorded import RecordedRun, packed_runs, run_folders
from staff import tracking
from staff.errors import UserError
from staff.evaluation.metrics import measure, named_metric
from staff.evaluation.metrics.metric import Metric
from staff.evaluation.stage import choices_of
from staff.runtime.files import local_path


@dataclass(frozen=True)
class MeasuredRun(RecordedRun):
    """A recorded run with its answers measured by `metrics` as well."""

    run: RecordedRun
    metrics: Sequence[Metric]

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.run.name

    @cached_property
    def _measured(self) -> tuple[dict[str, float], pd.DataFrame | None]:
        answers = self.run.predictions()
        if answers is None:
            return {}, None
        references = [tuple(texts) for texts in answers["references"]]
        texts = answers["prediction"].tolist(), references
        headline, per_sample = measure(self.metrics, *texts, choices=choices_of(answers))
        kept = answers.drop(columns=[name for name in per_sample if name in answers])
        return headline, kept.join(per_sample)

    def record(self) -> dict[str, Any]:
        record = self.run.record()
        return {**record, "metrics": {**record["metrics"], **self._measured[0]}}

    def text(self, file: str) -> str | None:
        return tracking.as_json(self.record()) if file == "metrics.json" else self.run.text(file)

    def predictions(self, columns: Sequence[str] | None = None) -> pd.DataFrame | None:
        table = self._measured[1]
        return table if table is None or columns is None else table.filter(list(columns))

    def samples(self) -> pd.DataFrame | None:
        return self.run.samples()


def measure_again(results: Path, names: Sequence[str]) -> int:
    """Measure the answers of every run in `results` by these metrics too; how many runs have answers.

    Raises:
        UserError: no run, or an unknown metric.
    """
    metrics = [named_metric(name) for name in names]
    folders, packed = run_folders(results), packed_runs(results)
    if not folders and not packed:
        raise UserError(f"{results} holds no recorded run: name a folder with runs/ or with a campaign's tables.")
    for name, run in folders.items():
        measured = MeasuredRun(run, metrics)
        answers = measured.predictions()
        if answers is not None:
            answers.to_parquet(results / "runs" / name / "predictions.parquet")
            tracking.write_record(results / "runs" / name, measured.record())
    if packed:
        pack({name: MeasuredRun(run, metrics) for name, run in packed.items()}, results)
    return sum(run.record()["evaluation"] is not None for run in (folders | packed).values())


@command
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="staff-measure", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "results", type=local_path, nargs="?", default=Path("results"), help="results folder (default: results)"
    )
    parser.add_argument(
        "--metrics", nargs="+", required=True, help="names of metrics, or dotted paths of your own classes"
    )
    arguments = parser.parse_args()
    count = measure_again(arguments.results, arguments.metrics)
    print(f"{count} runs measured by {', '.join(arguments.metrics)}")


if __name__ == "__main__":
    main()
