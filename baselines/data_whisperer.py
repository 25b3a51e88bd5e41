"""Data Whisperer: the samples that help most as demonstrations in context (Wang et al., ACL 2025).

The raw target answers queries after a few demonstrations. Each demonstration is credited with the metric of an
answer times its share of the attention that the answer pays, and a sample's score is the mean of its credits over
queries. In each of several rounds every sample of the pool is a demonstration once, in a new random order. Queries
come from the validation slice, or each half of the pool is queried after demonstrations of the other.

The released code (commit 4e59bf6) goes through the file once, in its order. Its result depends on the order of the
pool, so it is no preset here; `plan_official` and `aggregate_official` follow it. It scales the attention to add up
to 1 within an evaluation, so that the few samples of a short last one score up to b times too high; here the share
is relative to that of equal attention. A sample that was never evaluated scores 0 there and is refused here. Its
offsets overlook the begin token (`attention_mass_official`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from baselines.asks import MODELS
from staff.selection import Coreset, Draws, ScorePool, check_choice, check_range, check_scores


@dataclass(frozen=True)
class DataWhisperer:
    """The samples of the highest in-context score.

    It asks the pool for E evaluations at once: `ask("in_context", of, view=, demonstrations=, queries=)` takes
    positions in the pool, (E, b), -1 for none, and numbers of queries, (E, q), -1 for none, whose remainder by the
    size of the view is the position there. It gives the attention on a demonstration per token and the metric of
    each answer, (E, b + q), NaN where an evaluation failed or there is none.

    `staff.pool.Pool` gives every query a prompt of its own; the released code asks all of an evaluation in one and
    parses the answers out of one text. The attention is the mean over the queries.

    Attributes:
        of: the model that answers.
        queries_from: "slice", or "folds": the other half of the pool.
        demonstrations: in one evaluation.
        queries: in one evaluation.
        rounds: how often each sample is a demonstration.
        metric: of an answer, a name as in `task.metrics`.
        layer: the block whose attention counts, from 0; None: the one at two fifths of the depth.
    """

    version: ClassVar[int] = 1

    of: str = "target"
    queries_from: str = "slice"
    demonstrations: int = 5
    queries: int = 3
    rounds: int = 3
    metric: str = "rougeL"
    layer: int | None = None

    def __post_init__(self) -> None:
        check_choice(self, "of", MODELS)
        check_choice(self, "queries_from", ("slice", "folds"))
        for name in ("demonstrations", "queries", "rounds"):
            check_range(self, name, 1, whole=True)

    def select(self, pool: ScorePool, budget: int, rng: Draws) -> Coreset:
        """Raises UserError for a sample whose every evaluation failed, by its id."""
        demonstrations, queries = self.plan(len(pool.ids), rng)
        view = "dev" if self.queries_from == "slice" else "pool"
        asked = {"demonstrations": demonstrations, "queries": queries, "metric": self.metric, "layer": self.layer}
        answers = np.asarray(pool.ask("in_context", of=self.of, view=view, **asked), dtype=np.float64)
        attention, metrics = np.split(answers, [self.demonstrations], axis=1)
        scores = aggregate(demonstrations, attention, metrics, len(pool.ids))
        scores = check_scores(scores, pool.ids, "the in-context score")
        notes = () if scores.any() else ("no answer in context scores above 0: the samples were drawn at random.",)
        return Coreset(rng.highest_first(scores)[:budget], scores={"in_context": scores}, notes=notes)

    def plan(self, size: int, rng: Draws) -> tuple[np.ndarray, np.ndarray]:
        """Demonstrations, (E, b), and queries, (E, q), of all rounds, as `ask` takes them."""
        demonstrations, queries = [], []
        for number in range(self.rounds):
            order = np.argsort(rng.priorities(f"round {number}"))
            if self.queries_from == "slice":
                runs = in_runs(order, self.demonstrations)
                asked = (
                    np.arange(len(runs) * self.queries).reshape(len(runs), -1) + number * len(runs) * self.queries
                )
                demonstrations.append(runs)
                queries.append(asked)
                continue
            halves = np.array_split(order, 2)
            for shown, asked in (halves, halves[::-1]):
                runs = in_runs(shown, self.demonstrations)
                demonstrations.append(runs)
                queries.append(_in_turn(in_runs(asked, self.queries), len(runs)))
        return np.concatenate(demonstrations), np.concatenate(queries)


def in_runs(positions: np.ndarray, length: int) -> np.ndarray:
    """`positions` in consecutive runs of `length`, (runs, length), the last one filled with -1."""
    runs = np.full((-(-len(positions) // length), length), -1)
    runs.ravel()[: len(positions)] = positions
    return runs


def _in_turn(batches: np.ndarray, count: int) -> np.ndarray:
    """The batches of queries one after the other and again from the first, (count, q); -1 if there are none."""
    if not len(batches):
        return np.full((count, batches.shape[1]), -1)
    return batches[np.arange(count) % len(batches)]


def aggregate(demonstrations: np.ndarray, attention: np.ndarray, metrics: np.ndarray, size: int) -> np.ndarray:
    """The mean over queries of the metric times the share of attention, relative to an equal one, (size,); NaN for
    a sample without an evaluation.

    An evaluation whose attention is not finite is left out; attention of 0 throughout counts as equal.

    Args:
        demonstrations: positions of each evaluation, (E, b), -1 for none.
        attention: per token of each demonstration, (E, b).
        metrics: of the queries, (E, q), NaN for none.
    """
    shown = demonstrations >= 0
    attention = np.where(shown, attention, 0)
    usable = np.all(np.isfinite(attention) & (attention >= 0), axis=1)
    attention = np.where(usable[:, None], attention, 0)
    count = shown.sum(axis=1, keepdims=True)
    total = attention.sum(axis=1, keepdims=True)
    relative = np.where(total > 0, count * attention / np.where(total > 0, total, 1), 1.0)
    queries = np.isfinite(metrics).sum(axis=1, keepdims=True) * usable[:, None]
    credit = relative * np.where(np.isfinite(metrics), metrics, 0).sum(axis=1, keepdims=True) * usable[:, None]
    at = demonstrations[shown]
    credits = np.bincount(at, weights=credit[shown], minlength=size)
    counts = np.bincount(at, weights=np.broadcast_to(queries, shown.shape)[shown], minlength=size)
    with np.errstate(invalid="ignore"):
        return np.where(counts > 0, credits / counts, np.nan)


# ---------------------------------------------------------------- as released


def plan_official(
    size: int, slice_size: int, demonstrations: int = 5, queries: int = 3, folds: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """The evaluations of the released code, (E, b) and (E, q), -1 for none: consecutive runs in the order of the
    file, each with the next batch of queries.

    `folds`: two halves by scikit-learn's `KFold(2, shuffle=True, random_state=42)`, each in the order of the file.
    """
    parts = [(np.arange(size), np.arange(slice_size))]
    if folds:
        shuffled = np.arange(size)
        np.random.RandomState(42).shuffle(shuffled)
        first, second = (np.sort(half) for half in np.array_split(shuffled, 2))
        parts = [(second, first), (first, second)]
    runs = [in_runs(shown, demonstrations) for shown, _ in parts]
    asked = [_in_turn(in_runs(held, queries), len(run)) for run, (_, held) in zip(runs, parts)]
    return np.concatenate(runs), np.concatenate(asked)


def aggregate_official(
    demonstrations: np.ndarray, attention: np.ndarray, metrics: np.ndarray, failed: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Each sample's score, (size,), float16, and the number of its queries, (size,), as released: every step is
    rounded to float16, and a sample without an evaluation scores 0.

    Args:
        failed: whether an evaluation is left out, (E,).
    """
    half = np.float16
    scores, counts = np.zeros(size, half), np.zeros(size, dtype=np.int64)
    for e in np.flatnonzero(~failed):
        shown = demonstrations[e] >= 0
        at, weights = demonstrations[e][shown], attention[e][shown].astype(half)
        weights = weights / half(weights.sum())
        for metric in metrics[e][~np.isnan(metrics[e])].astype(half):
            scores[at] += weights * metric
            counts[at] += 1
    return scores / np.maximum(counts, 1).astype(half), counts


def attention_mass_official(
    attention: np.ndarray, mask: np.ndarray, instruction: int, demonstrations: np.ndarray, response: int
) -> np.ndarray:
    """The attention of the response on each demonstration per token of both, (B, b), in float16.

    Positions are counted from the first token that is not padding, as if there were no begin token, so that rows
    and columns lie one before those meant.

    Args:
        attention: summed over heads, (B, L, L), padded on the left.
        mask: 1 where a token is no padding, (B, L).
        instruction: tokens of the instruction.
        demonstrations: tokens of each demonstration, (B, b).
        response: tokens of the response.
    """
    mass = np.zeros(demonstrations.shape, np.float16)
    for b, lengths in enumerate(demonstrations):
        starts = attention.shape[1] - int(mask[b].sum()) + instruction + np.r_[0, np.cumsum(lengths)]
        rows = slice(starts[-1], starts[-1] + response)
        for i, length in enumerate(lengths):
            total = attention[b, rows, starts[i] : starts[i + 1]].sum(dtype=np.float32)
            mass[b, i] = np.float16(total) / np.float16(length * response)
    return mass
