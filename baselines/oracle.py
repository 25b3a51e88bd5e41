"""Oracle: a coreset chosen with knowledge of what was planted. A ceiling to measure methods by, not a rival: nobody
knows the truth of real data.

Right answers that copy no other sample come first, as many of each skill as there are of the others; then right
copies; then wrong answers. On `task=planted` alone, whose truth it reads (`staff.data.planted`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from staff.errors import UserError
from staff.selection import Coreset, Draws, ScorePool, check_budget


@dataclass(frozen=True)
class Oracle:
    """Balanced over skills, without wrong answers and copies as long as there are other samples.

    Attributes:
        task: the planted task that the pool is of; `truth` is a table of what was planted, by the samples' ids.
    """

    version: ClassVar[int] = 1

    task: Any

    def __post_init__(self) -> None:
        if not hasattr(self.task, "truth"):
            name = getattr(self.task, "name", self.task)
            raise UserError(
                f"method=oracle needs a pool with known defects, unlike that of task {name!r}: set task=planted."
            )

    @property
    def content_digest(self) -> str:
        """Of the truth, for fingerprints."""
        return hashlib.sha256(self.task.truth.to_csv().encode()).hexdigest()

    def select(self, pool: ScorePool, budget: int, rng: Draws) -> Coreset:
        """Raises UserError for a sample that the task did not make."""
        check_budget(budget, len(pool.ids))
        truth = self.task.truth.reindex(pool.ids)
        unknown = truth.index[truth["group"].isna()]
        if len(unknown):
            raise UserError(
                f"sample {unknown[0]!r} is not in the pool of task {self.task.name!r}: use the same task for both."
            )
        wrong = truth["wrong"].to_numpy(dtype=bool)
        copied = (truth["copy_of"].notna() | truth["near_copy_of"].notna()).to_numpy()
        grade, drawn = np.where(wrong, 2, copied), rng.priorities("pick")
        table = truth.assign(grade=grade, drawn=drawn).sort_values(["grade", "drawn"])
        # The first of every skill before the second of any.
        turn = table.groupby("group").cumcount().reindex(truth.index).to_numpy()
        picked = np.lexsort((drawn, turn, grade))[:budget]

        chosen = np.isin(np.arange(len(wrong)), picked)
        diagnostics = (
            pd.DataFrame({"group": truth["group"].to_numpy(), "clean": grade == 0, "picked": chosen})
            .groupby("group", as_index=False)
            .agg(size=("clean", "size"), clean=("clean", "sum"), picked=("picked", "sum"))
        )
        filled = int((grade[picked] > 0).sum())
        notes = (f"{filled} samples are copies or wrong: the pool has too few others.",) if filled else ()
        return Coreset(picked, diagnostics, filled=filled, notes=notes)
