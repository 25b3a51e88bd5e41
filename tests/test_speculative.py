"""STAFF as a selection method on any input, and its ablations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.any_pool import method_named

from baselines.ccs import CCS
from staff import ArrayPool
from staff.errors import UserError
from staff.selection import Coreset, Draws, run_method
from staff.signals.effort import Effort
from staff.speculative import Staff

PRESETS: dict[str, Any] = {name: method_named(name) for name in ("staff", "staff_paper", "staff_official")}
EFFORTS = [Effort(**preset.effort_options()) for preset in PRESETS.values()]
ABLATIONS: dict[str, Staff] = {
    "random regions": Staff(speculation="none"),
    "target's own scores": Staff(speculation="target"),
}


def pool_of(small: np.ndarray, target: np.ndarray, ids: list[str] | None = None) -> ArrayPool:
    ids = ids or [f"sample {i}" for i in range(len(small))]
    scores = {"small": small, "target": target}
    return ArrayPool(ids, {(effort, model): values for effort in EFFORTS for model, values in scores.items()})


class Asked(ArrayPool):
    """Remembers who was asked for what, and of how many samples."""

    def __init__(self, scores: dict[tuple[str, str], np.ndarray]):
        super().__init__([f"{i}" for i in range(len(next(iter(scores.values()))))], scores)
        self.log: list[tuple[Any, str, int]] = []

    def ask(self, signal: Any, of: str, at: np.ndarray | None = None, view: str = "pool", **options: Any) -> Any:
        self.log.append((signal, of, len(self.ids) if at is None else len(at)))
        return super().ask(signal, of, at, view, **options)


def select(method: Staff, pool: ArrayPool, budget: int, seed: int = 0) -> Coreset:
    return run_method(method, pool, budget, Draws(seed, pool.ids))


# ---------------------------------------------------------------- any input

magnitudes = st.sampled_from([1e-6, 1.0, 1e6])


@st.composite
def cases(draw: st.DrawFn) -> dict[str, Any]:
    """Scores of both models and a budget: smooth and heavy-tailed distributions, ties, constants, outliers."""
    n = draw(st.integers(1, 80))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))

    def scores() -> np.ndarray:
        kind = draw(st.sampled_from(["uniform", "lognormal", "bimodal", "ties", "constant", "zeros", "outliers"]))
        values = {
            "uniform": rng.random(n),
            "lognormal": rng.lognormal(0, 2, n),
            "bimodal": np.where(rng.random(n) < 0.3, 1, 8) + 0.1 * rng.random(n),
            "ties": rng.integers(0, 4, n).astype(float),
            "constant": np.full(n, 2.5),
            "zeros": np.zeros(n),
            "outliers": rng.random(n) + 1e9 * (rng.random(n) < 0.05),
        }[kind]
        return values * draw(magnitudes)

    return {
        "small": scores(),
        "target": scores(),
        "budget": draw(st.integers(1, n)),
        "num_regions": draw(st.sampled_from([1, 2, 3, 10, 50, 200])),
        "verification_budget": draw(st.sampled_from([0, 1, 3, 10])),
        "seed": draw(st.integers(0, 9)),
    }


def method_of(preset: str, case: dict[str, Any]) -> Staff:
    fields = {name: case[name] for name in ("num_regions", "verification_budget")}
    return replace((PRESETS | ABLATIONS)[preset], **fields)


def eligible_count(preset: str, n: int) -> int:
    return n - n // 10 if preset == "staff_official" else n


@pytest.mark.parametrize("preset", [*PRESETS, *ABLATIONS])
@settings(max_examples=150)
@given(case=cases())
def test_exactly_m_distinct_samples_are_selected_whatever_the_scores(preset: str, case: dict[str, Any]):
    n = len(case["small"])
    budget = min(case["budget"], eligible_count(preset, n))
    pool = pool_of(case["small"], case["target"])
    coreset = select(method_of(preset, case), pool, budget, case["seed"])

    assert coreset.indices.dtype == np.int64 and len(coreset.indices) == budget
    assert (np.diff(coreset.indices) > 0).all() and coreset.indices[0] >= 0 and coreset.indices[-1] < n
    table = coreset.diagnostics
    assert (table["budget"] <= table["size"]).all() and (table["size"] > 0).all()
    assert (table["picked"] <= table["size"]).all() and (np.diff(table["size"]) >= 0).all()
    assert 0 <= coreset.filled <= budget
    if preset == "staff":
        assert coreset.filled == 0
    if preset != "staff_official":
        assert (table["picked"] == table["budget"]).all() and table["budget"].sum() == budget
        assert np.isfinite(coreset.scores["verified"]).sum() == table["verified"].sum()


@pytest.mark.parametrize("preset", [*PRESETS, *ABLATIONS])
@settings(max_examples=60)
@given(case=cases(), shuffle=st.integers(0, 99))
def test_same_seed_selects_the_same_samples_in_whatever_order_the_pool_comes(
    preset: str, case: dict[str, Any], shuffle: int
):
    n = len(case["small"])
    budget = min(case["budget"], eligible_count(preset, n))
    method, pool = method_of(preset, case), pool_of(case["small"], case["target"])
    chosen = [pool.ids[i] for i in select(method, pool, budget, case["seed"]).indices]
    assert chosen == [pool.ids[i] for i in select(method, pool, budget, case["seed"]).indices]

    order = np.random.default_rng(shuffle).permutation(n)
    shuffled = pool_of(case["small"][order], case["target"][order], [pool.ids[i] for i in order])
    again = select(method, shuffled, budget, case["seed"])
    assert {shuffled.ids[i] for i in again.indices} == set(chosen)


def test_another_seed_selects_other_samples():
    rng = np.random.default_rng(0)
    pool = pool_of(rng.random(200), rng.random(200))
    assert set(select(Staff(), pool, 40, 0).indices) != set(select(Staff(), pool, 40, 1).indices)


@settings(max_examples=60)
@given(case=cases())
def test_official_never_selects_its_dropped_tenth_and_refuses_a_budget_above_the_rest(case: dict[str, Any]):
    pool = pool_of(case["small"], case["target"])
    method, n = method_of("staff_official", case), len(case["small"])
    eligible = eligible_count("staff_official", n)
    coreset = select(method, pool, eligible, case["seed"])
    dropped = np.setdiff1d(np.arange(n), coreset.indices)
    assert len(dropped) == n // 10
    if len(dropped):
        assert case["small"][dropped].min() >= case["small"][coreset.indices].max()
        with pytest.raises(UserError, match=f"{n} samples cannot be met: {eligible} are eligible"):
            select(method, pool, n, case["seed"])


@settings(max_examples=60)
@given(case=cases())
def test_without_verification_the_target_is_not_asked_and_the_budgets_are_those_of_ccs(case: dict[str, Any]):
    pool = ArrayPool([f"{i}" for i in range(len(case["small"]))], {("effort", "small"): case["small"]})
    table = select(Staff(case["num_regions"], verification_budget=0), pool, case["budget"]).diagnostics
    left = case["budget"]
    for served, (size, budget) in enumerate(zip(table["size"], table["budget"])):
        assert budget == min(size, left // (len(table) - served))
        left -= budget


def test_without_verification_staff_is_ccs_on_the_same_scores():
    scores = np.random.default_rng(0).lognormal(size=500)
    pool = ArrayPool([f"{i}" for i in range(500)], {("effort", "small"): scores, ("el2n", "target_tuned"): scores})
    staff = select(Staff(verification_budget=0), pool, 100)
    ccs = run_method(CCS(), pool, 100, Draws(0, pool.ids))
    assert abs(len(staff.diagnostics) - len(ccs.diagnostics)) <= 2  # 1.0001 max, and edges closed below
    assert len(np.intersect1d(staff.indices, ccs.indices)) > 90


# ---------------------------------------------------------------- the method itself


def test_a_region_where_the_target_finds_more_effort_than_the_small_model_gets_more():
    small = np.concatenate([np.linspace(0, 1, 100), np.linspace(9, 10, 100)])
    for favoured in (0, 1):
        target = small * np.where((small > 5) == favoured, 3, 1)
        table = select(Staff(num_regions=2), pool_of(small, target), 80).diagnostics
        assert dict(zip(table["region"], table["budget"]))[favoured] == 60


def test_the_papers_formula_depends_on_the_scale_of_the_targets_gradients_and_the_default_does_not():
    rng = np.random.default_rng(0)
    small, target = rng.lognormal(size=300), rng.lognormal(size=300)

    def budgets(rule: str, scale: float) -> list[int]:
        method = Staff(num_regions=20, budget_rule=rule)
        return select(method, pool_of(small, scale * target), 60).diagnostics["budget"].tolist()

    assert budgets("share", 1) == budgets("share", 0.125) == budgets("share", 8)
    assert budgets("ratio", 1) != budgets("ratio", 8)


def test_the_target_scores_nothing_but_the_verified_samples():
    small = np.random.default_rng(0).random(500)
    pool = Asked({("effort", "small"): small, ("effort", "target"): small})
    coreset = select(Staff(num_regions=10, verification_budget=3), pool, 50)
    assert pool.log == [("effort", "small", 500), ("effort", "target", 30)]
    assert np.isfinite(coreset.scores["verified"]).sum() == coreset.diagnostics["verified"].sum() == 30


def test_the_highest_scored_of_a_region_come_first_where_that_is_asked_for():
    small = np.arange(100.0)
    coreset = select(Staff(num_regions=2, pick="highest"), pool_of(small, small), 20)
    assert coreset.indices.tolist() == [*range(40, 50), *range(90, 100)]


# ---------------------------------------------------------------- ablations


def test_random_regions_do_without_the_small_model_and_share_out_by_the_targets_mean_score():
    target = np.random.default_rng(0).lognormal(size=400)
    pool = Asked({("effort", "target"): target})
    coreset = select(Staff(num_regions=8, speculation="none"), pool, 80)
    assert pool.log == [("effort", "target", 80)]
    table = coreset.diagnostics
    probes = np.isfinite(coreset.scores["verified"])
    region = np.searchsorted(table.sort_values("low")["low"], coreset.scores["speculative"][probes], "right") - 1
    means = [target[probes][region == i].mean() for i in range(8)]
    np.testing.assert_allclose(table.sort_values("low")["ratio"], means)
    assert abs(np.corrcoef(coreset.scores["speculative"], target)[0, 1]) < 0.2
    other = select(Staff(num_regions=8, speculation="none"), pool, 80, seed=1)
    assert (other.scores["speculative"] != coreset.scores["speculative"]).all()


def test_the_targets_own_scores_are_not_verified_and_select_as_a_small_model_that_scores_the_same():
    scores = np.random.default_rng(0).lognormal(size=400)
    pool = Asked({("effort", "target"): scores})
    own = select(Staff(speculation="target"), pool, 80)
    assert pool.log == [("effort", "target", 400)]
    verified = select(Staff(), pool_of(scores, scores, pool.ids), 80)
    assert own.indices.tolist() == verified.indices.tolist() and (verified.diagnostics["ratio"] == 1).all()


@pytest.mark.parametrize("signal", ["el2n", "loss", "perplexity"])
def test_another_scoring_function_is_asked_of_both_models(signal: str):
    rng, asked = np.random.default_rng(0), "loss" if signal == "perplexity" else signal
    small, target = rng.random(300), rng.random(300)
    pool = Asked({(asked, "small"): small, (asked, "target"): target})
    coreset = select(Staff(num_regions=5, verification_budget=4, signal=signal), pool, 60)
    assert pool.log == [(asked, "small", 300), (asked, "target", 20)]
    expected = np.exp(small) if signal == "perplexity" else small
    np.testing.assert_array_equal(coreset.scores["speculative"], expected)


@pytest.mark.parametrize("field", [{"signal": "loss"}, {"speculation": "target"}, {"gradient": "all_linear"}])
def test_scores_online_are_the_small_models_effort_and_nothing_else(field: dict[str, Any]):
    for scores in ("online", "one_epoch"):
        with pytest.raises(UserError, match=f"method.scores={scores}"):
            Staff(scores=scores, **field)


@pytest.mark.parametrize(("value", "said"), [(np.nan, "nan"), (-0.5, "-0.5"), (np.inf, "inf")])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_score_that_is_negative_or_not_finite_is_refused_by_name(preset: str, value: float, said: str):
    good, bad = np.linspace(1, 2, 20), np.linspace(1, 2, 20)
    bad[7] = value
    method = replace(PRESETS[preset], num_regions=1, verification_budget=19)
    with pytest.raises(UserError, match=f"speculative score of sample 'sample 7' is {said}"):
        select(method, pool_of(bad, good), 5)
    everywhere = np.full(20, value)
    with pytest.raises(UserError, match=f"target's score of sample 'sample [0-9]+' is {said}"):
        select(method, pool_of(good, everywhere), 5)


def test_undefined_ratios_count_as_one_and_are_noted():
    zeros, ones = np.zeros(50), np.ones(50)
    undefined = select(Staff(), pool_of(zeros, ones), 10)
    assert undefined.diagnostics["ratio"].tolist() == [1.0] and "zero sum" in undefined.notes[0]
    all_zero = select(Staff(num_regions=5), pool_of(np.linspace(1, 2, 50), zeros), 10)
    assert set(all_zero.diagnostics["ratio"]) == {1.0} and "all verification ratios are zero" in all_zero.notes[0]
    constant = select(PRESETS["staff_official"], pool_of(ones, ones), 10)
    assert constant.diagnostics["ratio"].tolist() == [1.0]
    assert sum("constant" in note for note in constant.notes) == 2
    assert select(Staff(), pool_of(ones, ones), 10).notes == ()


@pytest.mark.parametrize(
    "field",
    [
        {"num_regions": 0},
        {"num_regions": 2.5},
        {"verification_budget": -1},
        {"drop_hardest": 1.0},
        {"budget_rule": "fair"},
        {"pick": "lowest"},
        {"gradient": "all"},
        {"signal": "length"},
        {"speculation": "large"},
        {"scores": "twice"},
    ],
    ids=lambda field: next(iter(field)),
)
def test_a_hyper_parameter_out_of_range_is_refused_with_field_and_value(field: dict[str, Any]):
    name, value = next(iter(field.items()))
    with pytest.raises(UserError, match=f"method.{name}={value!r}"):
        Staff(**field)


@pytest.mark.parametrize("budget", [0, -1, 21])
def test_a_budget_that_cannot_be_met_is_refused(budget: int):
    with pytest.raises(UserError, match=f"a budget of {budget} samples cannot be met: 20 are eligible"):
        select(Staff(), pool_of(np.ones(20), np.ones(20)), budget)
