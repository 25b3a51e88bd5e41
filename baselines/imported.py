"""Imported: scores from a file, made by any other tool or run."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from baselines.asks import WHICH, take
from staff.errors import UserError
from staff.runtime.files import original
from staff.selection import Coreset, Draws, ScorePool, check_choice, check_scores


@dataclass(frozen=True)
class Imported:
    """Samples by the rank of a score that a file holds for each id.

    Attributes:
        path: a CSV or Parquet file with a column `id`, such as the samples.parquet of a coreset; or a JSON object
            of scores by id. It may hold more samples than the pool.
        column: of the scores, in CSV and Parquet.
        which: "top" for the highest, "low" for the lowest, "middle" for those around the median.
    """

    version: ClassVar[int] = 1

    path: str | None = None
    column: str = "score"
    which: str = "top"

    def __post_init__(self) -> None:
        if not isinstance(self.path, str):
            given = "null" if self.path is None else repr(self.path)
            raise UserError(f"method.path={given} names no scores: set method.path=FILE (.csv, .parquet, .json).")
        if not isinstance(self.column, str):
            raise UserError(f"method.column={self.column!r} must be the name of a column.")
        check_choice(self, "which", WHICH)
        _ = self.by_id  # read at once, so that a bad file is refused before any model loads

    @cached_property
    def by_id(self) -> dict[str, float]:
        """The score of each id in the file."""
        setting, file = f"method.path={self.path}", Path(str(self.path)).expanduser()
        readers = {".csv": _read_csv, ".parquet": _read_parquet, ".json": _read_json}
        if file.suffix not in readers:
            raise UserError(f"{setting} is none of {', '.join(readers)}: convert it.")
        try:
            rows = readers[file.suffix](file, self.column)
        except UserError:
            raise
        except OSError as error:
            raise UserError(f"{setting} cannot be read ({error.strerror or error}): name a file.") from error
        except Exception as error:  # a torn file can end in any error
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{setting} cannot be read ({said}); give a whole {file.suffix} file.") from error
        return _unique(rows, setting)

    @property
    def content_digest(self) -> str:
        """Of the scores, for fingerprints: the same for the same scores in another file."""
        return hashlib.sha256(json.dumps(sorted(self.by_id.items())).encode()).hexdigest()

    def select(self, pool: ScorePool, budget: int, rng: Draws) -> Coreset:
        """Raises UserError for a sample of the pool without a score, or with one that is not finite, by its id."""
        missing = [id for id in pool.ids if id not in self.by_id]
        if missing:
            raise UserError(
                f"method.path={self.path} has no score for sample {missing[0]!r} ({len(missing)} such in all): "
                "give every sample of the pool one."
            )
        scores = check_scores(np.array([self.by_id[id] for id in pool.ids]), pool.ids, "imported score")
        return Coreset(take(scores, self.which, budget, rng), scores={"imported": scores}, notes=degenerate(scores))


FEWEST, MOST_ALIKE = 10, 0.9


def degenerate(scores: np.ndarray) -> tuple[str, ...]:
    """A sentence where a score has fewer than ten values, or one that nine samples of ten share."""
    values, counts = np.unique(scores, return_counts=True)
    share = counts.max() / len(scores)
    if len(values) >= FEWEST and share < MOST_ALIKE:
        return ()
    have = f"{len(values)} different value{'s' if len(values) > 1 else ''}"
    return (f"the imported score has {have}, and {share:.0%} of the samples share one: draws decide among equals.",)


Rows = list[tuple[Any, Any]]  # ids and scores


def _read_csv(file: Path, column: str) -> Rows:
    table = pd.read_csv(file, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    return [(original(id), score) for id, score in _columns(table, file, column)]


def _read_parquet(file: Path, column: str) -> Rows:
    return _columns(pd.read_parquet(file), file, column)


def _read_json(file: Path, column: str) -> Rows:
    rows = json.loads(file.read_text("utf-8-sig"), object_pairs_hook=list)
    if not isinstance(rows, list) or not all(isinstance(row, tuple) for row in rows):
        raise UserError(f"method.path={file} must hold a JSON object of scores by id.")
    return rows


def _columns(table: pd.DataFrame, file: Path, column: str) -> Rows:
    for name, mend in (("id", "name a column so"), (column, "set method.column to one of them")):
        if name not in table:
            has = ", ".join(map(str, table.columns)) or "none"
            raise UserError(f"method.path={file} has no column {name!r}; it has {has}: {mend}.")
    return list(zip(table["id"], table[column]))


def _unique(rows: Rows, setting: str) -> dict[str, float]:
    scores: dict[str, float] = {}
    for id, score in rows:
        if str(id) in scores:
            raise UserError(f"{setting} lists {str(id)!r} more than once: give each id one score.")
        try:
            scores[str(id)] = float(score)
        except (TypeError, ValueError):
            raise UserError(f"{setting} gives {id!r} the score {score!r}: it must be a number.") from None
    return scores
