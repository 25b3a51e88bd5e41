"""Methods around another one: inside each group, and random twins that match a reference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from support.any_pool import AnyPool, chosen, pool_of, select

from baselines.facility_location import FacilityLocation
from baselines.full import Full
from baselines.less import LESS
from baselines.random import Random
from baselines.random_matched import RandomMatched, gumbel
from baselines.within_groups import GroupPool, WithinGroups, largest_remainders
from experiments.configuration import within_groups
from staff.errors import UserError
from staff.selection import Coreset, Draws

CONF = Path(__file__).resolve().parents[1] / "conf"


def pool_where_short_answers_score_high(n: int = 400) -> AnyPool:
    lengths = np.random.default_rng(1).integers(5, 60, n)
    scores = 100.0 / lengths + 0.1 * np.random.default_rng(2).random(n)
    groups = np.where(np.random.default_rng(3).random(n) < 0.25, "poem", "prose")
    return AnyPool(n, {"effort": scores}, answer_lengths=lengths, groups=groups)


@dataclass(frozen=True)
class HighestEffort:
    """The plainest method that asks a model: a reference or an inner method for those that have one."""

    def select(self, pool: Any, budget: int, rng: Draws) -> Coreset:
        scores = np.asarray(pool.ask("effort", of="small"))
        return Coreset(rng.highest_first(scores)[:budget], scores={"effort": scores}, filled=1, notes=("a note",))


# ---------------------------------------------------------------- within groups


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


@settings(max_examples=50)
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
    with pytest.raises(UserError, match=r"method.inner='ccs' is not a method: set method@method.inner=staff"):
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


@pytest.mark.parametrize("name", ["staff", "random_matched", "less"])
def test_any_method_is_applied_inside_each_group_by_one_setting_beside_its_own(name: str):
    own = {"staff": ["method.num_regions=3"], "random_matched": ["method@method.reference=ccs", "+method.x=1"]}
    with initialize_config_dir(str(CONF), version_base="1.3"):
        alone, within = (
            compose("config", overrides=within_groups([f"method={name}", *own.get(name, []), *more])).method
            for more in ([], ["method.within=group"])
        )
    assert within._target_.endswith("WithinGroups") and within.inner == alone


def test_a_sweep_is_applied_inside_groups_and_what_names_no_method_or_no_group_is_refused():
    swept = within_groups(["--multirun", "method=staff,ccs", "seed=0,1", "method.within=group"])
    assert swept == ["--multirun", "method@method.inner=staff,ccs", "seed=0,1", "method=within_groups"]
    assert within_groups(["method=ccs", "method.within=null"]) == ["method=ccs"]
    with pytest.raises(UserError, match=r"method.within='skill' is unknown: choose group, or null"):
        within_groups(["method=ccs", "method.within=skill"])
    with pytest.raises(UserError, match=r"method.within=group needs a method beside it"):
        within_groups(["experiment=planted", "method.within=group"])


# ---------------------------------------------------------------- random twins


LENGTH, TOKENS, GROUP = ["length"], ["tokens"], ["group"]


def test_a_length_matched_coreset_has_the_references_lengths_and_its_samples_by_chance_alone():
    pool = pool_where_short_answers_score_high()
    lengths = pool.answer_lengths
    reference = select(HighestEffort(), pool, 40)
    assert lengths[reference.indices].mean() < 15 < 30 < lengths.mean()
    shared = []
    for seed in range(50):
        matched = select(RandomMatched(HighestEffort(), LENGTH), pool, 40, seed)
        assert abs(lengths[matched.indices].mean() - lengths[reference.indices].mean()) < 1.5
        assert matched.diagnostics["budget"].sum() == 40
        shared.append(len(np.intersect1d(matched.indices, reference.indices)))
        assert matched.diagnostics["shared"].sum() == shared[-1]
    table = select(RandomMatched(HighestEffort(), LENGTH), pool, 40).diagnostics
    assert abs(np.mean(shared) - (table["budget"] ** 2 / table["size"]).sum()) < 1  # hypergeometric
    only_bin = select(RandomMatched(HighestEffort(), LENGTH, num_bins=1), pool, 40)
    assert lengths[only_bin.indices].mean() > 25  # a plain random draw


def test_a_length_matched_coreset_is_uniform_within_each_length():
    pool, hits = pool_where_short_answers_score_high(60), np.zeros(60)
    for seed in range(600):
        hits[select(RandomMatched(HighestEffort(), LENGTH, num_bins=3), pool, 10, seed).indices] += 1
    assert (hits > 0).sum() < 25  # the reference lies in the shortest third
    expected = 6000 / (hits > 0).sum()
    assert np.abs(hits[hits > 0] - expected).max() < 50  # four standard deviations


@pytest.mark.parametrize("match", [LENGTH, TOKENS, GROUP])
def test_the_draw_of_a_twin_is_not_the_references_own(match: list[str]):
    # Random and its matched twin draw from the same samples with the same seed, and must not agree.
    pool = pool_where_short_answers_score_high()
    reference, matched = select(Random(), pool, 100), select(RandomMatched(Random(), match, num_bins=1), pool, 100)
    assert len(np.intersect1d(reference.indices, matched.indices)) < 45  # 25 by chance


@settings(max_examples=60)
@given(
    n=st.integers(1, 120),
    longest=st.sampled_from([1, 4, 50, 2000]),
    match=st.lists(st.sampled_from(["length", "tokens", "group"]), min_size=1, max_size=3, unique=True),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_a_twin_is_of_exact_size_keeps_every_cell_and_ignores_the_order_of_the_pool(
    n: int, longest: int, match: list[str], seed: int, data: st.DataObject
):
    rng = np.random.default_rng(seed)
    lengths, groups = rng.integers(1, longest + 1, n), rng.choice(["a", "b", "c"], n)
    pool = AnyPool(n, {"effort": rng.random(n)}, answer_lengths=lengths, groups=groups)
    budget = data.draw(st.integers(1, n))
    reference, twin = HighestEffort(), RandomMatched(HighestEffort(), match, num_bins=4)
    ours, theirs = select(twin, pool, budget).indices, select(reference, pool, budget).indices
    assert len(ours) == budget and (np.diff(ours) > 0).all()
    if "group" in match:
        assert sorted(groups[ours]) == sorted(groups[theirs])
    if "length" in match:
        edges = np.unique(np.quantile(lengths, [0.25, 0.5, 0.75]))
        assert sorted(np.searchsorted(edges, lengths[ours])) == sorted(np.searchsorted(edges, lengths[theirs]))
    assert chosen(twin, pool.reordered(rng.permutation(n)), budget) == {pool.ids[i] for i in ours}


@pytest.mark.parametrize("match", [TOKENS, ["tokens", "group"], ["tokens", "length"]])
def test_the_tokens_are_the_references_to_the_last_and_the_samples_differ(match: list[str]):
    pool = pool_where_short_answers_score_high()
    pool.given["effort"] = 15 * np.random.default_rng(4).normal(size=400) - pool.answer_lengths
    reference = select(HighestEffort(), pool, 100)
    wanted = pool.lengths[reference.indices].sum()
    assert wanted < 0.7 * pool.lengths.sum() / 4  # the reference is far from the mean
    twins = [select(RandomMatched(HighestEffort(), match), pool, 100, seed) for seed in range(10)]
    for twin in twins:
        assert pool.lengths[twin.indices].sum() == wanted and twin.notes == ("a note",)
    assert len({tuple(twin.indices) for twin in twins}) == 10
    if match == TOKENS:  # by tokens alone the long answers are rarer, not missing
        assert max(pool.answer_lengths[twin.indices].max() for twin in twins) > 40
        assert max(len(np.intersect1d(twin.indices, reference.indices)) for twin in twins) < 65


def test_the_one_sample_without_which_the_tokens_cannot_be_matched_is_drawn_by_every_seed():
    lengths = np.array([1000, 1, 1, 1, 1, 1])
    pool = AnyPool(6, {"effort": np.array([5.0, 4, 3, 2, 1, 0])}, answer_lengths=lengths)
    twins = [select(RandomMatched(HighestEffort(), TOKENS), pool, 2, seed).indices.tolist() for seed in range(40)]
    assert sorted({tuple(twin) for twin in twins}) == [(0, 1), (0, 2), (0, 3), (0, 4), (0, 5)]


def test_noise_is_gumbel_and_highest_where_the_priority_is_lowest():
    draws = Draws(0, [f"{i}" for i in range(20000)])
    priorities = draws.priorities("length")
    noise = gumbel(priorities)
    assert noise.mean() == pytest.approx(0.5772, abs=0.03) and noise.std() == pytest.approx(1.2825, abs=0.03)
    assert (np.argsort(-noise)[:100] == np.argsort(priorities)[:100]).all()
    assert np.isfinite(gumbel(np.array([0, 2**64 - 1], dtype=np.uint64))).all()


def test_random_length_is_the_preset_that_matches_lengths_and_takes_another_reference():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=["method=random_length", "method@method.reference=random"])
    method = instantiate(cfg.method, _convert_="all")
    assert method == RandomMatched(Random(), ["length"], num_bins=20)
    pool = pool_of(80)
    lengths, draws = pool.answer_lengths, Draws(3, pool.ids)
    reference = Random().select(pool, 30, draws).indices  # type: ignore[arg-type]
    bin_of = np.searchsorted(np.unique(np.quantile(lengths, np.linspace(0, 1, 21)[1:-1])), lengths)
    cells = [np.flatnonzero(bin_of == b) for b in np.unique(bin_of)]
    picked = [draws.choose("length", cell, np.isin(reference, cell).sum()) for cell in cells]
    assert select(method, pool, 30, seed=3).indices.tolist() == sorted(np.concatenate(picked))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (("staff",), r"method.reference='staff' is not a method"),
        ((Random(), "length"), r"method.match='length' must be a list of some of length, tokens, group"),
        ((Random(), []), r"method.match=\[\] must be a list"),
        ((Random(), ["loss"]), r"method.match=\['loss'\] must be a list"),
        ((Random(), LENGTH, 0), r"method.num_bins=0 must be a whole number of at least 1"),
    ],
)
def test_bad_fields_are_refused(fields: tuple[Any, ...], said: str):
    with pytest.raises(UserError, match=said):
        RandomMatched(*fields)


def test_a_reference_that_ignores_the_budget_and_groups_that_are_not_there_are_refused():
    pool = pool_of(150)
    with pytest.raises(UserError, match=r"method.reference selects 150 samples whatever the pruning rate"):
        select(RandomMatched(Full()), pool, 40)
    pool.groups = None
    with pytest.raises(
        UserError, match=r"method.match names group, but the samples have none: set task.group_field"
    ):
        select(RandomMatched(Random(), GROUP), pool, 40)
