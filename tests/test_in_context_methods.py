"""Methods that ask a model to answer in context, DELIFT and Data Whisperer, against recorded vectors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import vectors
from hypothesis import given, settings
from hypothesis import strategies as st
from support.any_pool import AnyPool, chosen, pool_of, select
from support.tiny import tiny_pool

from baselines.data_whisperer import (
    DataWhisperer,
    aggregate,
    aggregate_official,
    attention_mass_official,
    plan_official,
)
from baselines.delift import DELIFT, delift_official, distance_official, minmax, minmax_official, utility_official
from baselines.within_groups import GroupPool
from staff.data.tokens import TokenizedSamples
from staff.errors import UserError
from staff.pool import Pool
from staff.scoring import in_context
from staff.scoring.passes import Pass
from staff.scoring.positions import Positions
from staff.selection import Draws
from staff.signals.distance import Distance

# ---------------------------------------------------------------- DELIFT


DELIFT_VECTORS = vectors("delift")
ORDERS, DISTANCES, KERNELS = (
    [case for case in DELIFT_VECTORS if case.startswith(f"delift_{name}")] for name in ("N", "distance", "kernel")
)


def pool_with(gains: np.ndarray, view: str = "pool") -> AnyPool:
    return AnyPool(gains.shape[1], {"in_context_gain" if view == "pool" else "in_context_gain/dev": gains})


@pytest.mark.parametrize("objective", ["fl", "mi", "cg"])
@pytest.mark.parametrize("case", ORDERS)
def test_orders_and_gains_are_those_of_the_released_code(case: str, objective: str):
    golden = DELIFT_VECTORS[case]
    for fraction in ("0.05", "0.3"):
        order, gains = delift_official(golden["utility"], float(fraction), objective, golden["private"])
        assert order.tolist() == golden[f"{objective}_order_{fraction}"].tolist()
        np.testing.assert_allclose(gains, golden[f"{objective}_gains_{fraction}"], atol=1e-6)


@pytest.mark.parametrize("case", ORDERS)
def test_the_official_preset_selects_the_recorded_samples(case: str):
    golden = DELIFT_VECTORS[case]
    recorded = golden["fl_order_0.3"]
    ours = select(DELIFT(gains="minmax"), pool_with(golden["utility"]), len(recorded))
    assert set(ours.indices) == set(recorded)


@pytest.mark.parametrize("case", DISTANCES)
def test_distances_are_those_of_the_released_code(case: str):
    golden = DELIFT_VECTORS[case]
    ours = distance_official(golden["logits"], golden["input_ids"], golden["token_type_ids"])
    np.testing.assert_allclose(ours, golden["distance"], atol=1e-6)


@pytest.mark.parametrize("case", KERNELS)
def test_utilities_are_those_of_the_released_code(case: str):
    golden = DELIFT_VECTORS[case]
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


@settings(max_examples=30)
@given(n=st.integers(1, 40), constant=st.booleans(), seed=st.integers(0, 2**32), data=st.data())
def test_the_size_of_delift_is_exact_and_the_order_of_the_pool_changes_nothing(
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


# ---------------------------------------------------------------- Data Whisperer


WHISPERER_VECTORS = vectors("data_whisperer")
ATTENTION = [case for case in WHISPERER_VECTORS if case.startswith("dw_attention")]
RUNS = [case for case in WHISPERER_VECTORS if case not in ATTENTION]


@pytest.mark.parametrize("case", RUNS)
def test_evaluations_counts_and_scores_are_those_of_the_released_code_to_the_last_bit(case: str):
    golden = WHISPERER_VECTORS[case]
    size, slice_size, shown, asked = (int(golden[n]) for n in ("n_train", "n_val", "batch_train", "batch_test"))
    demonstrations, queries = plan_official(size, slice_size, shown, asked, folds=case.endswith("kfold"))
    assert demonstrations.tolist() == golden["demonstrations"].tolist()
    assert queries.tolist() == golden["query_ids"].tolist()
    given = (demonstrations, golden["attention"], golden["query_scores"], golden["failed"], size)
    scores, counts = aggregate_official(*given)
    assert scores.tolist() == golden["final_score"].tolist()
    assert counts.tolist() == golden["count"].tolist()
    assert sorted(scores, reverse=True) == scores[golden["order"]].tolist()


@pytest.mark.parametrize("case", ATTENTION)
def test_the_mass_of_attention_is_that_of_the_released_code_to_the_last_bit(case: str):
    golden = WHISPERER_VECTORS[case]
    given = (
        golden[name] for name in ("attention", "attention_mask", "n_instruction", "demo_lengths", "n_response")
    )
    attention, mask, instruction, lengths, response = given
    mass = attention_mass_official(attention, mask, int(instruction), lengths, int(response))
    np.testing.assert_array_equal(mass.astype(np.float32), golden["mass"])


@pytest.mark.parametrize("case", [case for case in RUNS if "N60" in case or "N300" in case])
def test_where_evaluations_are_full_the_default_is_the_released_score_times_the_demonstrations(case: str):
    golden = WHISPERER_VECTORS[case]
    attention = np.where(golden["failed"][:, None], np.nan, golden["attention"].astype(np.float64))
    scores = aggregate(golden["demonstrations"], attention, golden["query_scores"], int(golden["n_train"]))
    evaluated = golden["count"] > 0
    assert np.isnan(scores[~evaluated]).all()
    np.testing.assert_allclose(scores[evaluated] / 5, golden["final_score"][evaluated], atol=2e-3)


def test_a_short_last_evaluation_scores_no_higher_than_a_full_one():
    demonstrations = np.array([[0, 1, 2], [3, -1, -1]])
    attention = np.array([[0.2, 0.2, 0.2], [0.2, np.nan, np.nan]])
    scores = aggregate(demonstrations, attention, np.array([[0.5, np.nan], [0.5, 0.5]]), 4)
    np.testing.assert_allclose(scores, 0.5)
    released, _ = aggregate_official(demonstrations, attention, np.full((2, 1), 0.5), np.zeros(2, dtype=bool), 4)
    assert released[3] > 2.9 * released[0]


def test_attention_decides_among_demonstrations_and_failed_evaluations_are_left_out():
    demonstrations = np.array([[0, 1], [0, 1], [1, 0]])
    attention = np.array([[0.3, 0.1], [np.nan, 1.0], [0.0, 0.0]])
    scores = aggregate(demonstrations, attention, np.array([[1.0], [0.0], [1.0]]), 2)
    np.testing.assert_allclose(scores, [(1.5 + 1) / 2, (0.5 + 1) / 2])


@given(
    n=st.integers(2, 60),
    shown=st.integers(1, 7),
    asked=st.integers(1, 4),
    rounds=st.integers(1, 3),
    source=st.sampled_from(["slice", "folds"]),
)
def test_every_sample_is_a_demonstration_once_a_round_and_never_beside_itself_as_a_query(
    n: int, shown: int, asked: int, rounds: int, source: str
):
    method = DataWhisperer("target", source, shown, asked, rounds)
    demonstrations, queries = method.plan(n, Draws(0, [f"{i}" for i in range(n)]))
    assert np.bincount(demonstrations[demonstrations >= 0], minlength=n).tolist() == [rounds] * n
    assert demonstrations.shape[1] == shown and queries.shape == (len(demonstrations), asked)
    if source == "folds":
        for one, other in zip(demonstrations, queries):
            assert not set(one[one >= 0]) & set(other[other >= 0])
    else:
        assert queries.ravel().tolist() == list(range(queries.size))


@pytest.mark.parametrize("source", ["slice", "folds"])
def test_the_size_of_data_whisperer_is_exact_and_the_order_of_the_pool_changes_nothing(source: str):
    for constant in (False, True):
        pool, method = pool_of(97, constant=constant), DataWhisperer(queries_from=source)
        for budget in (1, 40, 97):
            assert len(set(select(method, pool, budget).indices)) == budget
        order = np.random.default_rng(0).permutation(97)
        assert chosen(method, pool.reordered(order), 40) == chosen(method, pool, 40)


def test_a_model_that_answers_nothing_in_context_leaves_a_draw_and_a_note_of_it(monkeypatch):
    pool, ask = pool_of(30), AnyPool._in_context
    without = lambda *a, **o: np.hstack([ask(*a, **o)[:, :5], np.zeros((18, 3))])  # noqa: E731
    assert select(DataWhisperer(), pool, 5).notes == ()
    monkeypatch.setattr(AnyPool, "_in_context", without)
    coreset = select(DataWhisperer(), pool, 5)
    assert len(coreset.indices) == 5 and "no answer in context scores above 0" in coreset.notes[0]


def test_a_sample_whose_every_evaluation_failed_is_named_and_bad_fields_are_refused():
    pool = pool_of(30)
    pool.bad_sample = 13
    with pytest.raises(UserError, match=r"the in-context score of sample 'sample \d+' is nan"):
        select(DataWhisperer(rounds=1), pool, 5)
    bad: list[tuple[dict[str, Any], str]] = [
        ({"queries_from": "test"}, r"method.queries_from='test' is unknown: choose slice or folds"),
        ({"rounds": 0}, r"method.rounds=0 must be a whole number of at least 1"),
    ]
    for fields, said in bad:
        with pytest.raises(UserError, match=said):
            DataWhisperer(**fields)


# ---------------------------------------------------------------- gains in context


DISTANCES = [case for case in vectors("delift") if "distance" in case]


SAMPLES = TokenizedSamples.of_rows(["a", "b"], [[1, 5, 6, 7, 2], [1, 8, 9, 2]], [3, 2], begin=1)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return tiny_pool(tmp_path_factory.mktemp("store"), size=4)


def distance(target, row: list[int], prompt: int) -> float:
    """From one forward pass, in the formula of the released code."""
    logits = target(torch.tensor([row])).logits.detach().double().numpy()
    answer = (np.arange(len(row)) >= prompt)[None]
    return float(distance_official(logits, np.array([row]), answer)[0])


def test_a_sample_stands_behind_each_example_with_one_begin_token_and_its_own_answer():
    pairs = in_context.behind_examples(SAMPLES.take([1]), SAMPLES, [30, 31])
    assert [pairs.row(i).tolist() for i in range(2)] == [[1, 5, 6, 7, 30, 31, 8, 9, 2], [1, 8, 9, 30, 31, 8, 9, 2]]
    assert list(pairs.ids) == ["b after a", "b after b"] and pairs.prompt_lengths.tolist() == [7, 6]
    assert pairs.labels(0).tolist() == [-100] * 7 + [9, 2]
    chat = in_context.behind_examples(SAMPLES, SAMPLES, None)
    assert len(chat) == 4 and chat.row(1).tolist() == [1, 8, 9, 2, 5, 6, 7, 2]


@pytest.mark.parametrize("case", DISTANCES)
def test_the_distance_is_that_of_the_released_code(case: str):
    golden = vectors("delift")[case]
    ids, response = torch.tensor(golden["input_ids"]).long(), torch.tensor(golden["token_type_ids"]).bool()
    labels = torch.where(response, ids, -100)
    answered = (labels[:, 1:] != -100).any(1)
    at = Positions.of_predictions(labels)
    batch = Pass(labels, torch.full((len(ids),), ids.shape[1]), at, at.gather(torch.tensor(golden["logits"]))[0])
    values = Distance().compute(batch)
    np.testing.assert_allclose(values[answered], golden["distance"][answered], atol=1e-6)


@pytest.mark.parametrize("view", ["pool", "dev"])
def test_gains_are_the_fall_of_the_distance_behind_each_example(planted: Pool, view: str, monkeypatch):
    monkeypatch.setattr(in_context, "PAIRS_AT_ONCE", 9)  # two samples at a time
    gains = planted.ask("in_context_gain", of="target", view=view)
    samples, helped = planted.slices["pool"].target, planted.slices[view].target
    assert gains.shape == (len(helped), 4)
    target, tokenizer = planted.family.target.load(), planted.family.target.tokenizer()
    blank = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    for i in (0, len(helped) - 1):
        row, prompt = helped.row(i).tolist(), int(helped.prompt_lengths[i])
        alone = distance(target, row, prompt)
        for j in range(4):
            before = [*samples.row(j).tolist()[:-1], *blank]
            behind = distance(target, [*before, *row[helped.begin :]], len(before) + prompt - helped.begin)
            assert gains[i, j] == pytest.approx(alone - behind, abs=1e-5)


def test_a_pair_that_does_not_fit_the_model_is_refused_before_it_runs(planted: Pool, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(type(planted.family.target), "window", lambda spec: 150)
    with pytest.raises(UserError, match=r"take up to \d+ tokens, and the model has 150 positions: lower"):
        replace(planted, store=type(planted.store)(tmp_path)).ask("in_context_gain", of="target")
    assert not list(tmp_path.iterdir())


def test_in_a_group_the_columns_are_those_of_its_samples():
    whole, members = AnyPool(6), np.array([4, 1, 5])
    gains, part = whole.ask("in_context_gain", "target"), GroupPool(whole, members)  # type: ignore[arg-type]
    np.testing.assert_array_equal(part.ask("in_context_gain", "target"), gains[np.ix_(members, members)])
    of_slice = whole.ask("in_context_gain", "target", view="dev")
    np.testing.assert_array_equal(part.ask("in_context_gain", "target", view="dev"), of_slice[:, members])
