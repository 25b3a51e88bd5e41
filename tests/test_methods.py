"""What every selection method keeps, found by its file in conf/method, on answers that differ and on equal ones."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from support.any_pool import chosen, pool_of, select

from staff.errors import UserError
from staff.selection import Coreset, SelectionMethod

CONF = Path(__file__).resolve().parents[1] / "conf"
PRESETS = sorted(
    {path.stem for path in (CONF / "method").glob("*.yaml")} - {"precomputed", "imported", "oracle"}
)  # which need a file, or a planted task
VARIANTS = {
    "aum": ("keep=highest",),
    "cartography": ("statistic=confidence", "statistic=threshold_closeness", "statistic=correctness"),
    "ccs": ("beta=0.2",),
    "d2": ("features=raw",),
    "kmeans_coverage": ("num_clusters=7", "pick=nearest", "pick=farthest"),
    "less": ("average=gradients",),
    "moderate": ("classes=groups", "classes=kmeans"),
    "perplexity": ("which=middle", "which=low"),
    "perplexity_official": ("which=middle",),
    "prototypes": ("keep=easy", "metric=cosine", "metric=l2"),
    "random_matched": ("match=[length,group]", "reference.num_regions=3"),
    "rds_plus": ("aggregate=max", "aggregate=mean", "aggregate=normalised_mean"),
    "s2l": ("num_clusters=7", "num_checkpoints=2", "by_group=false"),
    "s2l_official": ("num_clusters=30",),
    "staff": ("speculation=none", "speculation=target", "pick=highest", "signal=perplexity", "drop_hardest=0.2"),
    "staff_official": ("length_exponent=fit",),
    "tsds": ("density=uniform",),
}
METHODS = [(name, override) for name in PRESETS for override in (None, *VARIANTS.get(name, ()))]
every_method = pytest.mark.parametrize(("name", "override"), METHODS)
constant_or_not = pytest.mark.parametrize("constant", [False, True], ids=["answers differ", "answers are equal"])


def written(name: str, override: str | None = None) -> Any:
    """The method's part of the configuration."""
    overrides = [f"method={name}"] + ([f"method.{override}"] if override else [])
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=overrides).method


@cache
def method_named(name: str, override: str | None = None) -> SelectionMethod:
    return instantiate(written(name, override), _convert_="all")


def largest_budget(method: Any, n: int) -> int:
    return n - int(max(getattr(method, "drop_hardest", 0), getattr(method, "beta", 0)) * n)


def size_of(method: Any, n: int, budget: int) -> int:
    return method.fixed_size(n) if hasattr(method, "fixed_size") else budget


@every_method
@constant_or_not
def test_every_method_selects_exactly_the_budget_of_distinct_samples(name: str, override: str, constant: bool):
    method = method_named(name, override)
    for n in (1, 2, 7, 150):
        most = largest_budget(method, n)
        for budget in sorted({1, (most + 1) // 2, most}):
            indices = select(method, pool_of(n, constant), budget).indices
            assert len(indices) == size_of(method, n, budget)
            assert (np.diff(indices) > 0).all() and set(indices) <= set(range(n))


@every_method
@constant_or_not
def test_every_method_selects_by_seed_and_id_and_not_by_the_order_of_the_pool(
    name: str, override: str, constant: bool
):
    method, pool = method_named(name, override), pool_of(150, constant)
    ours = chosen(method, pool, 40)
    for order in (np.arange(150), np.arange(150)[::-1], np.random.default_rng(5).permutation(150)):
        assert chosen(method, pool.reordered(order), 40) == ours
    if constant and not hasattr(method, "fixed_size"):
        assert len({frozenset(chosen(method, pool, 40, seed)) for seed in range(3)}) == 3


@every_method
def test_a_method_that_asks_refuses_what_is_not_finite_by_the_id_of_the_sample(name: str, override: str):
    pool = pool_of(150)
    pool.bad_sample = 31
    try:
        select(method_named(name, override), pool, 40)
    except UserError as error:
        assert "'sample 31' is nan" in str(error)
    else:
        assert not pool.asked


@pytest.mark.parametrize("name", PRESETS)
def test_a_method_reports_a_value_for_each_sample_and_what_can_be_saved(name: str, tmp_path: Path):
    pool = pool_of(150)
    coreset = select(method_named(name), pool, 40)
    assert all(values.shape == (150,) for values in coreset.scores.values())
    coreset.save(tmp_path, pool.ids)
    assert Coreset.load(tmp_path).diagnostics.equals(coreset.diagnostics)


@pytest.mark.parametrize("name", PRESETS)
def test_a_method_names_every_field_in_its_yaml_and_is_known_by_a_version(name: str):
    method: Any = method_named(name)
    assert set(written(name)) - {"_target_"} == {field.name for field in fields(method)}
    assert isinstance(type(method).version, int)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(METHODS), st.integers(1, 60), st.data())
def test_every_method_keeps_to_any_size_in_any_order(case: tuple[str, str], n: int, data: st.DataObject):
    method = method_named(*case)
    budget = data.draw(st.integers(1, largest_budget(method, n)))
    pool, order = pool_of(n), np.array(data.draw(st.permutations(range(n))))
    ours = chosen(method, pool, budget)
    assert len(ours) == size_of(method, n, budget)
    assert chosen(method, pool.reordered(order), budget) == ours


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


def test_the_table_of_methods_names_every_preset():
    told = (CONF.parent / "baselines" / "README.md").read_text()
    for preset in (CONF / "method").glob("*.yaml"):
        assert f"`{preset.stem.removesuffix('_official')}`" in told
