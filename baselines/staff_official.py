"""STAFF as in the authors' released code, for exact comparisons.

Differences from the paper, each a field or a method here:

- Scores are min-max normalised over the pool, separately for both models. So the target scores every sample, and no
  overhead is saved.
- The highest-scored tenth is dropped.
- Regions have float32 edges. A sample above the last edge belongs to no region.
- Regions of b_v or fewer samples are not verified and get an equal share of the budget.
- Inside a region the highest-scored samples come first.
- The rest of the budget is drawn uniformly.
- After fine-tuning, the small model's adapters on q_proj and v_proj are re-initialised, with rank 81 and alpha 16.
  This is an accident of the released code, which `fresh_adapter` reproduces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from staff.errors import UserError
from staff.regions import equal_width_edges, serving_order, share_out, stratify
from staff.selection import Draws, ScorePool, check_range
from staff.speculative import Staff


@dataclass(frozen=True)
class StaffOfficial(Staff):
    """`Staff` with the additional fields that reproduce the released code.

    Attributes:
        verification_fraction: verify int(fraction x size) samples of a region instead of b_v. The released code's
            option `verify_sample_rate` means a tenth, whatever its value. None: b_v, in regions with more samples.
        normalise: whether to min-max normalise the scores of both models over the pool.
        fresh_adapter: {rank, alpha, targets} of a new adapter for both models, in place of that of fine-tuning.
    """

    verification_fraction: float | None = None
    normalise: bool = True
    fresh_adapter: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.verification_fraction is not None:
            check_range(self, "verification_fraction", 0, 1)
        if self.fresh_adapter is not None and set(self.fresh_adapter) != {"rank", "alpha", "targets"}:
            raise UserError(f"method.fresh_adapter={self.fresh_adapter} must have rank, alpha and targets.")
        if self.fresh_adapter is not None and (self.scores != "pass" or self.gradient == "all_linear"):
            raise UserError(
                f"method.fresh_adapter is a LoRA adapter for a scoring pass: leave it out with "
                f"scores={self.scores} and gradient={self.gradient}."
            )

    def scored(self, pool: ScorePool, model: str, probes: Sequence[np.ndarray] | None = None) -> np.ndarray:
        return super().scored(pool, model, None if self.normalise else probes)

    def rescaled(self, scores: np.ndarray, pool: ScorePool, name: str) -> tuple[np.ndarray, tuple[str, ...]]:
        scores, notes = super().rescaled(scores, pool, name)
        if not self.normalise:
            return scores, notes
        constant = (f"the {name} scores are constant: taken as 1.",) if scores.min() == scores.max() else ()
        return min_max(scores), notes + constant

    def effort_options(self) -> dict[str, Any]:
        return {"parameters": self.gradient, "fresh_adapter": self.fresh_adapter}

    def regions(self, speculative: np.ndarray, eligible: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        scores = speculative[eligible].astype(np.float32)
        edges = equal_width_edges(scores.min(), scores.max(), self.num_regions, "float32")
        return serving_order(stratify(scores, edges), eligible)

    def probes(self, members: list[np.ndarray], rng: Draws) -> list[np.ndarray]:
        if self.verification_fraction is None:
            most = 0 if self.speculation == "target" else self.verification_budget
            counts = [most if len(m) > most else 0 for m in members]
        else:
            counts = [int(len(m) * self.verification_fraction) for m in members]
        return [rng.choose("verification", m, count) for m, count in zip(members, counts)]

    def budgets(self, sizes: np.ndarray, ratios: np.ndarray, budget: int) -> tuple[np.ndarray, int]:
        """The budgets after one pass over the regions, which can sum to less than `budget`, and no fill."""
        return share_out(budget, sizes, *self.shares(ratios)), 0


def min_max(scores: np.ndarray) -> np.ndarray:
    """Scores scaled to [0, 1] over the pool; constant scores become 1."""
    low, high = scores.min(), scores.max()
    return (scores - low) / (high - low) if high > low else np.ones_like(scores)
