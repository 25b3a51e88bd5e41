"""STAFF by the authors' code, against their vectors, and on efforts times a power of the answer's length."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import vectors
from scipy.stats import spearmanr
from support.any_pool import AnyPool, method_named, select

from baselines.staff_official import StaffOfficial, min_max
from staff import ArrayPool
from staff.errors import UserError
from staff.selection import Draws, run_method
from staff.signals.effort import Effort
from staff.speculative import Staff, fitted_exponent

# ---------------------------------------------------------------- the authors' code


VECTORS = vectors("staff")
OFFICIAL: Any = method_named("staff_official")


class Recorded(Draws):
    """Draws that fall as they did for the authors' code: the samples to verify, and those of the fill."""

    def __init__(self, ids: list[str], **recorded: np.ndarray):
        super().__init__(0, ids)
        self.recorded = recorded

    def choose(self, purpose: str, candidates: np.ndarray, count: int) -> np.ndarray:
        chosen = np.intersect1d(candidates, self.recorded[purpose])
        assert len(chosen) == count
        return chosen


@pytest.mark.parametrize("case", VECTORS)
def test_agrees_with_the_authors_code(case: str):
    golden = VECTORS[case]
    effort, ids = Effort(**OFFICIAL.effort_options()), [f"sample {i}" for i in range(len(golden["overall"]))]
    pool = ArrayPool(ids, {(effort, "small"): golden["overall"], (effort, "target"): golden["target"]})
    fill = golden["coreset"][golden["n_before_fill"] :]
    draws = Recorded(pool.ids, verification=golden["verify_idx"], fill=fill)
    # The recorded scores are min-max normalised already.
    method = replace(OFFICIAL, normalise=False)

    regions, members = method.regions(golden["overall"], draws.all_but_highest(golden["overall"], 0.1))
    region_of = np.full(len(pool.ids), -1)
    for region, positions in zip(regions, members):
        region_of[positions] = region
    np.testing.assert_array_equal(region_of, golden["region_of"])

    coreset = run_method(method, pool, len(golden["coreset"]), draws)
    assert coreset.indices.tolist() == sorted(golden["coreset"])
    assert coreset.filled == len(fill)
    table = coreset.diagnostics
    assert table["region"].tolist() == golden["order_region"].tolist()
    assert table["size"].tolist() == golden["order_sizes"].tolist()
    assert table["verified"].tolist() == golden["verify_count"].tolist()
    assert table["budget"].tolist() == golden["budgets"].tolist()
    np.testing.assert_allclose(table["ratio"], golden["V"], rtol=1e-6)


def test_all_vectors_are_there():
    assert len(VECTORS) == 12


# ---------------------------------------------------------------- a power of the length


N = 600
LENGTHS = np.random.default_rng(0).integers(5, 120, N).astype(float)
SMALL, TARGET = np.random.default_rng(1).lognormal(0, 0.4, (2, N))  # efforts that know nothing of lengths


def pool_with(small: float = 0.0, target: float = 0.0) -> ArrayPool:
    """Both models' efforts fall with the length by these exponents."""
    scores = {
        ("effort", "small"): SMALL * LENGTHS**-small,
        ("effort", "target"): TARGET * LENGTHS**-target,
    }
    return ArrayPool([f"sample {i}" for i in range(N)], scores, LENGTHS)


@pytest.mark.parametrize("exponent", [0.5, 1])
@pytest.mark.parametrize("method", [Staff, StaffOfficial])
def test_a_power_that_undoes_the_fall_selects_as_if_there_had_been_none(method: Any, exponent: float):
    plain = select(method(), pool_with(), 60)
    undone = select(method(length_exponent=exponent), pool_with(exponent, exponent), 60)
    assert undone.indices.tolist() == plain.indices.tolist()
    np.testing.assert_allclose(undone.scores["speculative"], plain.scores["speculative"], rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(undone.scores["verified"], plain.scores["verified"], rtol=1e-6, atol=1e-12)


def test_fitted_each_model_has_an_exponent_of_its_own_and_lengths_no_longer_tell():
    pool = pool_with(small=0.5, target=0.8)
    plain, fitted = select(Staff(), pool, 60), select(Staff(length_exponent="fit"), pool, 60)
    assert abs(spearmanr(plain.scores["speculative"], LENGTHS)[0]) > 0.5
    assert abs(spearmanr(fitted.scores["speculative"], LENGTHS)[0]) < 0.05
    small, target = (float(note.split("L^")[1].split(",")[0]) for note in fitted.notes)
    assert small == pytest.approx(0.5, abs=0.05) and target == pytest.approx(0.8, abs=0.15)
    verified = np.isfinite(fitted.scores["verified"])
    raw = TARGET[verified] * LENGTHS[verified] ** -0.8
    expected = raw * LENGTHS[verified] ** fitted_exponent(raw, LENGTHS[verified])  # by the verified samples alone
    np.testing.assert_allclose(fitted.scores["verified"][verified], expected)


def test_the_exponent_is_minus_the_slope_in_logarithms_in_whatever_order_and_zero_where_there_is_none():
    lengths, scores = LENGTHS, SMALL * LENGTHS**-0.3
    exponent = fitted_exponent(scores, lengths)
    assert exponent == pytest.approx(-np.polyfit(np.log(lengths), np.log(scores), 1)[0])
    order = np.random.default_rng(2).permutation(N)
    assert fitted_exponent(scores[order], lengths[order]) == exponent
    scores[:9], scores[9:20] = 0, np.nan
    assert fitted_exponent(scores, lengths) == fitted_exponent(scores[20:], lengths[20:])
    for lost in (np.zeros(3), np.full(3, np.nan), np.array([0, 2.0, 0])):
        assert fitted_exponent(lost, np.array([1.0, 2, 3])) == 0
    assert fitted_exponent(np.array([1.0, 2]), np.array([7.0, 7])) == 0


def test_released_scores_are_normalised_after_they_are_multiplied():
    chosen = select(StaffOfficial(length_exponent=1), pool_with(), 60)
    np.testing.assert_allclose(chosen.scores["speculative"], min_max(SMALL * LENGTHS))
    np.testing.assert_allclose(chosen.scores["verified"], min_max(TARGET * LENGTHS))


def test_random_regions_multiply_the_targets_scores_alone():
    chosen = select(Staff(speculation="none", length_exponent=1), pool_with(), 60)
    verified = np.isfinite(chosen.scores["verified"])
    np.testing.assert_allclose(chosen.scores["verified"][verified], (TARGET * LENGTHS)[verified])
    assert chosen.scores["speculative"].max() < 1


def test_without_an_exponent_no_length_is_asked():
    pool = ArrayPool([f"{i}" for i in range(N)], {("effort", "small"): SMALL, ("effort", "target"): TARGET})
    assert len(select(Staff(), pool, 60).indices) == 60
    with pytest.raises(UserError, match="the pool has no answer_lengths"):
        select(Staff(length_exponent=0.5), pool, 60)


def test_scores_that_are_constant_or_of_one_length_are_ordinary_input():
    for pool in (AnyPool(80, constant=True), AnyPool(80, answer_lengths=np.full(80, 12))):
        for exponent in (0.5, "fit"):
            assert len(select(Staff(length_exponent=exponent), pool, 20).indices) == 20


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("fitted", "method.length_exponent='fitted' must be fit or a number"),
        (-1, "method.length_exponent=-1 must be a number of at least 0 and at most 2"),
        (True, "method.length_exponent=True must be a number"),
    ],
)
def test_an_exponent_that_is_none_is_refused(value: Any, said: str):
    with pytest.raises(UserError, match=said):
        Staff(length_exponent=value)
