"""EL2N, the error norm of the fine-tuned target (Paul et al., NeurIPS 2021, "Deep Learning on a Data Diet").

For language models it is the mean over the answer tokens of

    || softmax(logits) - onehot(token) ||_2
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from staff.selection import Coreset, Draws, ScorePool, check_choice, check_scores

VARIANTS = ("standard", "official")


def el2n_scores(pool: ScorePool, variant: str) -> np.ndarray:
    """EL2N of every sample on the target fine-tuned on the whole pool, shape (N,), float64.

    Args:
        variant: "standard"; or "official", what the STAFF authors' code computes instead: the root mean square of
            raw logits minus one-hot, without the shift by one token.

    Raises:
        UserError: a score that is not finite, by the sample's id.
    """
    return check_scores(pool.ask("el2n", of="target_tuned", variant=variant), pool.ids, "EL2N score")


@dataclass(frozen=True)
class EL2N:
    """Selects the samples with the highest EL2N.

    Attributes:
        variant: variant of EL2N, see `el2n_scores`.
    """

    version: ClassVar[int] = 1

    variant: str = "standard"

    def __post_init__(self) -> None:
        check_choice(self, "variant", VARIANTS)

    def select(self, pool: ScorePool, budget: int, rng: Draws) -> Coreset:
        """The coreset of `budget` samples.

        Raises:
            UserError: a score that is not finite, by the sample's id.
        """
        scores = el2n_scores(pool, self.variant)
        return Coreset(rng.highest_first(scores)[:budget], scores={"el2n": scores})
