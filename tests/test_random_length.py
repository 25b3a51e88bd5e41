"""A random coreset with the lengths of another: its samples by chance alone."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.contract import AnyPool, select

from baselines.el2n import EL2N
from baselines.full import Full
from baselines.precomputed import Precomputed
from baselines.random import Random
from baselines.random_length import RandomLength
from staff import ArrayPool
from staff.errors import UserError


def pool_where_short_answers_score_high(n: int = 400) -> ArrayPool:
    lengths = np.random.default_rng(1).integers(5, 60, n)
    scores = 100.0 / lengths + 0.1 * np.random.default_rng(2).random(n)
    return ArrayPool([f"sample {i}" for i in range(n)], {("el2n", "target_tuned"): scores}, lengths)


def test_a_length_matched_coreset_has_the_references_lengths_and_its_samples_by_chance_alone():
    pool = pool_where_short_answers_score_high()
    lengths = pool.answer_lengths
    reference = select(EL2N(), pool, 40)
    assert lengths[reference.indices].mean() < 15 < 30 < lengths.mean()
    shared = []
    for seed in range(50):
        matched = select(RandomLength(EL2N()), pool, 40, seed)
        assert abs(lengths[matched.indices].mean() - lengths[reference.indices].mean()) < 1.5
        assert matched.diagnostics["budget"].sum() == 40
        shared.append(len(np.intersect1d(matched.indices, reference.indices)))
        assert matched.diagnostics["shared"].sum() == shared[-1]
    table = select(RandomLength(EL2N()), pool, 40).diagnostics
    assert abs(np.mean(shared) - (table["budget"] ** 2 / table["size"]).sum()) < 1  # hypergeometric
    only_bin = select(RandomLength(EL2N(), num_bins=1), pool, 40)
    assert lengths[only_bin.indices].mean() > 25  # a plain random draw


def test_a_length_matched_coreset_is_uniform_within_each_length():
    pool, hits = pool_where_short_answers_score_high(60), np.zeros(60)
    for seed in range(600):
        hits[select(RandomLength(EL2N(), num_bins=3), pool, 10, seed).indices] += 1
    assert (hits > 0).sum() < 25  # the reference lies in the shortest third
    expected = 6000 / (hits > 0).sum()
    assert np.abs(hits[hits > 0] - expected).max() < 50  # four standard deviations


def test_the_draw_of_a_length_matched_coreset_is_not_the_references_own():
    # Random and its matched twin draw from the same samples with the same seed, and must not agree.
    pool = pool_where_short_answers_score_high()
    reference, matched = select(Random(), pool, 100), select(RandomLength(Random(), num_bins=1), pool, 100)
    assert len(np.intersect1d(reference.indices, matched.indices)) < 45  # 25 by chance


def test_a_reference_that_is_no_method_or_ignores_the_budget_is_refused():
    with pytest.raises(UserError, match=r"method.reference='staff' is no method"):
        RandomLength("staff")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"method.reference selects 150 samples whatever the pruning rate"):
        select(RandomLength(Full()), AnyPool(150), 40)
    with pytest.raises(UserError, match=r"method.num_bins=0 must be a whole number of at least 1"):
        RandomLength(Random(), num_bins=0)


def test_a_list_is_refused_where_a_budget_asks_for_more(tmp_path: Path):
    (tmp_path / "ids.json").write_text(json.dumps(["sample 7", "sample 0", "sample 3"]))
    listed = RandomLength(Precomputed(str(tmp_path / "ids.json")))
    with pytest.raises(UserError, match=r"ids.json lists 3 samples, not the 4 of the budget"):
        select(listed, AnyPool(9), 4)
    assert len(select(listed, AnyPool(9), 3).indices) == 3
