"""A pool that answers every question from arrays, and what tests of selection methods share."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from staff.selection import Coreset, Draws, run_method
from staff.signals import PAIRS, named, named_all

EPOCHS, DIMENSIONS, DEV_SIZE = 3, 8, 6
VECTORS = ("embedding", "projected_gradient")


class AnyPool:
    """Answers what `given` holds, and any other question with numbers drawn by the question.

    Args:
        n: samples in the pool; their ids are "sample 0", "sample 1", ....
        given: answers by signal, or by "signal/view" for another view than the pool, whatever the model.
        constant: every drawn answer is 0.5, and all answers have the same length.
        answer_lengths, groups: of the samples.
        dev_groups: of the validation slice.
        learning_rates: of the epochs, whatever the model.

    Attributes:
        asked: signal, model, view and options of every question.
        bad_sample: this sample's answers are NaN.
    """

    def __init__(
        self,
        n: int,
        given: Mapping[str, np.ndarray] | None = None,
        *,
        constant: bool = False,
        answer_lengths: np.ndarray | None = None,
        groups: Sequence[str] | np.ndarray | None = None,
        dev_groups: np.ndarray | None = None,
        learning_rates: np.ndarray | None = None,
    ):
        self.ids = [f"sample {i}" for i in range(n)]
        self.given = dict(given or {})
        self.constant = constant
        drawn = np.full(n, 9) if constant else np.random.default_rng(n).integers(3, 60, n)
        self.answer_lengths = drawn if answer_lengths is None else answer_lengths
        self.groups = None if groups is None else np.asarray(groups)
        self.dev_groups = dev_groups
        self.rates = 1e-4 * np.arange(EPOCHS, 0, -1) if learning_rates is None else learning_rates
        self.bad_sample: int | None = None
        self.asked: list[tuple[str, str, str, dict[str, Any]]] = []
        self._order = np.arange(n)

    @property
    def lengths(self) -> np.ndarray:
        return 2 * self.answer_lengths + 5

    def epochs(self, of: str) -> int:
        return EPOCHS

    def learning_rates(self, of: str) -> np.ndarray:
        return self.rates

    def ask(self, signal: Any, of: str, at: np.ndarray | None = None, view: str = "pool", **options: Any) -> Any:
        if isinstance(signal, list):
            return [self.ask(each.name, of, at, view) for each in named_all(signal, options)]
        self.asked.append((signal, of, view, options))
        if signal == "in_context":
            return self._in_context(of, view, **options)
        if signal != PAIRS:
            named(signal, **options)  # refuses an option that the signal does not have
        values = self._answer(signal, of, view, options)
        return values if at is None else values[at]

    def reordered(self, order: np.ndarray) -> AnyPool:
        """The same samples in another order."""
        other = AnyPool(
            len(order),
            self.given,
            constant=self.constant,
            dev_groups=self.dev_groups,
            learning_rates=self.rates,
        )
        other.ids = [self.ids[i] for i in order]
        other.answer_lengths = self.answer_lengths[order]
        other.groups = None if self.groups is None else self.groups[order]
        other._order = self._order[order]
        return other

    def _answer(self, signal: str, of: str, view: str, options: dict[str, Any]) -> np.ndarray:
        key = signal if view == "pool" else f"{signal}/{view}"
        values = self.given[key] if key in self.given else self._drawn(signal, of, view, options)
        if signal == "in_context_gain":  # of every pair: the pool's order on both sides
            values = values[:, self._order]
        if view == "pool":
            values = values[self._order]
            if self.bad_sample is not None:
                values = np.array(values, dtype=float)
                values[self.bad_sample] = np.nan
        return values

    def _drawn(self, signal: str, of: str, view: str, options: dict[str, Any]) -> np.ndarray:
        shape: tuple[int, ...] = (len(self.ids) if view == "pool" else DEV_SIZE,)
        shape += (EPOCHS,) if of.endswith("@epochs") else ()
        shape += (DIMENSIONS,) if signal in VECTORS else (len(self.ids),) if signal == "in_context_gain" else ()
        if self.constant:
            return np.full(shape, 0.5)
        question = repr((signal, of, view, sorted(options.items())))
        rng = np.random.default_rng(zlib.crc32(question.encode()))
        return rng.normal(size=shape) if signal in VECTORS else rng.lognormal(0, 0.5, shape)

    def _in_context(
        self, of: str, view: str, demonstrations: np.ndarray, queries: np.ndarray, **options: Any
    ) -> np.ndarray:
        """Attention in proportion to a demonstration's loss, and as metric the probability of each query."""
        loss, metric = (self._answer(s, of, v, {}) for s, v in (("loss", "pool"), ("probability", view)))
        attention = np.where(demonstrations >= 0, loss[demonstrations], np.nan)
        return np.hstack([attention, np.where(queries >= 0, metric[queries % len(metric)], np.nan)])


def pool_of(n: int, constant: bool = False) -> AnyPool:
    """A pool of two groups, of which the smaller is a fifth, as is its validation slice."""
    groups = np.where(np.arange(n) % 5 == 0, "poem", "prose")
    return AnyPool(n, constant=constant, groups=groups, dev_groups=np.array(["poem", "prose"] * (DEV_SIZE // 2)))


def pool_where_short_answers_score_high(n: int = 400) -> AnyPool:
    lengths = np.random.default_rng(1).integers(5, 60, n)
    scores = 100.0 / lengths + 0.1 * np.random.default_rng(2).random(n)
    groups = np.where(np.random.default_rng(3).random(n) < 0.25, "poem", "prose")
    return AnyPool(n, {"effort": scores}, answer_lengths=lengths, groups=groups)


def select(method: Any, pool: Any, budget: int, seed: int = 0) -> Coreset:
    return run_method(method, pool, budget, Draws(seed, pool.ids))


def chosen(method: Any, pool: Any, budget: int, seed: int = 0) -> set[str]:
    """The ids of the coreset."""
    return {pool.ids[i] for i in select(method, pool, budget, seed).indices}


@dataclass(frozen=True)
class HighestEffort:
    """The plainest method that asks a model: a reference or an inner method for those that have one."""

    def select(self, pool: Any, budget: int, rng: Draws) -> Coreset:
        scores = np.asarray(pool.ask("effort", of="small"))
        return Coreset(rng.highest_first(scores)[:budget], scores={"effort": scores}, filled=1, notes=("a note",))
