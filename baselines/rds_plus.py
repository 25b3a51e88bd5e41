"""RDS+, representation-based data selection (Ivison et al., 2025, "Large-Scale Data Selection for Instruction
Tuning"): the samples that lie nearest to those of the validation slice.

A sample is the mean of the raw target's last hidden states over all its tokens, token t weighted by t, and the
score of a sample for a query is their cosine. The queries are the samples of the slice. They take turns, and
each takes the best sample that is left. Where the slice is drawn from the same task as the pool, nearness to it
says how typical a sample is.

In the released code (`get_top_influences.py`) a query whose next sample has been taken loses its turn
(`rds_plus_official`); by default it goes on to its next one. The released code for large pools
(`get_top_optimized.py`) takes the highest maximum over queries instead, which is `aggregate: max` here. Its
default method, "min", takes the least similar samples. An embedding of norm 0 makes its similarities NaN; here
they are 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from baselines.asks import Embedded, unit_rows
from staff.errors import UserError
from staff.selection import Coreset, Draws, ScorePool, check_choice

AGGREGATES = ("round_robin", "max", "mean", "normalised_mean")
BLOCK_QUERIES = 64  # 26 MB of similarities at N = 100,000


@dataclass(frozen=True, kw_only=True)
class RDSPlus(Embedded):
    """Samples most like the validation slice.

    Attributes:
        aggregate: "round_robin" over the queries; or the highest "max", "mean" or "normalised_mean" over them, the
            last with each query's similarities scaled to [0, 1].
        lose_turn: in the round robin, a query whose next sample has been taken waits for the next round.
    """

    version: ClassVar[int] = 1

    pooling: str = "position_weighted"
    aggregate: str = "round_robin"
    lose_turn: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "aggregate", AGGREGATES)

    def select(self, pool: ScorePool, budget: int, rng: Draws) -> Coreset:
        """Raises UserError for an embedding that is not finite, by the sample's id, and for a pool without a
        validation slice."""
        queries = unit_rows(self.slice_embeddings(pool))
        points = unit_rows(self.embeddings(pool))
        # Columns lie in an order drawn by id and sorts are stable: ties fall alike in every order of the pool.
        order = np.argsort(rng.priorities("ties"))
        points = points[order]
        best, total, ranked = np.full(len(points), -np.inf), np.zeros(len(points)), []
        for start in range(0, len(queries), BLOCK_QUERIES):
            similarities = queries[start : start + BLOCK_QUERIES] @ points.T
            best = np.maximum(best, similarities.max(0))
            if self.aggregate == "round_robin":
                ranked.append(best_first(similarities, budget))
            total += (scaled(similarities) if self.aggregate == "normalised_mean" else similarities).sum(0)
        if self.aggregate == "round_robin":
            picked = take_turns(np.concatenate(ranked), budget, self.lose_turn)
        else:
            picked = best_first(best if self.aggregate == "max" else total, budget)
        similarity = np.empty(len(points))
        similarity[order] = best
        return Coreset(order[picked], scores={"highest_similarity": similarity})


def best_first(scores: np.ndarray, depth: int) -> np.ndarray:
    """Positions of the `depth` highest along the last axis, int32; equal scores by position."""
    return np.argsort(-scores, axis=-1, kind="stable")[..., :depth].astype(np.int32)


def scaled(similarities: np.ndarray) -> np.ndarray:
    """Each row of (Q, N) over [0, 1]; a constant row becomes 0."""
    low, high = similarities.min(1, keepdims=True), similarities.max(1, keepdims=True)
    return (similarities - low) / np.where(high > low, high - low, 1)


def take_turns(ranked: np.ndarray, budget: int, lose_turn: bool) -> np.ndarray:
    """Positions in the order in which the queries take them, (budget,).

    Args:
        ranked: each query's positions, best first, (Q, at least budget): no query looks further.
        budget: at most the number of positions.
        lose_turn: a query whose next position has been taken takes none in that round.
    """
    if lose_turn:
        return _first_of_each(ranked.T.ravel())[:budget]
    taken: dict[int, None] = {}
    looking = [map(int, row) for row in ranked]
    while len(taken) < budget:
        for positions in looking[: budget - len(taken)]:
            taken[next(position for position in positions if position not in taken)] = None
    return np.array(list(taken))


def _first_of_each(sequence: np.ndarray) -> np.ndarray:
    """`sequence` without repetitions."""
    return sequence[np.sort(np.unique(sequence, return_index=True)[1])]


# ---------------------------------------------------------------- as released

REDUCTIONS = {"max": np.max, "min": np.min, "mean": np.mean, "normalized_mean": np.mean}
"""Over the queries of a task."""


def select_official(scores: np.ndarray, budget: int, method: str) -> np.ndarray:
    """Positions in the order in which `get_top_influences.py` and `get_top_optimized.py` write them.

    "max" and "min": queries take turns, and one whose next sample has been taken loses its turn; "min" passes over
    infinite scores. "mean_max" and "normalized_mean_max" come in ascending order, the highest last; "mean_min" and
    "normalized_mean_min" are the lowest. "optimized_pkl" and "optimized_json" are the highest maxima, where equal
    ones are ordered by position, in JSON by its decimal text.

    Args:
        scores: of each query for each sample, (Q, N); the released code divides by zero for a constant query of
            "normalized_mean", here it is 0 for every sample.

    Raises:
        UserError: by turns, a budget above the number of samples, with which the released code fails.
    """
    if method in ("max", "min"):
        ranked = np.argsort(-scores if method == "max" else scores, axis=1, kind="stable")
        usable = np.isfinite(np.take_along_axis(scores, ranked, 1)) | (method == "max")
        return _in_turns(ranked, budget, usable)
    if method.startswith("optimized"):
        best = scores.max(axis=0)
        by_text = np.argsort(np.arange(len(best)).astype(str), kind="stable")
        ties = np.argsort(by_text) if method == "optimized_json" else np.arange(len(best))
        return np.lexsort((ties, -best))[:budget]
    reduced, _, end = method.rpartition("_")
    values = (scaled(scores.astype(np.float64)) if reduced == "normalized_mean" else scores).mean(
        axis=0, dtype=float
    )
    ascending = np.argsort(values, kind="stable")
    return ascending[-budget:] if end == "max" else ascending[:budget]


def select_multi_task_official(
    scores: Sequence[np.ndarray], budget: int, method: str, aggregate: str = "round_robin"
) -> np.ndarray:
    """Positions in the order in which `get_top_aggregated_influences.py` writes them.

    Each task's scores are reduced over its queries. "round_robin": tasks take turns as queries do; those that are
    reduced by "max" take the highest, by anything else the lowest. "mean_maximize": the highest mean over tasks.

    Args:
        scores: of each task, (queries, N).
        method: "max", "min" or "mean" over queries; "normalized_mean" is overwritten by "mean" there.
    """
    reduced = np.stack([REDUCTIONS[method](task.astype(np.float64), axis=0) for task in scores])
    if aggregate == "mean_maximize":
        return best_first(reduced.mean(axis=0), budget)
    ranked = np.argsort(-reduced if method == "max" else reduced, axis=1, kind="stable")
    return _in_turns(ranked, budget, np.ones(ranked.shape, dtype=bool))


def _in_turns(ranked: np.ndarray, budget: int, usable: np.ndarray) -> np.ndarray:
    if budget > ranked.shape[1]:
        raise UserError(
            f"a budget of {budget} is more than the {ranked.shape[1]} samples to select from: lower it."
        )
    return _first_of_each(ranked.T[usable.T])[:budget]
