"""What every method on arrays keeps, by its preset: exact size, keyed draws, refusals by name, a report."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from support2.pool import chosen, pool_of, select

from staff.errors import UserError
from staff.selection import Coreset

CONF = Path(__file__).resolve().parents[1] / "conf"
PRESETS = {
    "facility_location": [],
    "facility_location_official": [],
    "cartography": [],
    "forgetting": [],
    "forgetting_official": [],
    "aum": [],
    "less": [],
    "less_paper": [],
    "tsds": [],
    "tsds_official": [],
    "data_whisperer": [],
    "delift": [],
    "delift_official": [],
    "random_matched": ["method@method.reference=aum"],
    "random_length": ["method@method.reference=less"],
    "within_groups": ["method@method.inner=facility_location"],
}


@cache
def configured(name: str) -> Any:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=[f"method={name}", *PRESETS[name]]).method


def method_named(name: str) -> Any:
    return instantiate(configured(name), _convert_="all")


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("constant", [False, True], ids=["scores differ", "scores are constant"])
def test_exactly_the_budget_of_distinct_samples_is_selected(name: str, constant: bool):
    method = method_named(name)
    for n in (1, 2, 7, 150):
        pool = pool_of(n, constant=constant)
        for budget in sorted({1, (n + 1) // 2, n}):
            indices = select(method, pool, budget).indices
            assert len(indices) == budget
            assert (np.diff(indices) > 0).all() and set(indices) <= set(range(n))


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("constant", [False, True], ids=["scores differ", "scores are constant"])
def test_seed_and_ids_decide_and_not_the_order_of_the_pool(name: str, constant: bool):
    method, pool = method_named(name), pool_of(150, constant=constant)
    ours = chosen(method, pool, 40)
    assert chosen(method, pool, 40) == ours
    for order in (np.arange(150)[::-1], np.random.default_rng(5).permutation(150)):
        assert chosen(method, pool.reordered(order), 40) == ours
    if constant:
        assert len({frozenset(chosen(method, pool, 40, seed)) for seed in range(5)}) == 5


@pytest.mark.parametrize("name", PRESETS)
def test_what_is_not_finite_is_refused_by_the_name_of_the_sample(name: str):
    pool = pool_of(150)
    for key, values in pool.answers.items():
        if key[2] == "pool":
            values[31] = np.nan
    with pytest.raises(UserError, match="sample 'sample 31' is nan" if name != "data_whisperer" else "is nan"):
        select(method_named(name), pool, 40)


@pytest.mark.parametrize("name", PRESETS)
def test_a_budget_that_cannot_be_met_is_refused(name: str):
    for budget in (0, 151):
        with pytest.raises(UserError, match=f"a budget of {budget} samples"):
            select(method_named(name), pool_of(150), budget)


@pytest.mark.parametrize("name", PRESETS)
def test_the_report_has_a_value_for_each_sample_and_can_be_saved(name: str, tmp_path: Path):
    pool = pool_of(150)
    coreset = select(method_named(name), pool, 40)
    assert coreset.scores and all(values.shape == (150,) for values in coreset.scores.values())
    coreset.save(tmp_path, pool.ids)
    assert Coreset.load(tmp_path).diagnostics.equals(coreset.diagnostics)


@pytest.mark.parametrize("name", PRESETS)
def test_every_field_is_named_in_the_yaml(name: str):
    assert set(configured(name)) - {"_target_"} == {f.name for f in fields(method_named(name))}
