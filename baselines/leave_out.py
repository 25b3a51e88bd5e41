"""Leave out: everything but the samples that a score ranks highest, or lowest.

A score that tells utility loses more by its highest ranks than a random part of the same size does, and less by its
lowest. Experiment `score_validity` compares the three.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from staff.errors import UserError
from staff.selection import Coreset, Draws, ScorePool, SelectionMethod, check_choice


@dataclass(frozen=True)
class LeaveOut:
    """The pool without the highest or the lowest ranks of a score of `reference`, as many as the budget leaves out.

    The reference selects at the same budget, and is charged. Equal scores are ranked by keyed draws.

    Attributes:
        reference: the method whose score ranks the samples.
        out: "highest" or "lowest".
        score: the name of the score, as the reference's coreset has it; None: the first that every sample has.
    """

    version: ClassVar[int] = 1

    reference: SelectionMethod
    out: str = "highest"
    score: str | None = None

    def __post_init__(self) -> None:
        check_choice(self, "out", ("highest", "lowest"))
        if not hasattr(self.reference, "select"):
            raise UserError(
                f"method.reference={self.reference!r} is not a method: set method@method.reference=staff."
            )

    def select(self, pool: ScorePool, budget: int, rng: Draws) -> Coreset:
        """Raises UserError for a reference that does not give every sample such a score."""
        scores = self.reference.select(pool, budget, rng).scores
        complete = [name for name, values in scores.items() if np.isfinite(values).all()]
        if not complete:
            raise UserError("method.reference does not score every sample: choose a method that does, such as ifd.")
        name = complete[0] if self.score is None else self.score
        if name not in complete:
            raise UserError(
                f"method.score={name!r} is not a score of every sample: choose {' or '.join(complete)}."
            )
        ranked = rng.highest_first(scores[name])
        kept = ranked[len(ranked) - budget :] if self.out == "highest" else ranked[:budget]
        return Coreset(kept, scores={name: scores[name]}, notes=(f"ranked by the score {name!r}.",))
