"""What every selection method keeps, found by its file in conf/method; and each baseline's own semantics."""

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
from scipy.spatial.distance import cdist

from baselines.ccs import CCS
from baselines.d2 import D2, nearest_neighbours
from baselines.el2n import EL2N
from baselines.full import Full
from baselines.grand import GraNd
from baselines.random import Random
from baselines.random_length import RandomLength
from staff.errors import UserError
from staff.pool import ROLES, ArrayPool
from staff.selection import Coreset, Draws, SelectionMethod, source_digest

CONF = Path(__file__).resolve().parents[1] / "conf"
GOLDEN = Path(__file__).parent / "golden"
NEEDY = {"precomputed", "oracle"}  # a file, a planted task: tests of their own
METHODS = sorted({path.stem for path in (CONF / "method").glob("*.yaml")} - NEEDY)
SIGNALS = ("effort", "el2n", "loss")


@cache
def method_named(name: str) -> SelectionMethod:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return instantiate(compose("config", overrides=[f"method={name}"]).method, _convert_="all")


class AnyPool(ArrayPool):
    """Answers every signal of every model role, and remembers whether it was asked."""

    def __init__(self, n: int, seed: int = 0, constant: bool = False):
        rng = np.random.default_rng(seed)
        keys = [(signal, role) for role in ROLES for signal in (*SIGNALS, "embedding")]
        shapes = [(n, 8) if signal == "embedding" else n for signal, _ in keys]
        values = [np.full(shape, 0.5) if constant else rng.lognormal(0, 0.5, shape) for shape in shapes]
        lengths = np.full(n, 9) if constant else rng.integers(3, 60, n)
        super().__init__([f"sample {i}" for i in range(n)], dict(zip(keys, values)), lengths)
        self.asked = False

    def scores(self, signal: str, model: str, indices: np.ndarray | None = None, **options: Any) -> np.ndarray:
        self.asked = True
        return super().scores(signal, model, indices, **options)

    def reordered(self, order: np.ndarray) -> ArrayPool:
        scores = {key: values[order] for key, values in self._scores.items()}
        return ArrayPool([self.ids[i] for i in order], scores, self.answer_lengths[order])


def select(method: SelectionMethod, pool: ArrayPool, budget: int, seed: int = 0) -> Coreset:
    return method.select(pool, budget, Draws(seed, pool.ids))


def expected_size(method: SelectionMethod, n: int, budget: int) -> int:
    return method.fixed_size(n) if hasattr(method, "fixed_size") else budget  # type: ignore[attr-defined]


def largest_budget(method: SelectionMethod, n: int) -> int:
    return n - int(getattr(method, "drop_hardest", 0) * n)


