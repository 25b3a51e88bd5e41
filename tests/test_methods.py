"""What every selection method keeps, on answers that differ and on equal ones; some on the embedded models."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT, vectors
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from support.any_pool import chosen, pool_of, select
from support.tiny import method_named as preset_named
from support.tiny import planted_pool, tiny_pool

from baselines.data_whisperer import DataWhisperer
from baselines.el2n import EL2N
from baselines.k_center import KCenter
from baselines.less import LESS
from baselines.random import Random
from baselines.s2l import S2L
from staff.errors import UserError
from staff.evaluation.in_context import AnswersInContext
from staff.evaluation.metrics import named_metric
from staff.pool import Select
from staff.selection import Coreset, SelectionMethod
from staff.store.stage import identity

# ---------------------------------------------------------------- every method, found by its file in conf/method


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


@settings(max_examples=60)
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


@dataclass(frozen=True)
class Twin:
    """A method with a method among its fields."""

    reference: SelectionMethod


def test_a_method_is_known_by_its_fields_and_the_methods_among_them():
    methods = (Twin(Random()), Twin(EL2N()), Twin(EL2N("official")), Random(), EL2N())
    known = [identity(method) for method in methods]
    assert all(a != b for i, a in enumerate(known) for b in known[:i])
    assert identity(Twin(Random())) == known[0]


# ---------------------------------------------------------------- on the embedded models (all: stress/)


def test_a_method_selects_exactly_its_budget_and_is_charged_for_what_it_asked(tmp_path: Path):
    pool = tiny_pool(tmp_path)
    chosen = pool.store.get(Select(preset_named("rds_plus"), pool, 10))
    coreset = Coreset.load(chosen.path)
    assert len(coreset.indices) == 10 and np.isfinite(coreset.scores["highest_similarity"]).all()
    charged = {charge.label: charge.cost for charge in chosen.charged().values() if charge.stage != "coreset"}
    assert set(charged) == {"embedding of 40 samples, raw target", "embedding of 6 samples, raw target"}
    tokens = pool.lengths.sum(), pool.slices["dev"].target.lengths.sum()
    assert [charged[label].tokens_forward for label in sorted(charged)] == list(tokens)
    assert all(cost.flops > 0 and cost.seconds > 0 for cost in charged.values())


@pytest.mark.parametrize("name", ["rds_plus", "tsds", "less"])
def test_a_method_that_needs_a_validation_slice_says_so_before_a_model_runs(name: str, tmp_path: Path):
    pool = tiny_pool(tmp_path, dev=False)
    with pytest.raises(UserError, match=r"there is no dev slice: make a validation slice with task\.dev_size"):
        pool.store.get(Select(preset_named(name), pool, 10))
    assert {folder.name for folder in tmp_path.iterdir()} <= {"locks", "tmp", "attempts"}


def test_demonstrations_that_do_not_fit_are_refused_with_how_many_do_before_a_model_runs(tmp_path: Path):
    pool = tiny_pool(tmp_path)
    with pytest.raises(UserError, match=r"^30 demonstrations, .* for (\d+) demonstrations of any length: ") as said:
        pool.store.get(Select(DataWhisperer(demonstrations=30), pool, 10))
    assert {folder.name for folder in tmp_path.iterdir()} <= {"locks", "tmp", "attempts"}
    fit = int(str(said.value).rpartition("=")[2].rstrip("."))
    samples, queries = pool.slices["pool"].target, pool.slices["dev"].target
    every, separator = np.arange(len(queries))[None], pool.family.target.tokenizer()("\n\n")["input_ids"][1:]
    for count in (fit, fit + 1):
        longest = np.full((1, count), samples.lengths.argmax())
        (state,) = pool.states("target")
        stage = AnswersInContext(state, samples, queries, longest, every, named_metric("exact"), separator)
        with nullcontext() if count == fit else pytest.raises(UserError, match=f"set method.demonstrations={fit}"):
            stage.check()


def test_data_whisperer_selects_by_the_answers_and_the_attention_of_the_raw_target(tmp_path: Path):
    pool = planted_pool(tmp_path, size=12, dev=3)
    method = DataWhisperer(demonstrations=3, queries=2, rounds=1, metric="exact")
    chosen = pool.store.get(Select(method, pool, 4))
    coreset = Coreset.load(chosen.path)
    assert len(coreset.indices) == 4 and np.isfinite(coreset.scores["in_context"]).all()
    (charge,) = [charge for charge in chosen.charged().values() if charge.stage == "in_context"]
    assert charge.label == "answer 8 queries in context, raw target" and charge.cost.flops > 0
    assert (
        len(Coreset.load(pool.store.get(Select(replace(method, queries_from="folds"), pool, 4)).path).indices) == 4
    )


@pytest.mark.parametrize(
    ("method", "kind", "said"),
    [
        (S2L(), "full", r"fine-tuning all weights keeps no model of epoch 1: choose finetune=lora"),
        (S2L(num_checkpoints=9), "lora", r"num_checkpoints=9 is more than the \d epochs of the small model's"),
        (LESS(dim=4_000_000), "lora", r"method.dim=4000000 is more than the \d+ parameters that are projected"),
        (KCenter(layer=99), "lora", r"layer=99 is not a block of \w+: choose 0 to \d, or -1 for the last"),
        (KCenter(of="small", layer=-9), "lora", r"layer=-9 is not a block of \w+: choose"),
        (LESS(dim=10**11), "lora", r"projected_gradient of 6 samples, .* takes [\d,]+ GB, .* lower method\.dim"),
    ],
)
def test_what_was_not_kept_or_fits_no_memory_is_refused_before_a_model_loads(
    method: SelectionMethod, kind: str, said: str, tmp_path: Path
):
    pool = tiny_pool(tmp_path)
    pool = replace(pool, settings=replace(pool.settings, kind=kind))
    with pytest.raises(UserError, match=said):
        pool.store.get(Select(method, pool, 10))
    assert {folder.name for folder in tmp_path.iterdir()} <= {"locks", "tmp", "attempts"}


# ---------------------------------------------------------------- recorded vectors


@pytest.mark.parametrize("file", sorted((ROOT / "tests/golden").glob("*.npz")), ids=lambda file: file.stem)
def test_every_packed_file_holds_named_cases(file: Path):
    assert all(case and arrays for case, arrays in vectors(file.stem).items())
