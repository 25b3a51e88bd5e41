"""What every selection method keeps, as checks that take a method, and the pool that they ask."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from staff.errors import UserError
from staff.pool import ROLES, ArrayPool
from staff.selection import Coreset, Draws, SelectionMethod, run_method

CONF = Path(__file__).resolve().parents[1] / "conf"
METHODS = sorted({path.stem for path in (CONF / "method").glob("*.yaml")} - {"precomputed"})  # which needs a file
SIGNALS = ("effort", "el2n", "loss")


@cache
def method_named(name: str) -> SelectionMethod:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return instantiate(compose("config", overrides=[f"method={name}"]).method, _convert_="all")


class AnyPool(ArrayPool):
    """Answers every signal of every model role, and remembers whether it was asked."""

    def __init__(self, n: int, seed: int = 0, constant: bool = False):
        rng = np.random.default_rng(seed)
        keys = [(signal, role) for role in ROLES for signal in (*SIGNALS, "embedding")]
        shapes = [(n, 8) if signal == "embedding" else n for signal, _ in keys]
        values = [np.full(shape, 0.5) if constant else rng.lognormal(0, 0.5, shape) for shape in shapes]
        lengths = np.full(n, 9) if constant else rng.integers(3, 60, n)
        super().__init__([f"sample {i}" for i in range(n)], dict(zip(keys, values)), lengths)
        self.asked = False

    def scores(self, signal: str, model: str, indices: np.ndarray | None = None, **options: Any) -> np.ndarray:
        self.asked = True
        return super().scores(signal, model, indices, **options)

    def reordered(self, order: np.ndarray) -> ArrayPool:
        scores = {key: values[order] for key, values in self._scores.items()}
        return ArrayPool([self.ids[i] for i in order], scores, self.answer_lengths[order])


def select(method: SelectionMethod, pool: ArrayPool, budget: int, seed: int = 0) -> Coreset:
    return run_method(method, pool, budget, Draws(seed, pool.ids))


def expected_size(method: SelectionMethod, n: int, budget: int) -> int:
    return method.fixed_size(n) if hasattr(method, "fixed_size") else budget  # type: ignore[attr-defined]


def largest_budget(method: SelectionMethod, n: int) -> int:
    return n - int(getattr(method, "drop_hardest", 0) * n)


def selects_exactly_the_budget_of_distinct_samples(method: SelectionMethod, constant: bool = False) -> None:
    for n in (1, 2, 7, 150):
        pool, most = AnyPool(n, constant=constant), largest_budget(method, n)
        for budget in sorted({1, (most + 1) // 2, most}):
            indices = select(method, pool, budget).indices
            assert len(indices) == expected_size(method, n, budget)
            assert (np.diff(indices) > 0).all() and set(indices) <= set(range(n))


def selects_by_seed_and_id_and_not_by_the_order_of_the_pool(
    method: SelectionMethod, constant: bool = False
) -> None:
    pool = AnyPool(150, constant=constant)
    chosen = {pool.ids[i] for i in select(method, pool, 40).indices}
    assert {pool.ids[i] for i in select(method, pool, 40).indices} == chosen
    for order in (np.arange(150)[::-1], np.random.default_rng(5).permutation(150)):
        other = pool.reordered(order)
        assert {other.ids[i] for i in select(method, other, 40).indices} == chosen


def refuses_nan_by_the_name_of_the_sample(method: SelectionMethod) -> None:
    """A method that asks for scores does."""
    pool = AnyPool(150)
    for values in pool._scores.values():
        values[31] = np.nan
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
            select(method, AnyPool(150), budget)


def reports_a_value_for_each_sample_and_what_can_be_saved(method: SelectionMethod) -> None:
    pool = AnyPool(150)
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
