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

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from baselines.asks import Embedded, unit_rows
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
        sequence = ranked.T.ravel()
        _, first = np.unique(sequence, return_index=True)
        return sequence[np.sort(first)[:budget]]
    taken: dict[int, None] = {}
    looking = [map(int, row) for row in ranked]
    while len(taken) < budget:
        for positions in looking[: budget - len(taken)]:
            taken[next(position for position in positions if position not in taken)] = None
    return np.array(list(taken))
