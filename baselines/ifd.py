"""IFD, instruction-following difficulty: how little the prompt helps a model with the answer.

Cherry (Li et al., NAACL 2024, "From Quantity to Quality") divides the mean loss of the answer given the prompt
by the mean loss of the answer alone; Superfiltering (Li et al., ACL 2024) divides perplexities and asks a small
raw model. A ratio above 1 means that the prompt misleads: such samples are dropped. The rest is taken from the
highest ratio down.

The released code of both differs in what surrounds the ratio. Cherry conditions the answer alone on the words
"### Response:", where `pool.ask("loss", prompt=False)` has the answer alone, and its target has been fine-tuned
on a few samples before. It cuts at a maximum length and may keep a sample whose ratio became NaN; here a pool
holds no sample that was cut, and a NaN is refused. Superfiltering has no loss for the first token of an answer
alone, counts the rate from the 52,002 samples of Alpaca, and keeps a sample that failed with ratio 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from baselines.asks import MODELS
from staff.selection import Coreset, Draws, ScorePool, check_choice, check_range, check_scores

RATIOS = ("losses", "perplexities")


@dataclass(frozen=True)
class IFD:
    """Highest ratio first, among those up to the limit.

    Attributes:
        ratio: "losses" (Cherry) or "perplexities" (Superfiltering).
        of: the model that is asked.
        limit: samples above it are dropped; so are those at it for perplexities, as in the released code.
    """

    version: ClassVar[int] = 1

    ratio: str = "losses"
    of: str = "target"
    limit: float = 1.0

    def __post_init__(self) -> None:
        check_choice(self, "ratio", RATIOS)
        check_choice(self, "of", MODELS)
        check_range(self, "limit", 0)

    def select(self, pool: ScorePool, budget: int, rng: Draws) -> Coreset:
        """Raises UserError for a loss or a ratio that is not finite, by the sample's id. Where fewer samples than
        the budget are kept, those dropped with the lowest ratio fill it up."""
        given = check_scores(pool.ask("loss", of=self.of), pool.ids, "loss", minimum=0)
        alone = check_scores(
            pool.ask("loss", of=self.of, prompt=False), pool.ids, "loss without the prompt", minimum=0
        )
        scores = check_scores(difficulty(given, alone, self.ratio), pool.ids, "IFD")
        kept = is_kept(scores, self.ratio, self.limit)
        filled = max(0, budget - int(kept.sum()))
        notes = (f"{filled} samples above the limit fill the budget up, lowest IFD first.",) if filled else ()
        picked = rng.highest_first(preference(scores, kept))[:budget]
        return Coreset(
            picked, scores={"ifd": scores, "loss": given, "loss_alone": alone}, filled=filled, notes=notes
        )


def difficulty(given: np.ndarray, alone: np.ndarray, ratio: str) -> np.ndarray:
    """IFD (N,) from the mean losses of the answer given the prompt and of the answer alone; NaN for 0 / 0."""
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        return given / alone if ratio == "losses" else np.exp(given - alone)


def is_kept(scores: np.ndarray, ratio: str, limit: float) -> np.ndarray:
    """Whether a sample passes the limit: at most it for losses, below it for perplexities; never if NaN."""
    return scores <= limit if ratio == "losses" else scores < limit


def preference(scores: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """A key (N,) by which the highest comes first: the kept by descending score, then the others by ascending."""
    return np.where(kept, scores, -scores)