# ---------------------------------------------------------------- the contract


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("constant", [False, True], ids=["scores differ", "scores are constant"])
def test_every_method_selects_exactly_the_budget_of_distinct_samples(name: str, constant: bool):
    method = method_named(name)
    for n in (1, 2, 7, 150):
        pool, most = AnyPool(n, constant=constant), largest_budget(method, n)
        for budget in sorted({1, (most + 1) // 2, most}):
            indices = select(method, pool, budget).indices
            assert len(indices) == expected_size(method, n, budget)
            assert (np.diff(indices) > 0).all() and set(indices) <= set(range(n))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("constant", [False, True], ids=["scores differ", "scores are constant"])
def test_every_method_selects_by_seed_and_id_and_not_by_the_order_of_the_pool(name: str, constant: bool):
    method, pool = method_named(name), AnyPool(150, constant=constant)
    chosen = {pool.ids[i] for i in select(method, pool, 40).indices}
    assert {pool.ids[i] for i in select(method, pool, 40).indices} == chosen
    for order in (np.arange(150)[::-1], np.random.default_rng(5).permutation(150)):
        other = pool.reordered(order)
        assert {other.ids[i] for i in select(method, other, 40).indices} == chosen


@pytest.mark.parametrize("name", METHODS)
def test_every_method_that_asks_for_scores_refuses_nan_by_the_name_of_the_sample(name: str):
    pool, method = AnyPool(150), method_named(name)
    for values in pool._scores.values():
        values[31] = np.nan
    try:
        select(method, pool, 40)
    except UserError as error:
        assert "'sample 31' is nan" in str(error)
    else:
        assert not pool.asked


@pytest.mark.parametrize("name", METHODS)
def test_every_method_refuses_a_budget_that_cannot_be_met(name: str):
    method = method_named(name)
    if hasattr(method, "fixed_size"):
        return
    for budget in (0, 151):
        with pytest.raises(UserError, match=f"a budget of {budget} samples"):
            select(method, AnyPool(150), budget)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_reports_a_value_for_each_sample_and_what_can_be_saved(name: str, tmp_path: Path):
    pool = AnyPool(150)
    coreset = select(method_named(name), pool, 40)
    assert all(values.shape == (150,) for values in coreset.scores.values())
    coreset.save(tmp_path, pool.ids)
    assert Coreset.load(tmp_path).diagnostics.equals(coreset.diagnostics)


def test_methods_name_every_hyper_parameter_in_their_yaml():
    for name in METHODS:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            written = compose("config", overrides=[f"method={name}"]).method
        assert set(written) - {"_target_"} == {f.name for f in fields(method_named(name))}, name


# ---------------------------------------------------------------- random, EL2N, GraNd


def test_random_is_uniform():
    pool, hits = AnyPool(20), np.zeros(20)
    for seed in range(1000):
        hits[select(Random(), pool, 5, seed).indices] += 1
    assert np.abs(hits - 250).max() < 56  # four standard deviations


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


def test_a_method_is_known_by_the_methods_among_its_fields():
    digests = {source_digest(m) for m in (RandomLength(Random()), RandomLength(EL2N()), Random())}
    assert len(digests) == 3


@pytest.mark.parametrize(("method", "signal"), [(EL2N(), "el2n"), (GraNd(), "effort")])
def test_the_highest_scored_are_selected_and_ties_fall_by_seed(method: SelectionMethod, signal: str):
    scores = np.repeat([3.0, 1.0, 2.0], 10)
    pool = ArrayPool([f"{i}" for i in range(30)], {(signal, "target_tuned"): scores})
    chosen = [select(method, pool, 15, seed).indices for seed in range(4)]
    for indices in chosen:
        assert set(range(10)) < set(indices) < {*range(10), *range(20, 30)}
    assert len({tuple(indices) for indices in chosen}) > 1


def test_variants_reach_the_pool():
    asked: dict[str, Any] = {}

    class Recording(AnyPool):
        def scores(self, signal: str, model: str, indices: np.ndarray | None = None, **options: Any) -> np.ndarray:
            asked.update(options, model=model)
            return super().scores(signal, model, indices)

    for method in (EL2N("official"), CCS(variant="official"), D2(variant="official")):
        select(method, Recording(20), 5)
        assert asked.pop("variant") == "official" and asked["model"] == "target_tuned"
    fresh = {"rank": 81, "alpha": 16, "targets": ["q_proj", "v_proj"]}
    select(GraNd("last_v_b", fresh), Recording(20), 5)
    assert asked == {"model": "target_tuned", "gradient": "last_v_b", "fresh_adapter": fresh}


@pytest.mark.parametrize(
    ("method", "field"),
    [
        (EL2N, {"variant": "rms"}),
        (GraNd, {"gradient": "all"}),
        (CCS, {"num_strata": 0}),
        (CCS, {"beta": 1}),
        (CCS, {"beta": -0.1}),
        (D2, {"num_neighbors": 0}),
        (D2, {"gamma": -1}),
        (D2, {"features": "scaled"}),
    ],
)
def test_a_hyper_parameter_out_of_range_is_refused_with_field_and_value(method: type, field: dict[str, Any]):
    name, value = next(iter(field.items()))
    with pytest.raises(UserError, match=f"method.{name}={value!r}"):
        method(**field)


# ---------------------------------------------------------------- CCS


def el2n_pool(scores: np.ndarray) -> ArrayPool:
    return ArrayPool([f"sample {i}" for i in range(len(scores))], {("el2n", "target_tuned"): scores})


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("ccs_*.npz")), ids=lambda path: path.stem)
def test_ccs_agrees_with_the_authors_code(path: Path):
    golden = np.load(path, allow_pickle=False)
    coreset = select(CCS(), el2n_pool(golden["score"]), len(golden["coreset"]))
    table = coreset.diagnostics.set_index("stratum").sort_index()
    occupied = np.flatnonzero(golden["strata_num"])
    assert table.index.tolist() == occupied.tolist()
    assert table["size"].tolist() == golden["strata_num"][occupied].tolist()
    # Strata of equal size are served in any order: their budgets agree as a multiset.
    budgets = zip(table["size"], table["budget"])
    assert sorted(budgets) == sorted(zip(golden["strata_num"][occupied], golden["budgets"][occupied]))
    assert len(coreset.indices) == golden["budgets"].sum()


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.floats(-1e6, 1e6) | st.sampled_from([0.0, -1.0, 2.0, 5e-324]), min_size=1, max_size=60),
    st.sampled_from([1, 3, 50, 100]),
    st.sampled_from([0, 0.1, 0.5]),
    st.data(),
)
def test_ccs_never_falls_short_whatever_the_scores(scores: list[float], strata: int, beta: float, data: Any):
    eligible = len(scores) - int(beta * len(scores))
    budget = data.draw(st.integers(1, eligible))
    coreset = select(CCS(strata, beta), el2n_pool(np.array(scores)), budget)
    assert len(coreset.indices) == budget == coreset.diagnostics["budget"].sum()
    assert coreset.diagnostics["size"].sum() == eligible


