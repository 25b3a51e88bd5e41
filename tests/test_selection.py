"""Budgets, draws and regions: what every selection method rests on."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from staff import ArrayPool
from staff.errors import UserError
from staff.regions import equal_width_edges, regions_left, serving_order, share_out, shares_of_ratio, stratify
from staff.selection import (
    Coreset,
    Draws,
    ScorePool,
    budget_for,
    check_scores,
    run_method,
    run_method_for_tokens,
)
from staff.signals.effort import Effort
from staff.signals.el2n import EL2N
from staff.speculative import Staff

IDS = [f"sample {i}" for i in range(1000)]


# ---------------------------------------------------------------- the budget


@pytest.mark.parametrize(
    ("rate", "pool", "kept"),
    [(0.9, 1000, 100), (0.8, 10, 2), (0.7, 10, 3), (0.29, 100, 71), (0, 7, 7), (0.0, 7, 7), (0.2, 12460, 9968)],
)
def test_budget_is_exact_where_floating_point_is_not(rate: float, pool: int, kept: int):
    assert budget_for(rate, pool) == kept


@given(st.integers(0, 999), st.integers(1, 10**6))
def test_budget_is_the_floor_of_the_decimal_that_was_typed(thousandths: int, pool: int):
    kept = (1000 - thousandths) * pool // 1000
    if kept:
        assert budget_for(thousandths / 1000, pool) == kept
    else:
        with pytest.raises(UserError, match=f"leaves none of the {pool} samples"):
            budget_for(thousandths / 1000, pool)


@pytest.mark.parametrize("rate", [1, 1.0, -0.1, 90, float("nan"), float("inf"), "0.9", True, None])
def test_pruning_rate_outside_its_range_is_refused_with_its_value(rate):
    with pytest.raises(UserError, match=r"pruning_rate=.*\[0, 1\)"):
        budget_for(rate, 1000)


# ---------------------------------------------------------------- draws


def test_a_draw_depends_on_seed_purpose_and_id_and_on_nothing_else():
    draws = Draws(3, IDS)
    first = draws.priorities("pick").copy()
    draws.choose("verification", np.arange(10), 3)  # what was drawn before changes nothing
    assert (Draws(3, IDS).priorities("pick") == first).all()
    assert (Draws(3, IDS[::-1]).priorities("pick")[::-1] == first).all()
    assert (Draws(3, [*IDS, "another"]).priorities("pick")[:-1] == first).all()
    assert (Draws(4, IDS).priorities("pick") != first).all()
    assert (draws.priorities("fill") != first).all()


def test_draws_are_the_same_in_another_process():
    code = "from staff.selection import Draws; print(Draws(0, ['a', 'b']).priorities('pick').tolist())"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == str(Draws(0, ["a", "b"]).priorities("pick").tolist())


def test_every_sample_is_drawn_equally_often_and_independently_of_its_neighbour():
    chosen = np.zeros((2000, 20), dtype=bool)
    for seed in range(len(chosen)):
        chosen[seed, Draws(seed, IDS[:20]).choose("pick", np.arange(20), 5)] = True
    assert (chosen.sum(1) == 5).all()
    # 2,000 draws at probability 1/4: a standard deviation of 19.4; within four of them.
    assert np.abs(chosen.sum(0) - 500).max() < 78
    assert np.abs(np.corrcoef(chosen.T)[~np.eye(20, dtype=bool)] + 1 / 19).max() < 0.1


def test_two_purposes_draw_independently():
    a, b = Draws(0, IDS).priorities("pick"), Draws(0, IDS).priorities("verification")
    assert abs(np.corrcoef(a.argsort().argsort(), b.argsort().argsort())[0, 1]) < 0.1


def test_choosing_more_than_there_are_gives_all():
    assert sorted(Draws(0, IDS).choose("pick", np.array([4, 2]), 9)) == [2, 4]
    assert len(Draws(0, IDS).choose("pick", np.array([], dtype=np.int64), 9)) == 0


def test_highest_first_breaks_ties_by_draw_and_only_ties():
    scores = np.repeat([1.0, 3.0, 2.0], 20)
    orders = [Draws(seed, IDS[:60]).highest_first(scores) for seed in range(3)]
    for order in orders:
        assert (scores[order] == np.repeat([3.0, 2.0, 1.0], 20)).all()
    assert not (orders[0] == orders[1]).all()
    assert sorted(orders[0][:20]) == list(range(20, 40))


def test_the_highest_are_dropped_by_exact_count():
    scores = np.arange(1000.0)
    assert (Draws(0, IDS).all_but_highest(scores, 0.29) == np.arange(710)).all()
    assert (Draws(0, IDS).all_but_highest(scores, 0) == np.arange(1000)).all()


# ---------------------------------------------------------------- regions


@given(st.floats(0, 1e6), st.floats(0, 1e6), st.integers(1, 200))
def test_regions_cover_the_range_and_the_highest_score_lies_in_the_last(low: float, width: float, k: int):
    high = low + width
    edges = equal_width_edges(low, high, k)
    assert len(edges) == k and (np.diff(edges) >= 0).all() and edges[-1] == high
    region_of = stratify(np.array([low, (low + high) / 2, high]), edges)
    assert region_of.min() >= 0 and (np.diff(region_of) >= 0).all()
    if width > max(1e-3 * high, 1e-300):
        assert region_of[0] == 0 and region_of[-1] == k - 1


def test_a_score_on_an_edge_goes_below_for_staff_and_above_for_ccs():
    edges = equal_width_edges(0, 4, 4)
    assert stratify(np.array([0, 1, 1.5, 4]), edges).tolist() == [0, 0, 1, 3]
    assert stratify(np.array([0, 1, 1.5, 4]), edges, upper_closed=False).tolist() == [0, 1, 1, -1]


def test_regions_are_served_smallest_first_and_equal_ones_by_score():
    region_of = np.array([3, 3, 3, 0, 0, 5, 5, 9, -1])
    regions, members = serving_order(region_of, np.arange(100, 109))
    assert regions.tolist() == [9, 0, 5, 3]
    assert [m.tolist() for m in members] == [[107], [103, 104], [105, 106], [100, 101, 102]]


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30).map(sorted), st.data())
def test_equal_shares_smallest_first_spend_the_whole_budget(sizes: list[int], data: st.DataObject):
    budget = data.draw(st.integers(1, sum(sizes)))
    budgets = share_out(budget, sizes, np.ones(len(sizes)), regions_left(len(sizes)))
    assert budgets.sum() == budget and (budgets <= sizes).all()
    unfilled = budgets[budgets < sizes]
    assert not len(unfilled) or np.ptp(unfilled) <= 1


@given(st.lists(st.tuples(st.integers(1, 50), st.floats(0, 1e6)), min_size=1, max_size=30), st.integers(1, 2000))
def test_shares_of_ratios_never_exceed_a_region_or_the_budget(regions: list[tuple[int, float]], budget: int):
    sizes, ratios = (np.array(column) for column in zip(*regions))
    budgets = share_out(budget, sizes, *shares_of_ratio(ratios))
    assert (budgets >= 0).all() and (budgets <= sizes).all() and budgets.sum() <= budget


def test_the_last_region_takes_what_is_left_whatever_its_ratio():
    for ratios in (np.array([5.0, 1.0, 0.01]), np.array([5.0, 1.0, 0.0]), np.array([np.nan, 1.0, np.nan])):
        assert share_out(100, [1, 10, 200], *shares_of_ratio(ratios)).sum() == 100


# ---------------------------------------------------------------- what goes in and what comes out


@pytest.mark.parametrize(("value", "said"), [(np.nan, "nan"), (np.inf, "inf"), (-1.0, "-1.0")])
def test_a_bad_score_is_refused_by_the_name_of_its_sample(value: float, said: str):
    scores = np.ones(1000)
    scores[[17, 400]] = value
    with pytest.raises(UserError, match=rf"effort of sample 'sample 17' is {said} \(2 in total\)"):
        check_scores(scores, IDS, "effort", minimum=0)


def test_scores_of_the_wrong_number_are_refused():
    with pytest.raises(UserError, match="1000 samples"):
        check_scores(np.ones(999), IDS, "effort")


class Fixed:
    """Returns what it is told to, whatever is asked."""

    def __init__(self, chosen: object) -> None:
        self.chosen = chosen

    def select(self, pool: ArrayPool, budget: int, rng: Draws) -> object:
        return self.chosen


class Two(Fixed):
    def fixed_size(self, pool_size: int) -> int:
        return 2


@pytest.mark.parametrize(
    ("method", "budget", "sentence"),
    [
        (Fixed(Coreset(np.arange(3))), 0, "a budget of 0 samples cannot be met: 10 are eligible"),
        (Fixed(Coreset(np.arange(3))), 11, "a budget of 11 samples cannot be met: 10 are eligible"),
        (Fixed(Coreset(np.arange(3))), 4, "Fixed.select chose 3 samples, not the 4 of the budget"),
        (Fixed(Coreset(np.array([1, 2, 2, 5]))), 4, "Fixed.select chose position 2 2 times"),
        (Fixed(Coreset(np.arange(10) < 4)), 4, "Fixed.select chose position 0 6 times"),  # a mask
        (Fixed(Coreset(np.array([0, 10]))), 2, "Fixed.select chose position 10, but the pool's are 0 to 9"),
        (Fixed(Coreset(np.array([-1, 0]))), 2, "Fixed.select chose position -1, but the pool's are 0 to 9"),
        (Fixed(np.arange(4)), 4, "Fixed.select returned a ndarray: it must return a Coreset"),
        (Two(Coreset(np.arange(3))), 3, "Two.select chose 3 samples, not the 2 of the budget"),
    ],
)
def test_a_selection_that_is_not_what_was_asked_for_is_refused_by_the_methods_name(method, budget, sentence):
    pool = ArrayPool(IDS[:10], {})
    with pytest.raises(UserError, match=sentence):
        run_method(method, pool, budget, Draws(0, pool.ids))


def test_a_method_of_its_own_size_may_have_any_whatever_the_budget():
    pool = ArrayPool(IDS[:10], {})
    assert run_method(Two(Coreset(np.array([7, 3]))), pool, 9, Draws(0, pool.ids)).indices.tolist() == [3, 7]  # type: ignore[arg-type]


def test_a_coreset_is_sorted_and_survives_saving(tmp_path):
    scores = np.array([0.5, np.nan, 2.0])
    saved = Coreset(np.array([2, 0]), pd.DataFrame({"region": [1]}), {"effort": scores}, 1, ("a note",))
    saved.save(tmp_path, IDS[:3])
    loaded = Coreset.load(tmp_path)
    assert loaded.indices.tolist() == [0, 2]
    pd.testing.assert_frame_equal(loaded.diagnostics, saved.diagnostics)
    np.testing.assert_array_equal(loaded.scores["effort"], scores)
    assert (loaded.filled, loaded.notes) == (1, ("a note",))


# ---------------------------------------------------------------- a pool of arrays

FRESH = {"rank": 81, "alpha": 16, "targets": ["q_proj", "v_proj"]}


def test_an_array_stands_for_a_signal_with_its_options_of_a_model():
    arrays = np.arange(50.0).reshape(5, 10)
    pool = ArrayPool(
        IDS[:10],
        {
            ("effort", "small"): arrays[0],
            (Effort("all_lora"), "small"): arrays[1],
            (Effort(fresh_adapter={**FRESH, "targets": ("q_proj", "v_proj")}), "small"): arrays[2],
            ("el2n", "target_tuned"): arrays[3],
            ("my own", "small"): arrays[4],
        },
        dev={("effort", "small"): np.arange(3.0)},
    )
    assert (pool.ask("effort", "small") == pool.ask(Effort(), of="small")).all()
    assert (pool.ask("effort", "small", parameters="all_lora") == arrays[1]).all()
    assert (pool.ask("effort", "small", np.array([7, 2]), fresh_adapter=FRESH) == arrays[2, [7, 2]]).all()
    assert pool.ask("my own", "small") is not None
    assert [a.tolist() for a in pool.ask([EL2N()], "target_tuned")] == [arrays[3].tolist()]
    assert pool.ask("effort", "small", view="dev").tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (lambda pool: pool.ask("loss", "small"), "no 'loss' of 'small': it has 'effort' of small"),
        (lambda pool: pool.ask("effort", "target"), "no 'effort' of 'target': it has 'effort' of small"),
        (lambda pool: pool.ask(Effort("all_lora"), "small"), r"no 'effort' \(Effort\(parameters='all_lora'"),
        (lambda pool: pool.ask("effort", "small", variant="x"), "'effort' has no option 'variant'"),
        (lambda pool: pool.ask("effort", "small", view="dev"), r"no dev slice: give ArrayPool dev=\.\.\."),
        (lambda pool: pool.answer_lengths, "no answer_lengths: give ArrayPool answer_lengths"),
        (lambda pool: pool.lengths, "no lengths: give ArrayPool lengths"),
    ],
)
def test_what_a_pool_of_arrays_was_not_given_is_refused_with_what_it_has(ask, sentence):
    with pytest.raises(UserError, match=f"the pool has {sentence}|signal {sentence}"):
        ask(ArrayPool(IDS[:10], {("effort", "small"): np.ones(10)}))


# ---------------------------------------------------------------- a budget in tokens


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(1, 1500), st.integers(0, 9))
def test_a_budget_in_tokens_holds_the_largest_ranking_that_fits(lengths: list[int], tokens: int, seed: int):
    scores = np.random.default_rng(seed).random(len(lengths))
    ids = [f"s{i}" for i in range(len(lengths))]
    pool = ArrayPool(ids, {("loss", "small"): scores}, lengths=np.array(lengths))
    ranked = np.array(lengths)[np.argsort(-scores)].cumsum()
    fits = int((ranked <= tokens).sum())
    if fits == 0:
        with pytest.raises(UserError, match=rf"budget_tokens={tokens} holds no sample that HighestLoss selects"):
            run_method_for_tokens(HighestLoss(), pool, tokens, Draws(0, ids))
        return
    chosen = run_method_for_tokens(HighestLoss(), pool, tokens, Draws(0, ids)).indices
    assert chosen.tolist() == sorted(np.argsort(-scores)[:fits].tolist())


class HighestLoss:
    def select(self, pool: ScorePool, budget: int, rng: Draws) -> Coreset:
        return Coreset(np.argsort(-pool.ask("loss", of="small"))[:budget])


@pytest.mark.parametrize("share", [0.03, 0.2, 0.5, 0.97, 1.5])
def test_a_budget_in_tokens_is_a_coreset_of_the_method_to_which_one_more_sample_is_too_much(share: float):
    n, rng = 200, np.random.default_rng(3)
    lengths = rng.integers(20, 400, n)
    signals = {("effort", "small"): rng.random(n), ("effort", "target"): rng.random(n)}
    pool = ArrayPool([f"s{i}" for i in range(n)], signals, lengths=lengths)
    tokens = int(share * lengths.sum())
    draws, staff = Draws(0, pool.ids), Staff(num_regions=5, verification_budget=4)
    chosen = run_method_for_tokens(staff, pool, tokens, draws).indices
    assert lengths[chosen].sum() <= tokens
    assert chosen.tolist() == run_method(staff, pool, len(chosen), draws).indices.tolist()
    if len(chosen) < n:
        more = run_method(staff, pool, len(chosen) + 1, draws).indices
        assert lengths[more].sum() > tokens
    else:
        assert share > 1
