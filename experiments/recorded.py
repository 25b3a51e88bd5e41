"""Recorded runs, read from their folders or from the tables of a campaign (`experiments.campaign` writes these)."""

from __future__ import annotations

import io
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow.parquet import ParquetFile

from staff.errors import UserError

TEXTS = ("metrics.json", "training.csv", "regions.csv")  # files that the tables hold as they are


def read(file: Path) -> dict[str, Any]:
    """The record in a metrics.json."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(
            f"{file} is damaged ({error}): delete it, and the run's command records it again."
        ) from None


class RecordedRun(ABC):
    """What a run left, in its folder or in tables; a file that it did not leave is read as None."""

    name: str

    @abstractmethod
    def text(self, file: str) -> str | None:
        """The text of one of TEXTS."""

    @abstractmethod
    def record(self) -> dict[str, Any]:
        """The content of metrics.json."""

    @abstractmethod
    def predictions(self, columns: Sequence[str] | None = None) -> pd.DataFrame | None:
        """A row per test sample: id, prediction, tokens, references, every metric; of `columns` those there are."""

    @abstractmethod
    def samples(self) -> pd.DataFrame | None:
        """A row per sample of the pool: id, selected, answer_tokens, every score."""

    def regions(self) -> pd.DataFrame | None:
        """What the method reports of its regions."""
        text = self.text("regions.csv")
        return None if text is None else pd.read_csv(io.StringIO(text), float_precision="round_trip")


def recorded_runs(results: Path) -> dict[str, RecordedRun]:
    """The runs recorded in a results folder, by name; the folder of a run takes precedence over the tables."""
    return dict(sorted({**packed_runs(results), **run_folders(results)}.items()))


def recorded_run(folder: Path) -> RecordedRun:
    """The run in RESULTS/runs/NAME, or the run of that name in the tables of RESULTS.

    Raises:
        UserError: there is neither.
    """
    if (folder / "metrics.json").is_file():
        return RunFolder(folder)
    packed = packed_runs(folder.parent.parent)
    if folder.name not in packed:
        raise UserError(f"{folder} holds no metrics.json and is in no table: name the folder of a recorded run.")
    return packed[folder.name]


def run_folders(results: Path) -> dict[str, RecordedRun]:
    return {file.parent.name: RunFolder(file.parent) for file in results.glob("runs/*/metrics.json")}


def packed_runs(results: Path) -> dict[str, RecordedRun]:
    if not (results / "runs.parquet").is_file():
        return {}
    tables = Tables(results)
    return {name: PackedRun(name, tables) for name in tables.texts}


def regions_of(pool: pd.DataFrame, regions: pd.DataFrame | None) -> np.ndarray | None:
    """The region whose bounds hold each sample's first score, (N,), NaN where none does.

    None where a method has no such regions.

    Args:
        pool: as `RecordedRun.samples` gives it.
        regions: as `RecordedRun.regions` gives it.
    """
    scores = [column for column in pool if column not in ("id", "selected", "answer_tokens")]
    if regions is None or not {"low", "high"} <= set(regions) or not scores or regions.empty:
        return None
    bounds = regions.sort_values("low")
    values = pool[scores[0]].to_numpy(float)
    place = np.clip(np.searchsorted(bounds["low"].to_numpy(float), values, side="right") - 1, 0, None)
    inside = (values >= bounds["low"].to_numpy(float)[place]) & (values <= bounds["high"].to_numpy(float)[place])
    return np.where(inside, bounds.iloc[:, 0].to_numpy(float)[place], np.nan)


class RunFolder(RecordedRun):
    """A run in a folder of its own."""

    def __init__(self, folder: Path):
        self.folder, self.name = folder, folder.name

    def text(self, file: str) -> str | None:
        path = self.folder / file
        return path.read_bytes().decode() if path.is_file() else None

    def record(self) -> dict[str, Any]:
        return read(self.folder / "metrics.json")

    def predictions(self, columns: Sequence[str] | None = None) -> pd.DataFrame | None:
        return self._table("predictions.parquet", columns)

    def samples(self) -> pd.DataFrame | None:
        return self._table("samples.parquet")

    def _table(self, file: str, columns: Sequence[str] | None = None) -> pd.DataFrame | None:
        path = self.folder / file
        # pandas.read_parquet takes three times as long.
        return ParquetFile(path).read(columns).to_pandas() if path.is_file() else None


class Tables:
    """The tables of a campaign, each read when it is first needed."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._read: dict[tuple[str, ...], tuple[pa.Table, dict[str, slice]]] = {}

    @cached_property
    def texts(self) -> dict[str, dict[str, str | None]]:
        """The files of each run that are stored as text."""
        table, _ = self._table("runs.parquet", "run", TEXTS)
        return {row.pop("run"): row for row in table.to_pylist()}

    def rows(self, file: str, key: str, value: str, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of a table whose column `key` is `value`, without that column."""
        table, parts = self._table(file, key, columns)
        return table[parts.get(value, slice(0))].drop_columns(key)

    def _table(
        self, file: str, key: str, columns: Sequence[str] | None = None
    ) -> tuple[pa.Table, dict[str, slice]]:
        """A table, or its `key` and `columns`, and the rows of each value of `key`."""
        known = (file, *(columns or ()))
        if known not in self._read:
            try:
                table = ParquetFile(self.folder / file).read(columns and [key, *columns])
            except (OSError, pa.ArrowException) as error:
                raise UserError(f"{self.folder / file} cannot be read ({error}): restore the file.") from None
            self._read[known] = table, _parts(table[key])
        return self._read[known]


def _parts(column: pa.ChunkedArray) -> dict[str, slice]:
    """The rows of each value of a column in which equal values are neighbours."""
    if not len(column):
        return {}
    encoded = column.dictionary_encode().unify_dictionaries()
    codes = np.concatenate([chunk.indices.to_numpy() for chunk in encoded.chunks])
    starts = np.flatnonzero(np.diff(codes, prepend=-1)).tolist()
    values = encoded.chunk(0).dictionary.to_pylist()
    return {values[codes[a]]: slice(a, b) for a, b in zip(starts, [*starts[1:], len(codes)])}


@dataclass(frozen=True)
class PackedRun(RecordedRun):
    """A run in the tables of its campaign."""

    name: str
    tables: Tables

    def text(self, file: str) -> str | None:
        return self.tables.texts[self.name][file]

    def record(self) -> dict[str, Any]:
        return json.loads(self.text("metrics.json") or "")

    def predictions(self, columns: Sequence[str] | None = None) -> pd.DataFrame | None:
        rows = self.tables.rows("predictions.parquet", "run", self.name, columns)
        if not len(rows):
            return None
        # The metrics of another task are null in every row; a value that is unknown is NaN.
        return rows.select([name for name in rows.column_names if rows[name].null_count < len(rows)]).to_pandas()

    def samples(self) -> pd.DataFrame | None:
        selection = self.tables.rows("selections.parquet", "run", self.name)
        if not len(selection):
            return None
        chosen = selection.to_pylist()[0]
        vectors = [self.tables.rows("scores.parquet", "vector", name) for name in chosen["vectors"]]
        ids = vectors[0]["id"].to_pandas()
        table = pd.DataFrame({"id": ids, "selected": np.isin(np.arange(len(ids)), chosen["positions"])})
        for vector in vectors:
            table[vector["signal"][0].as_py()] = vector["value"].to_numpy().astype(vector["type"][0].as_py())
        return table