def test_ccs_drops_the_hardest_and_refuses_a_budget_above_the_rest():
    pool = el2n_pool(np.arange(100.0))
    assert select(CCS(beta=0.2), pool, 80).indices.tolist() == list(range(80))
    with pytest.raises(UserError, match="81 samples cannot be met: 80 are eligible"):
        select(CCS(beta=0.2), pool, 81)


# ---------------------------------------------------------------- D2


def d2_pool(importance: np.ndarray, features: np.ndarray) -> ArrayPool:
    scores = {("el2n", "target_tuned"): importance, ("embedding", "target_tuned"): features}
    return ArrayPool([f"sample {i}" for i in range(len(importance))], scores)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("d2_*.npz")), ids=lambda path: path.stem)
def test_d2_agrees_with_the_authors_code(path: Path):
    golden = np.load(path, allow_pickle=False)
    neighbours, _ = nearest_neighbours(golden["features"], 5)
    edges = {(i, j) for i, row in enumerate(neighbours.tolist()) for j in row}
    assert edges | {(j, i) for i, j in edges} == set(map(tuple, golden["edges"].tolist()))
    coreset = select(D2(features="raw"), d2_pool(golden["importance"], golden["features"]), len(golden["coreset"]))
    np.testing.assert_allclose(coreset.scores["density"], golden["starting_density"], rtol=1e-6)
    assert set(coreset.indices) == set(golden["coreset"])


@settings(deadline=None, max_examples=100)
@given(
    n=st.integers(1, 300),
    dimensions=st.integers(1, 20),
    k=st.integers(1, 8),
    scale=st.sampled_from([1e-3, 1, 1e3]),
    offset=st.sampled_from([0, 1, 1e3]),
    kind=st.sampled_from(["plain", "duplicates", "grid", "constant"]),
    seed=st.integers(0, 2**32),
)
def test_nearest_neighbours_are_those_of_all_distances(
    n: int, dimensions: int, k: int, scale: float, offset: float, kind: str, seed: int
):
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, dimensions)) * scale + offset
    features = {
        "plain": features,
        "duplicates": features[rng.integers(0, n, n)],
        "grid": np.round(features, 1),
        "constant": np.full_like(features, offset),
    }[kind].astype(np.float32)
    positions, distances = nearest_neighbours(features, k)
    everything = cdist(features.astype(np.float64), features.astype(np.float64))
    np.testing.assert_allclose(np.take_along_axis(everything, positions, 1), distances, rtol=1e-12)
    np.fill_diagonal(everything, np.inf)
    np.testing.assert_allclose(distances, np.sort(everything, 1)[:, : min(k, n - 1)], rtol=1e-12)
    assert all(len({i, *row}) == len(row) + 1 for i, row in enumerate(positions.tolist()))


def test_neighbours_that_float32_cannot_tell_apart_are_found():
    # Points a millionth apart, far from their common mean: in float32 their squared distances are noise.
    rng = np.random.default_rng(0)
    features = np.concatenate([1e-5 * rng.normal(size=(200, 32)) + side for side in (-1, 1)]).astype(np.float32)
    _, distances = nearest_neighbours(features, 5)
    everything = cdist(features.astype(np.float64), features.astype(np.float64))
    np.testing.assert_allclose(distances, np.sort(everything, 1)[:, 1:6], rtol=1e-12)


def test_d2_covers_clusters_that_a_ranking_by_difficulty_passes_over():
    rng = np.random.default_rng(0)
    centres = 10 * rng.normal(size=(8, 16))
    cluster = np.repeat(np.arange(8), 25)
    features = centres[cluster] + rng.normal(size=(200, 16))
    importance = 1 + 0.1 * cluster + 0.01 * rng.random(200)  # the last cluster's samples are the hardest
    pool = d2_pool(importance, features)
    assert len(set(cluster[select(EL2N(), pool, 16).indices])) == 1
    assert len(set(cluster[select(D2(), pool, 16).indices])) == 8


def test_raw_features_of_a_large_scale_make_d2_a_ranking_by_el2n_and_it_says_so():
    rng = np.random.default_rng(0)
    pool = d2_pool(rng.random(200), 1000 * rng.normal(size=(200, 16)))
    raw, normalised = select(D2(features="raw"), pool, 40), select(D2(), pool, 40)
    assert (raw.indices == select(EL2N(), pool, 40).indices).all() and "too far apart" in raw.notes[0]
    assert set(normalised.indices) != set(raw.indices) and normalised.notes == ()


def test_d2_refuses_an_embedding_that_is_not_finite_by_the_name_of_its_sample():
    features = np.ones((20, 4))
    features[3, 2] = np.nan
    with pytest.raises(UserError, match="embedding of sample 'sample 3' is nan"):
        select(D2(), d2_pool(np.ones(20), features), 5)


def test_d2_takes_zero_embeddings_and_importance_below_zero():
    features = np.zeros((20, 4))
    coreset = select(D2(), d2_pool(np.linspace(-1, 1, 20), features), 20)
    assert len(coreset.indices) == 20 and (coreset.scores["density"] > 0).all()
