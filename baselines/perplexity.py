"""Perplexity of the raw target: the samples that a model finds hardest, easiest, or neither.

Perplexity is the exponential of the mean loss, so samples are ranked by the loss itself. Three releases call
three things "perplexity": the highest loss over all tokens of the text (automated-instruction-selection, Ivison
et al., 2025, `ppl_selections.py`, "top"); a window of the descending list that starts at rank floor(0.33 N)
(the same file, "mid"); and the lowest perplexity (CCDS, Yin and Rush, 2025, where both "top" and "mid" keep the
lowest m of a shuffled file and differ in its order alone).

Released code differs from the default in two ways, both in `perplexity_official`: the loss covers prompt and
answer, and the middle window starts at floor(0.33 N). That window may end before it has m samples. `select`
then moves it up, so that its size is always exact.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from baselines.asks import MODELS, WHICH, take
from staff.selection import Coreset, Draws, ScorePool, check_choice, check_range, check_scores

TEXTS = ("answer", "all")


@dataclass(frozen=True)
class Perplexity:
    """Samples by the rank of their loss.

    Attributes:
        which: "top" for the highest perplexity, "low" for the lowest, "middle" for a window of ranks between.
        text: "answer", the loss of the answer given the prompt; "all", of every token of the text.
        middle_start: the share of the pool with a higher perplexity than the middle window, at most as large as the
            budget allows; None centres the window on the median. The released code has 0.33.
        of: the model that is asked.
    """

    version: ClassVar[int] = 1

    which: str = "top"
    text: str = "answer"
    middle_start: float | None = None
    of: str = "target"

    def __post_init__(self) -> None:
        check_choice(self, "which", WHICH)
        check_choice(self, "text", TEXTS)
        check_choice(self, "of", MODELS)
        if self.middle_start is not None:
            check_range(self, "middle_start", 0, 1)

    def select(self, pool: ScorePool, budget: int, rng: Draws) -> Coreset:
        """Raises UserError for a loss that is not finite, by the sample's id."""
        loss = check_scores(pool.ask("loss", of=self.of, text=self.text), pool.ids, "loss")
        if self.which != "middle" or self.middle_start is None:
            return Coreset(take(loss, self.which, budget, rng), scores={"loss": loss})
        order = rng.highest_first(loss)
        window = window_from(order, self.middle_start, budget)
        above = order[len(order) - budget : len(order) - len(window)]
        notes = ("the window was moved up: it would have ended past the lowest perplexity.",) if len(above) else ()
        picked = np.concatenate([above, window])
        return Coreset(picked, scores={"loss": loss}, filled=len(above), notes=notes)


def window_from(order: np.ndarray, start: float, budget: int) -> np.ndarray:
    """`budget` entries of `order` from rank int(start N) on; fewer where the list ends before."""
    first = int(start * len(order))
    return order[first : first + budget]


# ---------------------------------------------------------------- as released


def ccds_official(perplexity: np.ndarray, share: float, seed: int, which: str = "top") -> np.ndarray:
    """Positions in the order in which CCDS writes them.

    The int(share N) lowest, ascending, are cut into thirds at int(0.333 m) and int(0.666 m). Each is shuffled, the
    middle one first, and "top" begins with the first third, "mid" with the middle one.
    """
    ascending = np.argsort(perplexity, kind="stable")[: int(share * len(perplexity))].tolist()
    cuts = int(0.333 * len(ascending)), int(0.666 * len(ascending))
    first, middle, last = ascending[: cuts[0]], ascending[cuts[0] : cuts[1]], ascending[cuts[1] :]
    draws = random.Random(seed)
    for third in (middle, first, last):
        draws.shuffle(third)
    return np.array(first + middle + last if which == "top" else middle + first + last, dtype=np.int64)
