"""Quotas proportional to the sizes of groups, and any method inside each group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.any_pool import AnyPool, HighestEffort, chosen, pool_of, pool_where_short_answers_score_high, select

from baselines.facility_location import FacilityLocation
from baselines.full import Full
from baselines.less import LESS
from baselines.random import Random
from baselines.random_matched import RandomMatched
from baselines.within_groups import GroupPool, WithinGroups, largest_remainders
from staff.errors import UserError
from staff.selection import Coreset, Draws


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=30), st.data())
def test_quotas_add_up_are_within_one_of_the_share_and_never_above_the_size(sizes: list[int], data: st.DataObject):
    budget = data.draw(st.integers(1, sum(sizes)))
    quotas = largest_remainders(budget, np.array(sizes))
    assert quotas.sum() == budget
    for size, quota in zip(sizes, quotas):
        assert budget * size // sum(sizes) <= quota <= min(size, -(-budget * size // sum(sizes)))


def test_the_largest_remainders_are_rounded_up_and_equal_ones_for_the_larger_group():
    assert largest_remainders(10, np.array([53, 24, 23])).tolist() == [5, 3, 2]
    assert largest_remainders(3, np.array([10, 30, 20])).tolist() == [0, 2, 1]  # remainders 1/2, 1/2 and 0
    assert largest_remainders(1, np.array([7, 7])).tolist() == [1, 0]


@pytest.mark.parametrize("inner", [HighestEffort(), Random(), FacilityLocation(), LESS(), RandomMatched(Random())])
@pytest.mark.parametrize("constant", [False, True], ids=["scores differ", "scores are constant"])
def test_every_group_keeps_its_share_in_whatever_order_the_pool_is(inner: Any, constant: bool):
    pool, method = pool_of(150, constant=constant), WithinGroups(inner)
    for budget in (1, 40, 150):
        coreset = select(method, pool, budget)
        poems = (pool.groups[coreset.indices] == "poem").sum()
        assert len(set(coreset.indices)) == budget and poems == budget // 5
    order = np.random.default_rng(0).permutation(150)
    assert chosen(method, pool.reordered(order), 40) == chosen(method, pool, 40)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=60), st.data())
def test_the_size_is_exact_whatever_the_groups(labels: list[str], data: st.DataObject):
    budget = data.draw(st.integers(1, len(labels)))
    pool = AnyPool(len(labels), constant=True, groups=labels)
    assert len(set(select(WithinGroups(HighestEffort()), pool, budget).indices)) == budget


def test_inside_a_group_the_choice_is_what_the_method_chooses_of_that_group_alone():
    pool = pool_where_short_answers_score_high()
    coreset = select(WithinGroups(HighestEffort()), pool, 80)
    efforts = pool.given["effort"]
    for label in ("poem", "prose"):
        members = np.flatnonzero(pool.groups == label)
        ours = np.intersect1d(coreset.indices, members)
        assert set(ours) == set(members[np.argsort(-efforts[members])[: len(ours)]])
    np.testing.assert_array_equal(coreset.scores["effort"], efforts)
    assert coreset.diagnostics["within_quota"].sum() == 80 and coreset.filled == 2
    assert coreset.notes == ("a note",)


def test_one_question_about_the_whole_pool_serves_every_group_and_a_probe_asks_of_its_samples_only():
    pool = pool_of(20)
    part = GroupPool(pool, np.array([3, 7, 11]))
    effort, loss = part.ask(["effort", "loss"], of="small")
    np.testing.assert_array_equal(effort, pool.ask("effort", "small")[[3, 7, 11]])
    np.testing.assert_array_equal(loss, pool.ask("loss", "small")[[3, 7, 11]])
    at = np.array([2, 0])
    np.testing.assert_array_equal(part.ask("loss", "target", at), pool.ask("loss", "target")[[11, 3]])
    np.testing.assert_array_equal(part.ask("loss", "target", view="dev"), pool.ask("loss", "target", view="dev"))
    assert part.lengths.tolist() == pool.lengths[[3, 7, 11]].tolist()


def test_groups_too_small_for_a_sample_are_noted():
    labels = np.array(["big"] * 97 + ["small", "smaller", "smallest"])
    pool = pool_of(100)
    pool.groups = labels
    coreset = select(WithinGroups(Random()), pool, 10)
    assert len(coreset.indices) == 10 and coreset.notes == (
        "3 of 4 groups are too small for a sample of their own.",
    )


@dataclass(frozen=True)
class OneTooMany:
    def select(self, pool: Any, budget: int, rng: Draws) -> Coreset:
        return Coreset(np.arange(budget + 1))


def test_what_is_no_method_or_ignores_its_quota_and_a_pool_without_groups_are_refused():
    with pytest.raises(UserError, match=r"method.inner='ccs' is no method: set method@method.inner=staff"):
        WithinGroups("ccs")  # type: ignore[arg-type]
    with pytest.raises(
        UserError, match=r"method.inner selects 30 of group 'poem' whatever its quota: .* selects 8"
    ):
        select(WithinGroups(Full()), pool_of(150), 40)
    with pytest.raises(UserError, match=r"method.inner selects 9 of group 'poem'"):
        select(WithinGroups(OneTooMany()), pool_of(150), 40)
    pool = pool_of(150)
    pool.groups = None
    with pytest.raises(
        UserError, match=r"method=within_groups needs the group of each sample: set task.group_field"
    ):
        select(WithinGroups(Random()), pool, 40)
