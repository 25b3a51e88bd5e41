"""The records of runs as one table, and its parts that may be compared."""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hydra.utils import get_class

from experiments.campaign import fields
from experiments.recorded import RecordedRun, recorded_runs
from experiments.report.settings import SEEDS, ablations, texts, variants
from staff.errors import UserError
from staff.evaluation.metrics import NAMED, named_metric


def collect(results: Path) -> pd.DataFrame:
    """All records of runs that were evaluated: a row per run, with every setting in which the runs differ."""
    return as_table(run.record() for run in recorded_runs(results).values())


def as_table(records: Iterable[dict[str, Any]]) -> pd.DataFrame:
    """The records of runs that were evaluated, as `collect` returns them."""
    rows = [_row(record) for record in records if record["evaluation"]]
    _fill_later_fields(rows)
    table = pd.DataFrame(rows)
    settings = [column for column in table.columns if str(column).startswith("setting.")]
    constant = [column for column in settings if texts(table, column).nunique() == 1]
    return table.drop(columns=constant)


def by_metric(table: pd.DataFrame, metric: str) -> pd.DataFrame:
    """The runs that were measured by `metric`, to be compared by it in place of the first one of their task.

    Raises:
        UserError: no run was.
    """
    if metric not in table.columns or not table[metric].notna().any():
        known = [name for name in NAMED if name in table.columns and table[name].notna().any()]
        raise UserError(
            f"--metric {metric} was measured in no run: choose from {', '.join(known)}, or measure stored answers "
            f"by staff-measure --metrics {metric}."
        )
    named_metric(metric)  # a column that is no metric
    return table[table[metric].notna()].assign(metric=metric, first_metric=table["metric"])


def report_command(results: Path) -> str:
    return "staff-report" + ("" if results == Path("results") else f" --results {results}")


def _row(record: dict[str, Any]) -> dict[str, Any]:
    overhead = {f"overhead_{k}": v for k, v in record["overhead"].items() if not isinstance(v, list)}
    finetuning = record["finetuning"] or {}
    return {
        **record["run"],
        **record["metrics"],
        **overhead,
        **{f"finetuning_{name}": finetuning.get(name) for name in ("seconds", "flops", "peak_memory_bytes")},
        **record["counts"],
        "stages": record["overhead"]["stages"],
        "warnings": record.get("warnings", []),
        "floors": record.get("floors", {}),
        "groups": record["coreset"].get("groups", {}),
        "planted": record["coreset"].get("planted", {}),
        "by_group": record.get("metrics_by_group", {}),
        **{name: record["provenance"][name] for name in ("git_commit", "git_dirty", "concurrent_workers")},
        "answers": record["evaluation"]["fingerprint"],
        "selects": record["config"]["method"]["_target_"],
        "num_regions": record["config"]["method"].get("num_regions"),
        "test_set": _test_set(record),
        **dict(fields(_configured(record), "setting.")),
    }


def _fill_later_fields(rows: list[dict[str, Any]]) -> None:
    """Give records of an earlier version the fields that their classes have had since, by their defaults."""
    for column in {column for row in rows for column in row if column.startswith("setting.")}:
        group, _, name = column.rpartition(".")
        classes = {str(row.get(f"{group}._target_")) for row in rows if column in row}
        for row in rows:
            target = str(row.get(f"{group}._target_"))
            if column not in row and target in classes and name in _defaults(target):
                row[column] = _defaults(target)[name]


@cache
def _defaults(target: str) -> dict[str, Any]:
    """The defaults of the plain fields of a dataclass, by name; none of a class that is not here."""
    if "." not in target:
        return {}
    try:
        cls = get_class(target)
    except Exception:
        return {}
    given = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    return {f.name: f.default for f in given if isinstance(f.default, str | int | float)}


def _test_set(record: dict[str, Any]) -> str:
    """The test samples that were answered; those that are too long depend on settings."""
    dropped = record["counts"]["test_dropped_too_long"]
    return record["identity"]["data"]["test"][:8] + (f" without {dropped}" if dropped else "")


def _configured(record: dict[str, Any]) -> dict[str, Any]:
    """The configuration, with the identity of what it names. A selection family that is the run's own family is
    given by its name."""
    config = {**record["config"], "identity": record["identity"]}
    if "selection" not in record["identity"]:
        config["selection_family"] = {"name": record["run"]["selection_family"]}
    return config


