"""Training dynamics: selection by what fine-tuning made of each sample from checkpoint to checkpoint.

Data maps (Swayamdipta et al., EMNLP 2020): over the checkpoints, the mean of a sample's probability is its
confidence and the standard deviation its variability. The paper selects the most variable, "ambiguous" samples.
Forgetting (Toneva et al., ICLR 2019): how often a sample that was right turns wrong; the most forgotten are kept,
and a sample that is never learnt counts as forgotten most. AUM (Pleiss et al., NeurIPS 2020): the mean margin of
the true label over its best rival; a low one marks a hard or mislabelled sample.

Each was made for a classifier. Here a sample has many tokens: its probability and margin are means over the tokens
of the answer, and right or wrong becomes the share of tokens predicted right, whose falls are summed. For a share
of 0 or 1 the sum is the published count.

The released codes differ. Data maps: `cartography_official` writes int(F N) + 1 samples. Forgetting: DeepCore
gives a never-learnt sample 0 events and drops it first (`statistic: forgetting_events`, preset
`forgetting_official`); Toneva's code counts it as T.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from staff.selection import Coreset, Draws, ScorePool, check_choice, check_scores


def forgetting_events(correct: np.ndarray) -> np.ndarray:
    """The falls between consecutive checkpoints, summed, (N,).

    Args:
        correct: the share of a sample predicted right at each checkpoint, (N, T).
    """
    return np.maximum(-np.diff(np.asarray(correct, dtype=np.float64), axis=1), 0).sum(axis=1)


def forgetting(correct: np.ndarray) -> np.ndarray:
    """`forgetting_events`, but T for a sample that is wrong at every checkpoint (Toneva et al., section 3)."""
    return np.where((correct == 0).all(axis=1), correct.shape[1], forgetting_events(correct))


def confidence(probability: np.ndarray) -> np.ndarray:
    return np.asarray(probability, dtype=np.float64).mean(axis=1)


def variability(probability: np.ndarray) -> np.ndarray:
    """The standard deviation over the checkpoints, with denominator T."""
    return np.asarray(probability, dtype=np.float64).std(axis=1)


def threshold_closeness(probability: np.ndarray) -> np.ndarray:
    """c (1 - c) of the confidence c."""
    return confidence(probability) * (1 - confidence(probability))


STATISTICS: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    "variability": ("probability", variability),
    "confidence": ("probability", confidence),
    "threshold_closeness": ("probability", threshold_closeness),
    "correctness": ("correct", confidence),
    "forgetting": ("correct", forgetting),
    "forgetting_events": ("correct", forgetting_events),
    "margin": ("margin", confidence),
}


@dataclass(frozen=True)
class Cartography:
    """The samples of the highest or lowest statistic of their training dynamics.

    Attributes:
        statistic: one of `STATISTICS`, computed from one signal at every checkpoint.
        keep: "highest" or "lowest".
        of: the model whose fine-tuning is followed.
    """

    version: ClassVar[int] = 1

    statistic: str = "variability"
    keep: str = "highest"
    of: str = "small"

    def __post_init__(self) -> None:
        check_choice(self, "statistic", tuple(STATISTICS))
        check_choice(self, "keep", ("highest", "lowest"))

    def select(self, pool: ScorePool, budget: int, rng: Draws) -> Coreset:
        """Raises UserError for a value that is not finite at any checkpoint, by the sample's id."""
        signal, statistic = STATISTICS[self.statistic]
        values = np.asarray(pool.ask(signal, of=f"{self.of}@epochs"))
        check_scores(np.abs(values).max(axis=1), pool.ids, f"{signal} at a checkpoint")
        scores = statistic(values)
        order = rng.highest_first(scores if self.keep == "highest" else -scores)
        notes: tuple[str, ...] = ()
        if values.shape[1] == 1 and self.statistic in ("variability", "forgetting", "forgetting_events"):
            notes = (f"{self.statistic} needs more than one checkpoint: set finetune.small_epochs above 1.",)
        return Coreset(order[:budget], scores={self.statistic: scores}, notes=notes)


# ---------------------------------------------------------------- as released


def training_dynamics_official(probability: np.ndarray, correct: np.ndarray) -> dict[str, np.ndarray]:
    """The metrics of allenai/cartography, each (N,); cut the arrays to the first epochs for its burn-out.

    `forgetfulness` is 1000 for a sample that is never right. `variability_ci` is its variant of the variability
    with `include_ci`, sqrt(v + v^2 / (T - 1)) of the variance v.

    Args:
        probability: of the true label, (N, T).
        correct: whether the prediction is right, (N, T).
    """
    variance = variability(probability) ** 2
    return {
        "confidence": confidence(probability),
        "variability": variability(probability),
        "variability_ci": np.sqrt(variance + variance**2 / (probability.shape[1] - 1)),
        "correctness": np.asarray(correct, dtype=bool).sum(axis=1),
        "forgetfulness": np.where(np.any(correct, axis=1), forgetting_events(correct), 1000).astype(np.int64),
        "threshold_closeness": threshold_closeness(probability),
    }


def cartography_official(values: np.ndarray, metric: str, fraction: float, ends: str = "best") -> np.ndarray:
    """The positions that allenai/cartography writes, in its order but for ties (its sort is not stable).

    "best": the first int(F N) + 1, ascending for confidence and correctness, else descending; "worst": the same
    from the other end; "both": 0.7 of int(F N) from the front, the rest from the end.
    """
    ascending = metric in ("confidence", "correctness")
    count = int(fraction * len(values))
    order = np.argsort(values if ascending else -values, kind="stable")
    if ends == "both":
        front = int(count * 0.7)
        return np.concatenate([order[:front], order[len(order) - (count - front) :]])
    return (order if ends == "best" else order[::-1])[: count + 1]


def learning_official(correct: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Toneva's presentations needed to learn (the last wrong epoch, from 1; 0 if none) and the first epoch, from
    0, at which a sample is right (NaN: never), both (N,).

    Args:
        correct: whether the prediction is right, (N, T).
    """
    correct = np.asarray(correct, dtype=bool)
    epochs = np.arange(correct.shape[1])
    needed = np.where(correct, 0, epochs + 1).max(axis=1)
    return needed, np.where(correct.any(axis=1), correct.argmax(axis=1), np.nan)


def forgetting_balanced_official(events: np.ndarray, labels: np.ndarray, fraction: float) -> np.ndarray:
    """DeepCore's positions with `balance`: the round(fraction n) most forgotten of each class; its ties are not
    stable, here the first of equals is taken."""
    picked = []
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        order = members[np.argsort(-events[members], kind="stable")]
        picked.append(order[: round(fraction * len(members))])
    return np.concatenate(picked)


def margins_official(logits: np.ndarray, targets: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """AUM's margins, (T, N) with NaN where a sample was not seen, and their mean over the epochs seen, (N,), NaN
    for a sample that was never seen.

    Args:
        logits: (T, N, C).
        targets: the given label, (N,).
        seen: whether the sample was seen in that epoch, (T, N).
    """
    logits = np.asarray(logits, dtype=np.float64)
    assigned = np.arange(logits.shape[2]) == np.asarray(targets)[:, None]
    own = logits[:, assigned]
    rival = np.where(assigned, -np.inf, logits).max(axis=2)
    margins = np.where(seen, own - rival, np.nan)
    times = np.sum(seen, axis=0)
    return margins, np.nansum(margins, axis=0) / np.where(times, times, np.nan)
