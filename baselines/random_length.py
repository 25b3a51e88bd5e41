"""Random with matched lengths: is a coreset worth more than the lengths of its answers?

A short answer has a larger gradient of its mean loss, so a method that goes by effort chooses, in part, by length,
and a coreset with longer or shorter answers fine-tunes differently whatever else is in it. This control draws at
random among all coresets whose answers are as long as those of a reference method's coreset: what the reference
gains over it is gained by more than length, and what it gains over `random` beyond that is length.
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
    """Uniform, given how many answers of each length the reference's coreset of the same seed and budget has.

    The reference is carried out, and charged: in overhead this is a control, not a rival.

    Attributes:
        reference: the method whose coreset sets the lengths; its own run with the same seed selects the same one.
        num_bins: intervals of answer length with about equally many samples of the pool, within which lengths count
            as equal. The more there are, the closer the lengths, and the more samples are shared by necessity.
    """

    version: ClassVar[int] = 1

    reference: SelectionMethod
    num_bins: int = 20

    def __post_init__(self) -> None:
        check_range(self, "num_bins", 1, whole=True)
        if not hasattr(self.reference, "select"):
            raise UserError(f"method.reference={self.reference!r} is no method: set method@method.reference=staff.")

    def select(self, pool: ScorePool, budget: int, rng: Draws) -> Coreset:
        """Raises UserError for what the reference refuses, and for one that does not keep to the budget."""
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
        # A purpose of its own: under the reference's it would find the reference's samples again.
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