@dataclass(frozen=True, eq=False)
class Context:
    """The runs of one family on one task's test set by one metric: what may stand in one table.

    Attributes:
        title: for a reader.
        name: for a file.
        runs: a row per run, with its `variant`.
        results: the results folder.
        recorded: the runs in it, by name.
        varied: what the variants are: methods, or the values of this setting of one method (an ablation).
        all_runs: of the comparison of methods, the runs of its ablations too; None for an ablation.
    """

    title: str
    name: str
    metric: str
    runs: pd.DataFrame
    results: Path
    recorded: Mapping[str, RecordedRun]
    varied: str = "method"
    all_runs: pd.DataFrame | None = None
    _values: dict[str, pd.Series] = field(default_factory=dict)
    _texts: dict[str, str] = field(default_factory=dict)

    @property
    def made_by(self) -> str:
        """The command that makes tables and figures out of these runs."""
        return report_command(self.results)

    @cached_property
    def variants(self) -> list[str]:
        """Reference points, baselines, then STAFF."""
        order = {"raw target": 0, "full": 1, "random": 2}
        rank = {v: (order.get(v, 3), self.is_staff(v), _natural(v)) for v in self.runs["variant"].unique()}
        return sorted(rank, key=lambda variant: rank[variant])

    @cached_property
    def rates(self) -> list[float]:
        return sorted({float(rate) for rate in self.runs["pruning_rate"]})

    @cached_property
    def cells(self) -> dict[tuple[str, float], pd.DataFrame]:
        """The runs of a variant at a pruning rate, which differ in seeds alone."""
        groups = self.runs.groupby(["variant", "pruning_rate"])
        return {(str(variant), float(rate)): runs for (variant, rate), runs in groups}

    @cached_property
    def _staff(self) -> set[str]:
        own = self.runs["selects"].str.startswith("staff.")
        return set(self.runs.loc[own, "variant"])

    def is_staff(self, variant: str) -> bool:
        return variant in self._staff

    @cached_property
    def baselines(self) -> list[str]:
        """Methods that select, without STAFF's."""
        return [v for v in self.variants if not self.is_staff(v) and v not in ("raw target", "full")]

    @cached_property
    def shown(self) -> tuple[float, dict[str, RecordedRun]]:
        """A pruning rate (that of most methods, the highest of these) and each selecting method's run at the lowest
        seed: what figures of single coresets show."""
        selecting = [*self.baselines, *filter(self.is_staff, self.variants)]
        count = {rate: sum((v, rate) in self.cells for v in selecting) for rate in self.rates}
        rate = max(count, key=lambda rate: (count[rate], rate))
        runs = {v: self.cells[v, rate].sort_values(SEEDS).iloc[0] for v in selecting if (v, rate) in self.cells}
        return rate, {v: self.recorded[str(run["name"])] for v, run in runs.items()}

    def answers(self, run: str) -> pd.Series:
        """The metric of each test sample, by id; empty where a run's predictions are gone."""
        if run not in self._values:
            answers = self.recorded[run].predictions(["id", self.metric])
            known = pd.Series(dtype=float) if answers is None else answers.set_index("id")[self.metric]
            self._values[run] = known
        return self._values[run]

    def same_answers(self, runs: pd.DataFrame) -> list[pd.DataFrame]:
        """Those of `runs` that were fine-tuned apart and yet answer alike word by word, two or more to a group."""
        found = []
        for _, alike in runs[runs[self.metric].duplicated(keep=False)].groupby(self.metric):
            if alike["answers"].nunique() > 1:  # by two models
                groups = alike.groupby(alike["name"].map(self._predictions).replace("", None))
                found += [group for _, group in groups if group["answers"].nunique() > 1]
        return found

    def _predictions(self, run: str) -> str:
        """The digest of a run's answers; empty where they are gone."""
        if run not in self._texts:
            answers = self.recorded[run].predictions(["id", "prediction"])
            known = "" if answers is None else answers.to_json(orient="values")
            self._texts[run] = hashlib.sha256(known.encode()).hexdigest() if known else ""
        return self._texts[run]


def _natural(text: str) -> list[str | float]:
    """For sorting: numbers in a text by their value."""
    parts = re.split(r"(\d+\.?\d*)", text)
    return [float(part) if i % 2 else part for i, part in enumerate(parts)]


def contexts(table: pd.DataFrame, results: Path) -> list[Context]:
    """The runs that may be compared with one another, a context each; after those by method, the ablations."""
    several = table.groupby(["family", "task"], dropna=False)[["metric", "test_set"]].transform("nunique") > 1
    # Two metrics or test sets of one task never share a table.
    other = table["metric"] != table.get("first_metric", table["metric"])
    table = table.assign(part=np.where(several["metric"] | other, " by " + table["metric"], ""))
    table["part"] += np.where(several["test_set"], " test set " + table["test_set"], "")
    recorded = recorded_runs(results)
    found = []
    for (family, task, part), runs in table.groupby(["family", "task", "part"], dropna=False):
        family, task = (str(n) if n == n and n is not None else "custom" for n in (family, task))
        metric, title, name = runs["metric"].iloc[0], f"{task}{part}, {family} family", f"{family}-{task}{part}"
        compared, ablated = ablations(runs)
        compared = compared.assign(variant=variants(compared))
        found.append(Context(title, _file_name(name), metric, compared, results, recorded, all_runs=runs))
        for each in ablated:
            own, file = f"{title}: {each.title}", _file_name(f"{name}-{each.title}")
            found.append(Context(own, file, metric, each.runs, results, recorded, each.setting))
    return found


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.-]+", "-", text)
