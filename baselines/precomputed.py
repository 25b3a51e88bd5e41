"""Precomputed: a coreset from a file, selected elsewhere or in an earlier run."""

from __future__ import annotations

import csv
import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, ClassVar

import numpy as np

from staff.errors import UserError
from staff.runtime.files import local_path, original
from staff.selection import Coreset, Draws, ScorePool

COLUMNS = ("id", "position")


@dataclass(frozen=True)
class Precomputed:
    """Selects the samples that a file lists, whatever the pruning rate. The order of the list is ignored.

    Attributes:
        path: a JSON list of ids (text) or of positions from 0 (numbers). Or a CSV file with a column `id` or
            `position`, such as the coreset.csv of a run. Or a `.pt` file of positions, as the STAFF authors
            released theirs; only integers are unpickled.
        pool_size: N of the pool that the list was selected from. It is required for positions, which do not
            identify their pool: those of the authors for DialogSum index 13,014 samples from all its splits, not
            the 12,460 for training.
    """

    version: ClassVar[int] = 1

    path: str | None = None
    pool_size: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.path, str):
            given = "null" if self.path is None else repr(self.path)
            raise UserError(f"method.path={given} is not a file: set method.path=FILE (.json, .csv, .pt).")
        if self.pool_size is not None and (type(self.pool_size) is not int or self.pool_size < 1):
            raise UserError(f"method.pool_size={self.pool_size!r} must be a whole number of at least 1.")
        lists_positions = isinstance(self.entries[0], int)  # read at once, so that a bad file is refused at once
        if lists_positions and self.pool_size is None:
            raise UserError(
                f"{self._setting} lists positions, which do not identify their pool: set method.pool_size to its "
                "number of samples."
            )

    @property
    def _setting(self) -> str:
        return f"method.path={self.path}"

    @cached_property
    def entries(self) -> list[str] | list[int]:
        """Ids or positions as listed, without duplicates."""
        file = local_path(str(self.path))
        read = READERS.get(file.suffix)
        if read is None:
            raise UserError(f"{self._setting} is none of {', '.join(READERS)}: convert it.")
        try:
            entries = read(file)
        except UserError:
            raise
        except OSError as error:
            raise UserError(f"{self._setting} cannot be read ({error.strerror or error}): name a file.") from error
        except Exception as error:  # for a damaged .pt file torch can raise any error
            said = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{self._setting} cannot be read ({said}); give a whole {file.suffix} file.") from error
        listed = isinstance(entries, list)
        kinds = {type(entry) for entry in entries} if listed else {type(entries)}
        if not listed or kinds not in ({str}, {int}):
            said = ", ".join(sorted(kind.__name__ for kind in kinds)) or "nothing"
            raise UserError(
                f"{self._setting} holds {said}: it must be a list of ids (text) or positions (numbers)."
            )
        twice, count = Counter(entries).most_common(1)[0]
        if count > 1:
            raise UserError(f"{self._setting} lists {twice!r} {count} times: list each sample once.")
        return entries

    @property
    def content_digest(self) -> str:
        """Digest of the listed samples, for fingerprints; the same for the same samples in another file."""
        return hashlib.sha256(json.dumps(sorted(self.entries)).encode()).hexdigest()

    def fixed_size(self, pool_size: int) -> int:
        return len(self.entries)

    def select(self, pool: ScorePool, budget: int, rng: Draws) -> Coreset:
        """The coreset of the listed samples.

        Raises:
            UserError: a pool of another size, or an entry that is not in it.
        """
        size, listed = len(pool.ids), len(self.entries)
        if self.pool_size not in (None, size):
            raise UserError(
                f"method.pool_size={self.pool_size}, but this pool has {size} samples (without any dropped as too "
                f"long): use the data that {self.path} was selected from."
            )
        if budget != listed:
            raise UserError(f"{self._setting} lists {listed} samples, not the {budget} of the budget.")
        places = range(size) if isinstance(self.entries[0], int) else pool.ids
        position = {entry: i for i, entry in enumerate(places)}
        unknown = [entry for entry in self.entries if entry not in position]
        if unknown:
            example = f"{places[0]!r} to {places[-1]!r}" if isinstance(places, range) else f"such as {places[0]!r}"
            raise UserError(
                f"{self._setting} lists {unknown[0]!r} ({len(unknown)} in total), which is not among the pool's "
                f"{size} samples ({example}): use the data that it was selected from."
            )
        return Coreset(np.array([position[entry] for entry in self.entries]))


def _read_json(file: Path) -> Any:
    return json.loads(file.read_text("utf-8-sig"))


def _read_csv(file: Path) -> Any:
    with file.open(newline="", encoding="utf-8-sig") as lines:
        rows = csv.DictReader(lines)
        column = next((name for name in COLUMNS if name in (rows.fieldnames or ())), None)
        if column is None:
            has = ", ".join(" ".join(name.split()) for name in rows.fieldnames or ()) or "none"
            raise UserError(f"method.path={file} needs a column {' or '.join(COLUMNS)}; it has {has}.")
        return [original(row[column]) if column == "id" else int(row[column]) for row in rows]


def _read_pt(file: Path) -> Any:
    """A list or tensor of integers; NumPy scalars are the only globals allowed beyond what torch allows anyway."""
    import torch

    scalar = np._core.multiarray.scalar  # type: ignore[attr-defined] # how NumPy pickles a scalar
    integers = {type(np.dtype(code)) for code in np.typecodes["AllInteger"]}
    allowed = [scalar, (scalar, "numpy.core.multiarray.scalar"), np.dtype, *integers]  # as NumPy 1 and 2 name it
    try:
        with torch.serialization.safe_globals(allowed):
            listed = torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise UserError(f"method.path={file} holds more than integers, and is not unpickled: save ints.") from error
    if isinstance(listed, torch.Tensor):
        return listed.tolist()
    return [int(e) if isinstance(e, np.integer) else e for e in listed] if isinstance(listed, list) else listed


READERS: dict[str, Callable[[Path], Any]] = {".json": _read_json, ".csv": _read_csv, ".pt": _read_pt}
