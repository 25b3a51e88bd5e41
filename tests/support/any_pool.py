"""Pools that answer from arrays or drawn numbers, what every selection method keeps, and helpers of their tests."""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from staff.errors import UserError
from staff.selection import Coreset, Draws, SelectionMethod, run_method
from staff.signals import PAIRS, named, named_all

# ---------------------------------------------------------------- a pool that answers every question


EPOCHS, WIDTH, DEV_SIZE = 3, 8, 6
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
        shape += (WIDTH,) if signal in VECTORS else (len(self.ids),) if signal == "in_context_gain" else ()
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


def select(method: Any, pool: Any, budget: int, seed: int = 0) -> Coreset:
    return run_method(method, pool, budget, Draws(seed, pool.ids))


def chosen(method: Any, pool: Any, budget: int, seed: int = 0) -> set[str]:
    """The ids of the coreset."""
    return {pool.ids[i] for i in select(method, pool, budget, seed).indices}


# ---------------------------------------------------------------- what every method keeps


CONF = Path(__file__).resolve().parents[2] / "conf"


@cache
def configured(name: str) -> Any:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=[f"method={name}"]).method


@cache
def method_named(name: str) -> SelectionMethod:
    return instantiate(configured(name), _convert_="all")


METHODS = sorted(
    path.stem
    for path in (CONF / "method").glob("*.yaml")
    # These need a file that only a user has, a planted task, or answers that this stub does not give; their vectors
    # and test_methods.py watch them.
    if "\npath: null" not in path.read_text()
    and path.stem.split("_")[0] not in ("oracle", "data", "delift", "less")
)


class DrawnPool:
    """Answers every signal of every model with numbers of its own, and remembers what it was asked.

    Args:
        n: samples.
        constant: all answers are the same number.
        given: answers by name of the signal and model, whatever the options, in place of drawn ones.
    """

    def __init__(
        self,
        n: int,
        seed: int = 0,
        constant: bool = False,
        given: Mapping[tuple[str, str], np.ndarray] | None = None,
    ):
        self.ids = [f"sample {i}" for i in range(n)]
        self.answer_lengths = np.full(n, 9) if constant else np.random.default_rng(seed).integers(3, 60, n)
        self.groups = np.where(np.arange(n) % 5 == 0, "poem", "prose")
        self.dev_groups = np.resize(["poem", "prose"], DEV_SIZE)
        self.asked: list[tuple[Any, str, str]] = []
        self.bad: int | None = None  # the sample whose answers are NaN
        self.noise = 0.0  # a relative error of the answers
        self.given = dict(given or {})
        self._seed, self._constant = seed, constant
        self._order = np.arange(n)

    @property
    def lengths(self) -> np.ndarray:
        return 2 * self.answer_lengths + 5

    def ask(self, signal: Any, of: str, at: np.ndarray | None = None, view: str = "pool", **options: Any) -> Any:
        several = isinstance(signal, Sequence) and not isinstance(signal, str)
        answers = [self._answer(one, of, view) for one in named_all(signal if several else [signal], options)]
        answers = answers if at is None else [values[at] for values in answers]
        return answers if several else answers[0]

    def _answer(self, signal: Any, of: str, view: str) -> np.ndarray:
        self.asked.append((signal, of, view))
        if view != "pool":
            return self._drawn(signal, of, view, DEV_SIZE)
        given = self.given.get((signal.name, of))
        values = self._drawn(signal, of, view, len(self.ids)) if given is None else given
        values = values[self._order]
        if self.bad is not None:
            values[self.bad] = np.nan
        return values

    def _drawn(self, signal: Any, of: str, view: str, rows: int) -> np.ndarray:
        shape = (rows, *([EPOCHS] if of.endswith("@epochs") else []))
        vector = signal.shape(SimpleNamespace(hidden_size=WIDTH))
        if self._constant:
            return np.full((*shape, *vector), 0.5)
        rng = np.random.default_rng([self._seed, zlib.crc32(repr((signal, of, view)).encode())])
        values = rng.normal(size=(*shape, *vector)) if vector else rng.lognormal(0, 0.5, shape)
        return values * (1 + self.noise * rng.uniform(-1, 1, values.shape))

    def reordered(self, order: np.ndarray) -> DrawnPool:
        """The same samples in another order."""
        other = DrawnPool(len(order), self._seed, self._constant, self.given)
        other.ids, other._order = [self.ids[i] for i in order], self._order[order]
        other.answer_lengths, other.groups = self.answer_lengths[order], self.groups[order]
        return other


def expected_size(method: SelectionMethod, n: int, budget: int) -> int:
    return method.fixed_size(n) if hasattr(method, "fixed_size") else budget  # type: ignore[attr-defined]


def largest_budget(method: SelectionMethod, n: int) -> int:
    return n - int(getattr(method, "drop_hardest", 0) * n)


def selects_exactly_the_budget_of_distinct_samples(method: SelectionMethod, constant: bool = False) -> None:
    for n in (1, 2, 7, 150):
        pool, most = DrawnPool(n, constant=constant), largest_budget(method, n)
        for budget in sorted({1, (most + 1) // 2, most}):
            indices = select(method, pool, budget).indices
            assert len(indices) == expected_size(method, n, budget)
            assert (np.diff(indices) > 0).all() and set(indices) <= set(range(n))


def selects_by_seed_and_id_and_not_by_the_order_of_the_pool(
    method: SelectionMethod, constant: bool = False
) -> None:
    pool = DrawnPool(150, constant=constant)
    chosen = {pool.ids[i] for i in select(method, pool, 40).indices}
    assert {pool.ids[i] for i in select(method, pool, 40).indices} == chosen
    for order in (np.arange(150)[::-1], np.random.default_rng(5).permutation(150)):
        other = pool.reordered(order)
        assert {other.ids[i] for i in select(method, other, 40).indices} == chosen


def refuses_nan_by_the_name_of_the_sample(method: SelectionMethod) -> None:
    """A method that asks for scores does."""
    pool = DrawnPool(150)
    pool.bad = 31
    try:
        select(method, pool, 40)
    except UserError as error:
        assert "'sample 31' is nan" in str(error)
    else:
        assert not pool.asked


def refuses_a_budget_that_cannot_be_met(method: SelectionMethod) -> None:
    if hasattr(method, "fixed_size"):
        return
    for budget in (0, 151):
        with pytest.raises(UserError, match=f"a budget of {budget} samples"):
            select(method, DrawnPool(150), budget)


def reports_a_value_for_each_sample_and_what_can_be_saved(method: SelectionMethod) -> None:
    pool = DrawnPool(150)
    coreset = select(method, pool, 40)
    assert all(values.shape == (150,) for values in coreset.scores.values())
    with tempfile.TemporaryDirectory() as folder:
        coreset.save(Path(folder), pool.ids)
        assert Coreset.load(Path(folder)).diagnostics.equals(coreset.diagnostics)


OF_ANY_SCORES: tuple[Callable[[SelectionMethod, bool], None], ...] = (
    selects_exactly_the_budget_of_distinct_samples,
    selects_by_seed_and_id_and_not_by_the_order_of_the_pool,
)
"""Checks on scores that differ and on constant ones."""

OTHERS: tuple[Callable[[SelectionMethod], None], ...] = (
    refuses_nan_by_the_name_of_the_sample,
    refuses_a_budget_that_cannot_be_met,
    reports_a_value_for_each_sample_and_what_can_be_saved,
)
