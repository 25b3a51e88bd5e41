"""DELIFT: the samples that help most others as an example in context (Agarwal et al., ICLR 2025).

The gain of sample j for sample i is by how much the distance between the model's prediction and the answer of i
falls when j stands before it as an example. The coreset maximises facility location on these gains: each sample is
represented by the member that helps it most. A negative gain counts as 0, as in the paper.

There is an evaluation for every pair of samples, so that a large pool is refused. A pair is read as the example, a
blank line (in a chat: the end of the turn) and the sample; its distance is the root mean square of 1 - p over the
answer tokens, as released. The released code (DELIFT at b282b9f) min-max scales the gains, so that a harmful pair
still counts (`gains: minmax`, preset `delift_official`); of equal gains it takes the largest index, here a keyed
draw decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from baselines.asks import MODELS, slice_ids
from baselines.facility_location import greedy, lazy_greedy
from staff.errors import UserError
from staff.selection import Coreset, Draws, ScorePool, check_choice, check_range, check_scores


@dataclass(frozen=True)
class DELIFT:
    """Facility location on gains in context.

    The pool gives them as "in_context_gain" (`staff.scoring.in_context`): (N, N), or (M, N) for the validation
    slice, rows helped by columns.

    Attributes:
        of: the model whose predictions are compared.
        represent: "pool", every sample; "slice", the samples of the validation slice instead.
        gains: "positive", a negative one counts as 0; "minmax", scaled to [0, 1] as released.
        max_pool: a larger pool is refused; N samples take N^2 evaluations.
    """

    version: ClassVar[int] = 1

    of: str = "target"
    represent: str = "pool"
    gains: str = "positive"
    max_pool: int = 2000

    def __post_init__(self) -> None:
        check_choice(self, "of", MODELS)
        check_choice(self, "represent", ("pool", "slice"))
        check_choice(self, "gains", ("positive", "minmax"))
        check_range(self, "max_pool", 1, whole=True)

    def select(self, pool: ScorePool, budget: int, rng: Draws) -> Coreset:
        """Raises UserError for a pool above `max_pool`, and for a gain that is not finite, by the sample helped."""
        size = len(pool.ids)
        if size > self.max_pool:
            raise UserError(
                f"method.max_pool={self.max_pool}, but the pool has {size} samples and DELIFT asks about every "
                "pair: lower task.train_limit, or raise method.max_pool."
            )
        whole = self.represent == "pool"
        kernel = np.asarray(
            pool.ask("in_context_gain", of=self.of, view="pool" if whole else "dev"), dtype=np.float32
        )
        helped = pool.ids if whole else slice_ids(len(kernel))
        check_scores(np.abs(kernel).max(axis=1), helped, "the gain in context")
        # In an order drawn by id, ties and rounding fall alike in every order of the pool.
        order = np.argsort(rng.priorities("ties"))
        kernel = kernel[np.ix_(order, order)] if whole else kernel[:, order]
        kernel = np.maximum(kernel, 0) if self.gains == "positive" else minmax(kernel)
        picked, gained, _ = greedy(lambda rows, columns: kernel[np.ix_(rows, columns)], len(kernel), size, budget)
        gain = np.full(size, np.nan)
        gain[order[picked]] = gained
        useless = int((gained <= 0).sum())
        notes = (f"{useless} samples add nothing to the others and were drawn at random.",) if useless else ()
        return Coreset(order[picked], scores={"gain": gain}, filled=useless, notes=notes)


def minmax(values: np.ndarray) -> np.ndarray:
    """`values` scaled to [0, 1] in their own precision, then float32; 0 where all are equal."""
    low, high = values.min(), values.max()
    return ((values - low) / (high - low if high > low else 1)).astype(np.float32)


# ---------------------------------------------------------------- as released


def minmax_official(values: np.ndarray) -> np.ndarray:
    """`minmax`, but NaN where all values are equal."""
    constant = np.ptp(values) == 0
    return np.full(np.shape(values), np.nan, dtype=np.float32) if constant else minmax(values)


def delift_official(
    utility: np.ndarray, fraction: float, objective: str = "fl", private: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The order and the gains of the int(fraction N) samples that the released code selects.

    Args:
        utility: (N, N), rows helped by columns.
        objective: "fl", facility location; "mi", its mutual information with a target, the sum over i of
            min(max over the chosen, max over the target); "cg", its conditional gain over what is known already.
        private: the utility of the target or of what is known, (N, m), for "mi" and "cg".
    """
    kernel, budget = minmax_official(utility), int(fraction * len(utility))
    if objective == "fl" or private is None:
        return lazy_greedy(kernel, budget)
    best = minmax_official(private).max(axis=1)
    if objective == "mi":
        return lazy_greedy(np.minimum(kernel, best[:, None]), budget)
    return lazy_greedy(kernel, budget, coverage=best)


def distance_official(logits: np.ndarray, input_ids: np.ndarray, response: np.ndarray) -> np.ndarray:
    """||1 - p||_2 / sqrt(n) of the probabilities p of the n response tokens, (B,); 0 without a response.

    Args:
        logits: (B, L, V).
        input_ids: (B, L).
        response: whether a token belongs to the response, (B, L).
    """
    logits, tokens, counted = logits[:, :-1].astype(np.float64), input_ids[:, 1:], response[:, 1:].astype(bool)
    logits = logits - logits.max(axis=2, keepdims=True)
    chosen = np.take_along_axis(logits, tokens[:, :, None].astype(np.int64), axis=2)[:, :, 0]
    misses = 1 - np.exp(chosen) / np.exp(logits).sum(axis=2)
    return np.sqrt((misses**2 * counted).sum(axis=1) / np.maximum(counted.sum(axis=1), 1))


def utility_official(without: np.ndarray, with_example: np.ndarray, kernel: str = "euclidean") -> np.ndarray:
    """The released utility, (m, n): the distance without an example less that with it, min-max scaled.

    Args:
        without: the distance of each sample, (m,).
        with_example: of each sample after each example, (m, n).
        kernel: "euclidean", the difference; "exponential", its exponential.
    """
    gain = without.astype(np.float64)[:, None] - with_example
    return minmax_official(np.exp(gain) if kernel == "exponential" else gain)
