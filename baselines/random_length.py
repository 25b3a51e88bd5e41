"""Random with matched lengths: does a method gain more than what the lengths of its answers explain?

Short answers have larger gradients of the mean loss. So methods that score by effort select, in part, by length,
and coresets with longer or shorter answers fine-tune differently for that reason alone. This control draws at
random, with the same distribution of answer lengths as a reference method's coreset. What the reference gains over
this control is not due to length. What this control gains over `random` is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd

from staff.errors import UserError
from staff.selection import Coreset, Draws, ScorePool, SelectionMethod, check_range, run_method


@dataclass(frozen=True)
class RandomLength:
    """Draws as many samples of each answer length as the reference's coreset has, for the same seed and budget.

    The reference method is run and charged, so the overhead of this control is not to be compared with others.

    Attributes:
        reference: the method whose coreset sets the lengths; its own run with the same seed selects the same one.
        num_bins: number of intervals of answer length, with about equally many samples of the pool; lengths in the
            same interval count as equal. With more intervals the lengths match more closely, and more samples are
            necessarily in both coresets.
    """

    version: ClassVar[int] = 1

    reference: SelectionMethod
    num_bins: int = 20

    def __post_init__(self) -> None:
        check_range(self, "num_bins", 1, whole=True)
        if not hasattr(self.reference, "select"):
            raise UserError(f"method.reference={self.reference!r} is no method: set method@method.reference=staff.")

    def select(self, pool: ScorePool, budget: int, rng: Draws) -> Coreset:
        """The coreset of `budget` samples.

        Raises:
            UserError: a reference that ignores the budget, or that refuses the pool.
        """
        reference = run_method(self.reference, pool, budget, rng)
        if len(reference.indices) != budget:
            raise UserError(
                f"method.reference selects {len(reference.indices)} samples whatever the pruning rate: choose one "
                f"that selects {budget}."
            )
        lengths = np.asarray(pool.answer_lengths)
        edges = np.unique(np.quantile(lengths, np.linspace(0, 1, self.num_bins + 1)[1:-1]))
        bin_of = np.searchsorted(edges, lengths)
        bins, sizes = np.unique(bin_of, return_counts=True)
        members = [np.flatnonzero(bin_of == b) for b in bins]
        budgets = [int((bin_of[reference.indices] == b).sum()) for b in bins]
        # With the reference's purpose the draw would give the reference's samples again.
        picked = np.concatenate([rng.choose("length", m, count) for m, count in zip(members, budgets)])
        shared = np.intersect1d(picked, reference.indices)
        diagnostics = pd.DataFrame(
            {
                "low": [lengths[m].min() for m in members],
                "high": [lengths[m].max() for m in members],
                "size": sizes,
                "budget": budgets,
                "shared": [len(np.intersect1d(m, shared)) for m in members],
            }
        )
        return Coreset(picked, diagnostics, {"answer_length": lengths}, notes=reference.notes)
