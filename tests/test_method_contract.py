"""What every method that asks by `pool.ask` keeps, on answers drawn at random and on answers that are all equal."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from support.array_answers import ArrayAnswers

from staff.errors import UserError
from staff.selection import Coreset, Draws, SelectionMethod

CONF = Path(__file__).resolve().parents[1] / "conf"
PRESETS = {
    "longest": (),
    "shortest": (),
    "perplexity": ("which=top", "which=middle", "which=low"),
    "perplexity_official": ("which=middle",),
    "ifd": (),
    "superfiltering": (),
    "s2l": ("num_clusters=7", "num_checkpoints=2", "by_group=false"),
    "s2l_official": ("num_clusters=30",),
    "rds_plus": ("aggregate=max", "aggregate=mean", "aggregate=normalised_mean"),
    "rds_plus_official": (),
    "k_center": (),
    "k_center_official": (),
    "moderate": ("classes=groups", "classes=kmeans"),
    "moderate_official": (),
    "kmeans_coverage": ("num_clusters=7", "pick=nearest", "pick=farthest"),
    "prototypes": ("keep=easy", "metric=cosine", "metric=l2"),
}
METHODS = [(name, override) for name, overrides in PRESETS.items() for override in (None, *overrides)]
every_method = pytest.mark.parametrize(("name", "override"), METHODS)
constant_or_not = pytest.mark.parametrize("constant", [False, True], ids=["answers differ", "answers are equal"])


@cache
def method_named(name: str, override: str | None = None) -> SelectionMethod:
    overrides = [f"method={name}"] + ([f"method.{override}"] if override else [])
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return instantiate(compose("config", overrides=overrides).method, _convert_="all")


def pool_of(n: int, constant: bool = False) -> ArrayAnswers:
    return ArrayAnswers(n, constant=constant, groups=[("b", "a", "c", "a")[i % 4] for i in range(n)])


def select(method: SelectionMethod, pool: ArrayAnswers, budget: int, seed: int = 0) -> Coreset:
    return method.select(pool, budget, Draws(seed, pool.ids))  # type: ignore[arg-type]


@every_method
@constant_or_not
def test_every_method_selects_exactly_the_budget_of_distinct_samples(name: str, override: str, constant: bool):
    method = method_named(name, override)
    for n in (1, 2, 7, 150):
        for budget in sorted({1, (n + 1) // 2, n - 1, n} - {0}):
            indices = select(method, pool_of(n, constant), budget).indices
            assert len(indices) == budget
            assert (np.diff(indices) > 0).all() and set(indices) <= set(range(n))


@every_method
@constant_or_not
def test_every_method_selects_by_seed_and_id_and_not_by_the_order_of_the_pool(
    name: str, override: str, constant: bool
):
    method, pool = method_named(name, override), pool_of(150, constant)
    chosen = {pool.ids[i] for i in select(method, pool, 40).indices}
    for order in (np.arange(150), np.arange(150)[::-1], np.random.default_rng(5).permutation(150)):
        other = pool.reordered(order)
        assert {other.ids[i] for i in select(method, other, 40).indices} == chosen


@every_method
def test_where_answers_are_equal_another_seed_selects_others(name: str, override: str):
    method, pool = method_named(name, override), pool_of(150, constant=True)
    assert not np.array_equal(select(method, pool, 40).indices, select(method, pool, 40, seed=1).indices)


@every_method
def test_a_method_that_asks_refuses_nan_by_the_id_of_the_sample(name: str, override: str):
    pool = pool_of(150)
    pool.bad_sample = 31
    if name in ("longest", "shortest"):
        select(method_named(name, override), pool, 40)
        assert not pool.asked
    else:
        with pytest.raises(UserError, match="'sample 31' is nan"):
            select(method_named(name, override), pool, 40)


@every_method
def test_a_budget_that_cannot_be_met_is_refused(name: str, override: str):
    for budget in (0, 151):
        with pytest.raises(UserError, match=f"a budget of {budget} samples"):
            select(method_named(name, override), pool_of(150), budget)


@every_method
def test_a_method_reports_a_value_for_each_sample_and_what_can_be_saved(name: str, override: str, tmp_path: Path):
    pool = pool_of(150)
    coreset = select(method_named(name, override), pool, 40)
    assert all(values.shape == (150,) for values in coreset.scores.values())
    coreset.save(tmp_path, pool.ids)
    assert Coreset.load(tmp_path).diagnostics.equals(coreset.diagnostics)


def test_methods_name_every_hyper_parameter_in_their_yaml():
    for name in PRESETS:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            written = compose("config", overrides=[f"method={name}"]).method
        assert set(written) - {"_target_"} == {f.name for f in fields(method_named(name))}, name  # type: ignore


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(METHODS), st.integers(1, 60), st.data())
def test_every_method_keeps_to_any_size_in_any_order(case: tuple[str, str], n: int, data: st.DataObject):
    method, budget = method_named(*case), data.draw(st.integers(1, n))
    pool, order = pool_of(n), np.array(data.draw(st.permutations(range(n))))
    chosen, other = select(method, pool, budget).indices, pool.reordered(order)
    assert len(chosen) == len(set(chosen)) == budget
    assert {other.ids[i] for i in select(method, other, budget).indices} == {pool.ids[i] for i in chosen}


@pytest.mark.parametrize(
    ("name", "override"),
    [
        ("longest", "which=longest"),
        ("perplexity", "text=prompt"),
        ("perplexity", "middle_start=1.5"),
        ("perplexity", "of=large"),
        ("ifd", "ratio=loss"),
        ("ifd", "limit=-1"),
        ("s2l", "num_clusters=0"),
        ("s2l", "num_checkpoints=0"),
        ("s2l", "pooled_size=0.5"),
        ("rds_plus", "pooling=mean"),
        ("rds_plus", "aggregate=min"),
        ("k_center", "layer=last"),
        ("k_center", "features=unit"),
        ("moderate", "classes=many"),
        ("kmeans_coverage", "pick=best"),
        ("kmeans_coverage", "num_clusters=true"),
        ("prototypes", "metric=l1"),
        ("prototypes", "keep=all"),
    ],
)
def test_a_hyper_parameter_out_of_range_is_refused_by_its_name(name: str, override: str):
    with pytest.raises(Exception) as raised:
        method_named.__wrapped__(name, override)
    field, value = override.split("=")
    said = str(raised.value.__cause__ or raised.value)
    assert f"method.{field}=" in said and value.lower() in said.lower()
