"""CCS, coverage-centric coreset selection (Zheng et al., ICLR 2023).

The hardest samples are dropped, and the rest is stratified by score. The budget is divided equally among the
strata, smallest first, so that what a small stratum cannot take is left for larger ones. Samples are drawn
uniformly inside a stratum. STAFF has the same structure with unequal shares.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd

from baselines.el2n import VARIANTS, el2n_scores
from staff.draws import left_after_dropping
from staff.regions import equal_width_edges, regions_left, serving_order, share_out, stratify
from staff.selection import Coreset, Draws, ScorePool, check_budget, check_choice, check_range


@dataclass(frozen=True)
class CCS:
    """Coverage-centric selection by EL2N on the target fine-tuned on the whole pool.

    Attributes:
        num_strata: the number of strata of equal score width (the paper: 50).
        beta: fraction of highest-scored samples to drop first. The paper tunes it for every pruning rate; the STAFF
            authors' code has 0.
        variant: variant of EL2N, see `baselines.el2n.el2n_scores`.
    """

    version: ClassVar[int] = 1

    num_strata: int = 50
    beta: float = 0.0
    variant: str = "standard"

    def __post_init__(self) -> None:
        check_range(self, "num_strata", 1, whole=True)
        check_range(self, "beta", 0, 0.99)
        check_choice(self, "variant", VARIANTS)

    def select(self, pool: ScorePool, budget: int, rng: Draws) -> Coreset:
        """The coreset of `budget` samples.

        Raises:
            UserError: a score that is not finite, by the sample's id, or a budget above the number of samples that
                `beta` leaves.
        """
        check_budget(budget, left_after_dropping(self.beta, len(pool.ids)))
        scores = el2n_scores(pool, self.variant)
        eligible = rng.all_but_highest(scores, self.beta)
        strata, members = self.strata(scores, eligible)
        sizes = np.array([len(m) for m in members])
        budgets = share_out(budget, sizes, np.ones(len(sizes)), regions_left(len(sizes)))
        picked = [rng.choose("pick", m, count) for m, count in zip(members, budgets)]
        diagnostics = pd.DataFrame(
            {
                "stratum": strata,
                "low": [scores[m].min() for m in members],
                "high": [scores[m].max() for m in members],
                "size": sizes,
                "budget": budgets,
            }
        )
        return Coreset(np.concatenate(picked), diagnostics, {"el2n": scores})

    def strata(self, scores: np.ndarray, eligible: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """The non-empty strata in serving order, and their members (positions in the pool)."""
        low, high = scores[eligible].min(), scores[eligible].max()
        # 1.0001 max, as in the released code; for maxima that are not positive too, it is above the highest score.
        high += max(1e-4 * abs(high), np.finfo(np.float64).tiny)
        edges = equal_width_edges(low, high, self.num_strata)
        return serving_order(stratify(scores[eligible], edges, upper_closed=False), eligible)
