"""The records of runs as one table, and what tells the runs apart."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pyarrow.parquet import read_table

SEEDS = ["seed", "selection_seed", "finetune_seed"]
NAMES = ["family", "task", "method", "pruning_rate"]
# Settings that change no number, are named by a column of their own, or are known better by content (identity).
UNTOLD = ("tracking", "results_dir", "store_dir", "scoring", "evaluation", "pruning_rate", *SEEDS)
UNTOLD = (*UNTOLD, "task.data_dir", "identity.data.source", "method._target_")


def collect(results: Path) -> pd.DataFrame:
    """All records under `results`: a row per run, with every setting in which the runs differ."""
    rows = [_row(file) for file in sorted(results.glob("runs/*/metrics.json"))]
    table = pd.DataFrame(rows)
    settings = [column for column in table.columns if str(column).startswith("setting.")]
    constant = [column for column in settings if _texts(table, column).nunique() == 1]
    return table.drop(columns=constant)


def _row(file: Path) -> dict[str, Any]:
    record = json.loads(file.read_text(encoding="utf-8"))
    overhead = {f"overhead_{k}": v for k, v in record["overhead"].items() if not isinstance(v, list)}
    finetuning = record["finetuning"] or {}
    return {
        **record["run"],
        **record["metrics"],
        **overhead,
        **{f"finetuning_{name}": finetuning.get(name) for name in ("seconds", "flops", "peak_memory_bytes")},
        **record["counts"],
        "stages": record["overhead"]["stages"],
        **{name: record["provenance"][name] for name in ("git_commit", "git_dirty", "concurrent_workers")},
        "answers": record["evaluation"]["fingerprint"],
        "selects": record["config"]["method"]["_target_"],
        "test_set": record["identity"]["data"]["test"],
        **dict(_settings({**record["config"], "identity": record["identity"]})),
    }


def _settings(values: dict[str, Any], prefix: str = "setting.") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _settings(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", json.dumps(value) if isinstance(value, list | dict) else value


def told_apart(table: pd.DataFrame) -> list[str]:
    """The columns by which runs differ in anything but their seeds, as few as tell all of them apart.

    Names come first, then settings in the order of the configuration; one that tells apart no runs that those
    before it had not told apart already (a method's own settings, where its name says it all) is left out.
    """
    keys = list(NAMES)
    groups = pd.concat([_texts(table, name) for name in NAMES], axis=1).agg("|".join, axis=1)
    for column in (str(c) for c in table.columns if str(c).startswith("setting.")):
        name = column.removeprefix("setting.")
        if any(name == untold or name.startswith(f"{untold}.") for untold in UNTOLD):
            continue
        finer = groups + "|" + _texts(table, column)
        if finer.nunique() > groups.nunique():
            keys.append(column)
            groups = finer
    return keys


def _texts(table: pd.DataFrame, column: str) -> pd.Series:
    """A column as text, in which a missing value is one like others."""
    return pd.Series([str(value) for value in table[column]], index=table.index)


def variants(table: pd.DataFrame, keys: list[str]) -> pd.Series:
    """What each run is called in a table: its method, and the settings in which it differs from others'."""
    labels = table["method"].fillna("custom").replace({"raw": "raw target"})
    for key in keys[len(NAMES) :]:
        name = key.removeprefix("setting.")
        values = pd.Series([_short(value) for value in table[key]], index=table.index)
        if name.startswith("method."):  # shown where one method has several
            several = values.groupby(_texts(table, "method")).transform("nunique") > 1
            values, name = values.where(several, ""), name.removeprefix("method.")
        labels = labels + np.where(values == "", "", f" {name}=" + values)
    return labels


def _short(value: Any) -> str:
    """A value as a label shows it: digests by their first digits, what a run does not have not at all."""
    if value is None or value != value:
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value)
    return text[:8] if len(text) == 64 else text


@dataclass(frozen=True, eq=False)
class Context:
    """The runs of one family on one task's test set by one metric: what may stand in one table.

    Attributes:
        title: for a reader.
        name: for a file.
        runs: a row per run, with its `variant`.
        folder: where the runs' folders lie.
    """

    title: str
    name: str
    metric: str
    runs: pd.DataFrame
    folder: Path
    _values: dict[str, pd.Series] = field(default_factory=dict)

    @cached_property
    def variants(self) -> list[str]:
        """Reference points, baselines, then STAFF."""
        order = {"raw target": 0, "full": 1, "random": 2}
        rank = {v: (order.get(v, 3), self.is_staff(v), v) for v in self.runs["variant"].unique()}
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
    def shown(self) -> tuple[float, dict[str, Path]]:
        """A pruning rate (that of most methods, the highest of these) and each selecting method's run at the lowest
        seed: what figures of single coresets show."""
        selecting = [*self.baselines, *sorted(self._staff)]
        count = {rate: sum((v, rate) in self.cells for v in selecting) for rate in self.rates}
        rate = max(count, key=lambda rate: (count[rate], rate))
        runs = {v: self.cells[v, rate].sort_values(SEEDS).iloc[0] for v in selecting if (v, rate) in self.cells}
        return rate, {v: self.folder / str(run["name"]) for v, run in runs.items()}

    def answers(self, run: str) -> pd.Series:
        """The metric of each test sample, by id; empty where a run's predictions are gone."""
        if run not in self._values:
            file = self.folder / run / "predictions.parquet"
            self._values[run] = pd.Series(dtype=float)
            if file.is_file():
                table = read_table(file, columns=["id", self.metric])  # pandas takes three times as long
                ids, values = table["id"].to_pylist(), table[self.metric].to_numpy()
                self._values[run] = pd.Series(values, index=ids)
        return self._values[run]


def contexts(table: pd.DataFrame, folder: Path) -> list[Context]:
    """The runs that may be compared with one another, a context each."""
    table = table.assign(variant=variants(table, told_apart(table)))
    several = table.groupby(["family", "task"], dropna=False)[["metric", "test_set"]].transform("nunique") > 1
    # Two metrics or test sets of one task never share a table.
    table["part"] = np.where(several["metric"], " by " + table["metric"], "")
    table["part"] += np.where(several["test_set"], " test set " + table["test_set"].str[:8], "")
    found = []
    for (family, task, part), runs in table.groupby(["family", "task", "part"], dropna=False):
        family, task = (str(n) if n == n and n is not None else "custom" for n in (family, task))
        name = re.sub(r"[^\w.-]+", "-", f"{family}-{task}{part}")
        found.append(Context(f"{task}{part}, {family} family", name, runs["metric"].iloc[0], runs, folder))
    return found
