"""A pool whose answers are arrays."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from staff.errors import UserError
from staff.selection import Coreset, Draws, check_budget

DEV = 6  # samples of the validation slice


class StubPool:
    """Answers `ask` from arrays by (signal, model, view), and remembers what was asked with which options."""

    def __init__(
        self,
        ids: list[str],
        answers: Mapping[tuple[str, str, str], np.ndarray],
        lengths: np.ndarray | None = None,
        groups: np.ndarray | None = None,
        dev_groups: np.ndarray | None = None,
    ):
        self.ids, self.answers, self.groups, self.dev_groups = ids, dict(answers), groups, dev_groups
        self.answer_lengths = np.ones(len(ids), dtype=np.int64) if lengths is None else lengths
        self.lengths = 2 * self.answer_lengths + 5
        self.asked: list[tuple[Any, str, str, dict[str, Any]]] = []

    def ask(self, signal: Any, of: str, at: np.ndarray | None = None, view: str = "pool", **options: Any) -> Any:
        if isinstance(signal, list | tuple):
            return [self.ask(one, of, at, view, **options) for one in signal]
        self.asked.append((signal, of, view, options))
        if signal == "in_context":
            return self._in_context(of, view, **options)
        if (signal, of, view) not in self.answers:
            raise UserError(f"the pool has no {signal!r} of {of!r} for {view!r}.")
        values = self.answers[signal, of, view]
        return values if at is None else values[at]

    def _in_context(self, of: str, view: str, demonstrations: np.ndarray, queries: np.ndarray) -> np.ndarray:
        """Attention in proportion to a sample's loss, and as metric the probability of each query."""
        loss, metric = self.answers["loss", of, "pool"], self.answers["probability", of, view]
        attention = np.where(demonstrations >= 0, loss[demonstrations], np.nan)
        return np.hstack([attention, np.where(queries >= 0, metric[queries % len(metric)], np.nan)])

    def reordered(self, order: np.ndarray) -> StubPool:
        answers = {key: v[order] if key[2] == "pool" else v for key, v in self.answers.items()}
        # A matrix of pairs has the pool's order on both sides.
        pairs = {key: v[:, order] for key, v in answers.items() if key[0] == "in_context_gain"}
        groups = None if self.groups is None else self.groups[order]
        ids = [self.ids[i] for i in order]
        return StubPool(ids, {**answers, **pairs}, self.answer_lengths[order], groups, self.dev_groups)


def pool_of(n: int, seed: int = 0, constant: bool = False) -> StubPool:
    """A pool that answers every signal of these methods, with two groups; its scores differ, or are constant."""
    rng = np.random.default_rng(seed)

    def values(*shape: int) -> np.ndarray:
        return np.full(shape, 0.5) if constant else rng.random(shape)

    answers: dict[tuple[str, str, str], np.ndarray] = {}
    for of in ("small", "target", "target_tuned", "small_raw"):
        for view, count in (("pool", n), ("dev", DEV)):
            for signal in ("loss", "el2n", "effort", "margin", "probability", "correct"):
                answers[signal, of, view] = values(count)
                answers[signal, f"{of}@epochs", view] = values(count, 3)
            answers["embedding", of, view] = values(count, 8) - 0.3
            answers["projected_gradient", f"{of}@epochs", view] = values(count, 3, 8) - 0.3
    if n <= 1000:
        answers["in_context_gain", "target", "pool"] = values(n, n) - 0.5
    lengths = np.full(n, 9) if constant else rng.integers(3, 60, n)
    groups = np.where(np.arange(n) % 5 == 0, "poem", "prose")
    ids = [f"sample {i}" for i in range(n)]
    return StubPool(ids, answers, lengths, groups, np.array(["poem", "prose"] * (DEV // 2)))


def select(method: Any, pool: Any, budget: int, seed: int = 0) -> Coreset:
    return method.select(pool, budget, Draws(seed, pool.ids))


def chosen(method: Any, pool: Any, budget: int, seed: int = 0) -> set[str]:
    """The ids of the coreset."""
    return {pool.ids[i] for i in select(method, pool, budget, seed).indices}


@dataclass(frozen=True)
class HighestEffort:
    """The plainest method that asks a model: a reference or an inner method for those that have one."""

    def select(self, pool: Any, budget: int, rng: Draws) -> Coreset:
        check_budget(budget, len(pool.ids))
        scores = np.asarray(pool.ask("effort", of="small"))
        return Coreset(rng.highest_first(scores)[:budget], scores={"effort": scores}, filled=1, notes=("a note",))


def pool_where_short_answers_score_high(n: int = 400) -> StubPool:
    lengths = np.random.default_rng(1).integers(5, 60, n)
    scores = 100.0 / lengths + 0.1 * np.random.default_rng(2).random(n)
    groups = np.where(np.random.default_rng(3).random(n) < 0.25, "poem", "prose")
    return StubPool([f"sample {i}" for i in range(n)], {("effort", "small", "pool"): scores}, lengths, groups)
