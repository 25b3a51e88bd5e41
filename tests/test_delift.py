"""DELIFT against recorded orders, distances and utilities."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.any_pool import AnyPool, chosen, pool_of, select
from support.golden import recorded

from baselines.delift import DELIFT, delift_official, distance_official, minmax, minmax_official, utility_official
from staff.errors import UserError

VECTORS = recorded("delift")
ORDERS, DISTANCES, KERNELS = (
    [case for case in VECTORS if case.startswith(f"delift_{name}")] for name in ("N", "distance", "kernel")
)


def pool_with(gains: np.ndarray, view: str = "pool") -> AnyPool:
    return AnyPool(gains.shape[1], {"in_context_gain" if view == "pool" else "in_context_gain/dev": gains})


@pytest.mark.parametrize("objective", ["fl", "mi", "cg"])
@pytest.mark.parametrize("case", ORDERS)
def test_orders_and_gains_are_those_of_the_released_code(case: str, objective: str):
    golden = VECTORS[case]
    for fraction in ("0.05", "0.3"):
        order, gains = delift_official(golden["utility"], float(fraction), objective, golden["private"])
        assert order.tolist() == golden[f"{objective}_order_{fraction}"].tolist()
        np.testing.assert_allclose(gains, golden[f"{objective}_gains_{fraction}"], atol=1e-6)


@pytest.mark.parametrize("case", ORDERS)
def test_the_official_preset_selects_the_recorded_samples(case: str):
    golden = VECTORS[case]
    recorded = golden["fl_order_0.3"]
    ours = select(DELIFT(gains="minmax"), pool_with(golden["utility"]), len(recorded))
    assert set(ours.indices) == set(recorded)


@pytest.mark.parametrize("case", DISTANCES)
def test_distances_are_those_of_the_released_code(case: str):
    golden = VECTORS[case]
    ours = distance_official(golden["logits"], golden["input_ids"], golden["token_type_ids"])
    np.testing.assert_allclose(ours, golden["distance"], atol=1e-6)


@pytest.mark.parametrize("case", KERNELS)
def test_utilities_are_those_of_the_released_code(case: str):
    golden = VECTORS[case]
    ours = utility_official(golden["distance_without"], golden["distance_with"], str(golden["kernel_type"]))
    np.testing.assert_allclose(ours, golden["utility"], atol=1e-6)


def test_a_constant_kernel_is_nan_as_released_and_zero_here():
    assert np.isnan(minmax_official(np.ones((2, 2)))).all() and (minmax(np.ones((2, 2))) == 0).all()


def test_who_helps_most_others_is_picked_first_and_harm_counts_as_nothing():
    gains = np.full((6, 6), -1.0)
    gains[:4, 2], gains[4:, 5], gains[0, 1] = 0.5, 0.4, 0.6
    coreset = select(DELIFT(), pool_with(gains), 3)
    assert coreset.indices.tolist() == [1, 2, 5]
    np.testing.assert_allclose(coreset.scores["gain"][[2, 5, 1]], [2, 0.8, 0.1], rtol=1e-6)
    more = select(DELIFT(), pool_with(gains), 5)
    assert more.filled == 2 and more.notes == ("2 samples add nothing to the others and were drawn at random.",)


def test_the_slice_alone_is_represented_if_asked_for():
    gains = np.zeros((2, 5))
    gains[0, 3], gains[1, 1] = 0.9, 0.2
    coreset = select(DELIFT(represent="slice"), pool_with(gains, "dev"), 2)
    assert coreset.indices.tolist() == [1, 3]


@settings(deadline=None, max_examples=30)
@given(n=st.integers(1, 40), constant=st.booleans(), seed=st.integers(0, 2**32), data=st.data())
def test_the_size_is_exact_and_the_order_of_the_pool_changes_nothing(
    n: int, constant: bool, seed: int, data: st.DataObject
):
    pool = pool_of(n, constant)
    budget = data.draw(st.integers(1, n))
    for method in (DELIFT(), DELIFT(gains="minmax")):
        ours = chosen(method, pool, budget)
        assert len(ours) == budget
        assert chosen(method, pool.reordered(np.random.default_rng(seed).permutation(n)), budget) == ours


def test_a_large_pool_is_refused_before_anything_is_asked_and_bad_gains_and_fields_by_name():
    pool = pool_of(30)
    with pytest.raises(
        UserError, match=r"method.max_pool=29, but the pool has 30 samples and DELIFT asks about every"
    ):
        select(DELIFT(max_pool=29), pool, 5)
    assert not pool.asked
    pool.bad_sample = 7
    with pytest.raises(UserError, match=r"the gain in context of sample 'sample 7' is nan"):
        select(DELIFT(), pool, 5)
    with pytest.raises(UserError, match=r"method.represent='dev' is unknown: choose pool or slice"):
        DELIFT(represent="dev")
    with pytest.raises(UserError, match=r"method.max_pool=0 must be a whole number of at least 1"):
        DELIFT(max_pool=0)
