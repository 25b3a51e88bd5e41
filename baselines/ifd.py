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


# ---------------------------------------------------------------- as released


def cherry_official(scores: np.ndarray, kept: np.ndarray, count: int) -> np.ndarray:
    """Cherry's selection, ascending: the last `count` of the samples kept, by IFD and position.

    The count is int(rate x samples kept), or a number; 0 selects all of them. The released code also keeps a sample
    that was cut and has a ratio of NaN, which compares as neither lower nor higher: the order is that of Python's
    sort.

    Args:
        scores: IFD, (N,).
        kept: whether a sample was not dropped, (N,).
    """
    order = sorted(np.flatnonzero(kept).tolist(), key=lambda i: float(scores[i]))
    return np.sort(order[-count:])


def vicuna_official(scores: np.ndarray, count: int) -> np.ndarray:
    """The selection of Cherry's scripts for Vicuna: the `count` highest kept, in this order; int(rate N) of all."""
    kept = np.flatnonzero(is_kept(scores, "losses", 1.0))
    return kept[np.argsort(-scores[kept], kind="stable")[:count]]


def superfiltering_rate_official(scores: np.ndarray, rate: float, limit: float = 1.0) -> np.ndarray:
    """Superfiltering's selection, highest first: int(52002 rate) of the samples below `limit`."""
    kept = np.flatnonzero(is_kept(scores, "perplexities", limit))
    return kept[np.argsort(-scores[kept], kind="stable")[: int(52002 * rate)]]


def pre_experience_official(
    labels: np.ndarray, perplexity: np.ndarray, count: int = 10, low: float = 1, high: float = 99
) -> np.ndarray:
    """What Cherry's model sees before it scores: of each cluster, evenly spread samples of middling perplexity.

    A cluster of fewer than `count` is taken whole. Of the others, those within two percentiles of their perplexity,
    every floor(n / count)-th of n, at most `count`, in the order of the file.

    Args:
        labels: the cluster of each sample, (N,), from 0.
        perplexity: of the prompt, (N,).
        low: percentile, linear, inclusive; the released script has 25 and 75.
    """
    picked = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        if len(members) >= count:
            at_least, at_most = np.percentile(perplexity[members], [low, high])
            members = members[(perplexity[members] >= at_least) & (perplexity[members] <= at_most)]
            members = members[:: max(len(members) // count, 1)][:count]
        picked.append(members)
    return np.concatenate(picked)
