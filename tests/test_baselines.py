"""The baselines of the paper. What every method keeps: test_methods.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import vectors
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist
from support.any_pool import DrawnPool, select

from baselines.ccs import CCS
from baselines.d2 import D2
from baselines.el2n import EL2N
from baselines.grand import GraNd, grand_official
from baselines.neighbours import nearest_neighbours
from baselines.random import Random
from baselines.random_matched import RandomMatched
from baselines.rs2 import RS2
from baselines.within_groups import WithinGroups
from staff import ArrayPool
from staff.errors import UserError
from staff.selection import Coreset, SelectionMethod
from staff.signals.effort import Effort

VECTORS = {method: vectors(method) for method in ("ccs", "d2")}  # of the authors' code


# ---------------------------------------------------------------- random, RS2, EL2N, GraNd


def test_random_is_uniform():
    pool, hits = DrawnPool(20), np.zeros(20)
    for seed in range(1000):
        hits[select(Random(), pool, 5, seed).indices] += 1
    assert np.abs(hits - 250).max() < 56  # four standard deviations


def test_rs2_is_uniform_in_every_epoch_and_draws_each_apart():
    pool, hits, shared = DrawnPool(20), np.zeros((2, 20)), []
    for seed in range(1000):
        first, second = select(RS2(2), pool, 5, seed).schedule  # type: ignore[misc]
        hits[0, first] += 1
        hits[1, second] += 1
        shared.append(len(np.intersect1d(first, second)))
    assert np.abs(hits - 250).max() < 60
    assert abs(np.mean(shared) - 5 * 5 / 20) < 0.12  # four standard errors of a hypergeometric mean


@given(st.integers(1, 40), st.integers(1, 8), st.data())
def test_rs2_without_repeats_takes_no_sample_again_before_all_others(n: int, epochs: int, data: st.DataObject):
    budget = data.draw(st.integers(1, n))
    coreset = select(RS2(epochs, repeats=False), DrawnPool(n), budget)
    assert coreset.schedule is not None and coreset.schedule.shape == (epochs, budget)
    times = np.bincount(coreset.schedule.ravel(), minlength=n)
    assert times.max() - times.min() <= 1 and times.sum() == epochs * budget
    assert coreset.scores["epochs"].tolist() == times.tolist()
    assert coreset.indices.tolist() == coreset.schedule[0].tolist()
    assert coreset.trained.tolist() == np.flatnonzero(times).tolist()


def test_rs2_within_groups_keeps_the_quotas_in_every_epoch_and_a_schedule_is_stored(tmp_path: Path):
    pool = DrawnPool(50)
    coreset = select(WithinGroups(RS2(3)), pool, 10)
    assert coreset.schedule is not None and (np.diff(coreset.schedule) > 0).all()
    for chosen in coreset.schedule:
        assert np.unique(pool.groups[chosen], return_counts=True)[1].tolist() == [2, 8]
    coreset.save(tmp_path, pool.ids)
    assert Coreset.load(tmp_path).schedule.tolist() == coreset.schedule.tolist()  # type: ignore[union-attr]


def test_a_schedule_that_breaks_the_budget_in_any_epoch_is_refused_and_no_twin_of_one_is_drawn():
    @dataclass(frozen=True)
    class Broken:
        schedule: Any

        def select(self, pool: Any, budget: int, rng: Any) -> Coreset:
            return Coreset.by_epoch(np.array(self.schedule))

    with pytest.raises(UserError, match="chose position 4 2 times"):
        select(Broken([[1, 2], [4, 4]]), DrawnPool(5), 2)
    with pytest.raises(UserError, match="chose 3 samples, not the 2"):
        select(Broken([[1, 2, 3]]), DrawnPool(5), 2)
    with pytest.raises(UserError, match=r"method.reference selects other samples for every epoch"):
        select(RandomMatched(RS2(2)), DrawnPool(20), 5)
    with pytest.raises(UserError, match=r"method.epochs=0 must be a whole number of at least 1"):
        RS2(0)


@pytest.mark.parametrize(("method", "signal"), [(EL2N(), "el2n"), (GraNd(), Effort("all_lora"))])
def test_the_highest_scored_are_selected_and_ties_fall_by_seed(method: SelectionMethod, signal: Any):
    scores = np.repeat([3.0, 1.0, 2.0], 10)
    pool = ArrayPool([f"{i}" for i in range(30)], {(signal, "target_tuned"): scores})
    chosen = [select(method, pool, 15, seed).indices for seed in range(4)]
    for indices in chosen:
        assert set(range(10)) < set(indices) < {*range(10), *range(20, 30)}
    assert len({tuple(indices) for indices in chosen}) > 1


@pytest.mark.parametrize("method", [EL2N("official"), CCS(variant="official"), D2(variant="official")])
def test_a_variant_reaches_the_pool(method: SelectionMethod):
    pool = DrawnPool(20)
    select(method, pool, 5)
    signal, of, _ = pool.asked[0]
    assert (signal.name, signal.variant, of) == ("el2n", "official", "target_tuned")


def test_the_gradient_of_grand_reaches_the_pool():
    pool, fresh = DrawnPool(20), {"rank": 81, "alpha": 16, "targets": ["q_proj", "v_proj"]}
    select(GraNd("last_v_b", fresh), pool, 5)
    assert pool.asked == [(Effort("last_v_b", fresh), "target_tuned", "pool")]


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


@pytest.mark.parametrize("case", VECTORS["ccs"])
def test_ccs_agrees_with_the_authors_code(case: str):
    golden = VECTORS["ccs"][case]
    coreset = select(CCS(), el2n_pool(golden["score"]), len(golden["coreset"]))
    table = coreset.diagnostics.set_index("stratum").sort_index()
    occupied = np.flatnonzero(golden["strata_num"])
    assert table.index.tolist() == occupied.tolist()
    assert table["size"].tolist() == golden["strata_num"][occupied].tolist()
    # Strata of equal size are served in any order: their budgets agree as a multiset.
    budgets = zip(table["size"], table["budget"])
    assert sorted(budgets) == sorted(zip(golden["strata_num"][occupied], golden["budgets"][occupied]))
    assert len(coreset.indices) == golden["budgets"].sum()


@settings(max_examples=100)
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


@pytest.mark.parametrize("case", VECTORS["d2"])
def test_d2_agrees_with_the_authors_code(case: str):
    golden = VECTORS["d2"][case]
    neighbours, _ = nearest_neighbours(golden["features"], 5)
    edges = {(i, j) for i, row in enumerate(neighbours.tolist()) for j in row}
    assert edges | {(j, i) for i, j in edges} == set(map(tuple, golden["edges"].tolist()))
    coreset = select(D2(features="raw"), d2_pool(golden["importance"], golden["features"]), len(golden["coreset"]))
    np.testing.assert_allclose(coreset.scores["density"], golden["starting_density"], rtol=1e-6)
    assert set(coreset.indices) == set(golden["coreset"])


@settings(max_examples=100)
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


@settings(max_examples=20)
@given(
    n=st.integers(1, 400), k=st.integers(1, 8), kind=st.sampled_from(["plain", "duplicates"]), seed=st.integers(0)
)
def test_approximate_neighbours_are_k_others_at_their_true_distances(n: int, k: int, kind: str, seed: int):
    pytest.importorskip("faiss")
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n, 8)).astype(np.float32)
    features = features[rng.integers(0, n, n)] if kind == "duplicates" else features
    positions, distances = nearest_neighbours(features, k, "approximate")
    assert all(len({i, *row}) == len(row) + 1 for i, row in enumerate(positions.tolist()))
    everything = cdist(features.astype(np.float64), features.astype(np.float64))
    np.testing.assert_allclose(np.take_along_axis(everything, positions, 1), distances, rtol=1e-12)
    assert np.isfinite(distances).all()


def test_approximate_neighbours_are_nearly_all_the_nearest_ones_and_the_same_ones_again():
    pytest.importorskip("faiss")
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(250, 32))
    features = (centres[rng.integers(0, 250, 5000)] + rng.normal(size=(5000, 32))).astype(np.float32)
    exact, found, again = (nearest_neighbours(features, 5, how)[0] for how in ("exact", *["approximate"] * 2))
    recall = np.mean([len({*one} & {*other}) / 5 for one, other in zip(exact.tolist(), found.tolist())])
    assert 0.9 < recall < 1, "it looks into a part of the cells, and that is enough"
    np.testing.assert_array_equal(found, again)


def test_an_approximate_search_without_faiss_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"method.search=approximate needs faiss: pip install 'staff-cor"):
        D2(search="approximate")


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


def test_the_released_grand_is_the_gradient_norm_of_a_last_layer_over_the_size_of_its_batch():
    rng = np.random.default_rng(0)
    hidden, labels = torch.tensor(rng.normal(size=(11, 4))), torch.tensor(rng.integers(0, 3, 11))
    weight, bias = torch.tensor(rng.normal(size=(3, 4)), requires_grad=True), torch.zeros(3, dtype=torch.float64)
    bias.requires_grad_()
    norms = []
    for state, label in zip(hidden, labels):
        loss = torch.nn.functional.cross_entropy(weight @ state + bias, label)
        norms.append(torch.cat([g.ravel() for g in torch.autograd.grad(loss, (weight, bias))]).norm().item())
    given = hidden.numpy(), (hidden @ weight.T + bias).detach().numpy(), labels.numpy()
    np.testing.assert_allclose(grand_official(*given), norms, rtol=1e-12)
    np.testing.assert_allclose(
        grand_official(*given, batch_size=4), np.divide(norms, [4] * 8 + [3] * 3), rtol=1e-12
    )
