"""Data maps, forgetting and AUM against recorded statistics and selections."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.any_pool import AnyPool, chosen, select
from support.golden import recorded

from baselines.cartography import (
    STATISTICS,
    Cartography,
    cartography_official,
    forgetting,
    forgetting_balanced_official,
    forgetting_events,
    learning_official,
    margins_official,
    training_dynamics_official,
)
from staff.errors import UserError

VECTORS = recorded("cartography")
MAPS, EVENTS, AUM = (
    [case for case in VECTORS if case.startswith(name)] for name in ("cartography", "forgetting", "aum")
)


def pool_of(signal: str, values: np.ndarray) -> AnyPool:
    return AnyPool(len(values), {signal: values})


@pytest.mark.parametrize("epochs", [None, 3])
@pytest.mark.parametrize("case", MAPS)
def test_the_statistics_of_data_maps_are_those_of_the_released_code(case: str, epochs: int | None):
    golden = VECTORS[case]
    correct = (golden["logits"].argmax(axis=2) == golden["gold"])[:epochs]
    ours = training_dynamics_official(golden["true_prob"][:epochs].T, correct.T)
    for name, values in ours.items():
        np.testing.assert_allclose(values, golden[name + ("_burn3" if epochs else "")], atol=1e-7, err_msg=name)


@pytest.mark.parametrize("case", MAPS)
def test_selections_from_data_maps_have_the_released_values_and_size_whichever_way_ties_fall(case: str):
    golden = VECTORS[case]
    names = [name for name in golden if name.startswith("sel_")]
    assert len(names) >= 28
    for name in names:
        metric, ends, fraction = name.removeprefix("sel_").rsplit("_", 2)
        values = golden[metric]
        ours = cartography_official(values, metric, float(fraction), ends)
        assert values[ours].tolist() == values[golden[name]].tolist(), name


@pytest.mark.parametrize("case", EVENTS)
def test_counts_of_forgetting_are_those_of_both_released_codes(case: str):
    golden = VECTORS[case]
    correct = golden["correct"].T
    assert forgetting_events(correct).tolist() == golden["deepcore_events"].tolist()
    assert forgetting(correct).tolist() == golden["toneva_counts"].tolist()
    needed, first = learning_official(correct)
    assert needed.tolist() == golden["presentations_needed_to_learn"].tolist()
    np.testing.assert_array_equal(first, golden["first_learned"])


@pytest.mark.parametrize("case", EVENTS)
def test_the_most_forgotten_are_selected_as_by_deepcore_whichever_way_ties_fall(case: str):
    golden = VECTORS[case]
    pool = pool_of("correct", golden["correct"].T)
    events, labels = golden["deepcore_events"], golden["labels"]
    for fraction in ("0.1", "0.3", "0.7"):
        theirs = golden[f"selected_global_{fraction}"]
        ours = select(Cartography("forgetting_events"), pool, len(theirs)).indices
        assert sorted(events[ours]) == sorted(events[theirs])
        theirs = golden[f"selected_balanced_{fraction}"]
        ours = forgetting_balanced_official(events, labels, float(fraction))
        assert sorted(zip(labels[ours], events[ours])) == sorted(zip(labels[theirs], events[theirs]))


@pytest.mark.parametrize("case", AUM)
def test_margins_and_their_means_are_those_of_the_released_code(case: str):
    golden = VECTORS[case]
    margins, means = margins_official(golden["logits"], golden["targets"], golden["seen"])
    np.testing.assert_allclose(margins, golden["margins"], atol=1e-6)
    np.testing.assert_allclose(means, golden["aum"], atol=1e-6)
    if case != "aum_N60_constant":
        ours = select(Cartography("margin", "lowest"), pool_of("margin", means[:, None]), 20).indices
        assert set(ours) == set(golden["order_desc"][-20:])


def test_each_statistic_ranks_plain_trajectories_as_its_name_says():
    trajectories = {"probability": [[0.1, 0.9], [0.9, 0.9], [0.1, 0.1]], "correct": [[1, 0], [1, 1], [0, 0]]}
    first = {
        ("variability", "highest"): {"sample 0"},
        ("confidence", "highest"): {"sample 1"},
        ("confidence", "lowest"): {"sample 2"},
        ("threshold_closeness", "highest"): {"sample 0"},
        ("correctness", "highest"): {"sample 1"},
        ("forgetting", "highest"): {"sample 2"},
        ("forgetting_events", "highest"): {"sample 0"},
    }
    for (statistic, keep), ids in first.items():
        signal = STATISTICS[statistic][0]
        pool = pool_of(signal, np.array(trajectories[signal], dtype=float))
        assert chosen(Cartography(statistic, keep), pool, 1) == ids, statistic


@settings(deadline=None)
@given(st.integers(1, 30), st.integers(1, 8), st.integers(0, 2**32))
def test_falls_add_up_to_what_was_lost_and_exceed_every_single_loss(n: int, epochs: int, seed: int):
    shares = np.random.default_rng(seed).integers(0, 5, (n, epochs)) / 4
    falls, rises = forgetting_events(shares), forgetting_events(1 - shares)
    np.testing.assert_allclose(falls - rises, shares[:, 0] - shares[:, -1])
    losses = [shares[:, i] - shares[:, j] for j in range(epochs) for i in range(j + 1)]
    assert (falls >= np.max(losses, axis=0)).all()
    assert (forgetting(shares) == np.where(shares.any(axis=1), falls, epochs)).all()


def test_one_checkpoint_leaves_a_note_and_a_random_choice():
    coreset = select(Cartography(), pool_of("probability", np.random.default_rng(0).random((40, 1))), 10)
    assert len(coreset.indices) == 10
    assert coreset.notes == ("variability needs more than one checkpoint: set finetune.small_epochs above 1.",)


def test_a_value_that_is_not_finite_at_one_checkpoint_names_its_sample_and_bad_fields_their_choices():
    values = np.random.default_rng(0).random((5, 3))
    values[3, 1] = np.nan
    for statistic, (signal, _) in STATISTICS.items():
        with pytest.raises(UserError, match=f"{signal} at a checkpoint of sample 'sample 3' is nan"):
            select(Cartography(statistic), pool_of(signal, values), 2)
    with pytest.raises(UserError, match=r"method.statistic='entropy' is unknown: choose variability or"):
        Cartography("entropy")
    with pytest.raises(UserError, match=r"method.keep='middle' is unknown: choose highest or lowest"):
        Cartography(keep="middle")
