"""Methods that rest on embeddings: RDS+, k-center, Moderate, coverage by k-means, prototypes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import vectors
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from support.any_pool import AnyPool, chosen, select

import baselines.k_center as k_center
from baselines.asks import unit_rows
from baselines.k_center import KCenter, balanced_official, farthest_first
from baselines.kmeans_coverage import KMeansCoverage
from baselines.moderate import Moderate, distances_to_median, middle_ranks
from baselines.prototypes import Prototypes, prototype_distances
from baselines.rds_plus import RDSPlus, best_first, select_multi_task_official, select_official, take_turns
from staff.errors import UserError

RDS, CENTERS, MODERATE, PROTOTYPES = map(vectors, ("rds_plus", "k_center", "moderate", "prototypes"))


def in_blobs(sizes: list[int], dimensions: int = 6) -> np.ndarray:
    """Points around as many orthogonal centres as there are sizes."""
    centres = np.repeat(np.eye(len(sizes), dimensions) * 50, sizes, axis=0)
    return (centres + np.random.default_rng(0).normal(size=centres.shape)).astype(np.float32)


@pytest.mark.parametrize("method", [RDSPlus(), KCenter(), Moderate(), KMeansCoverage(), Prototypes()])
def test_embeddings_are_asked_as_the_fields_say(method: Any):
    pool = AnyPool(12)
    changed = type(method)(of="small", layer=5, pooling="last_token")
    select(changed, pool, 3)
    options = {"layer": 5, "pooling": "last_token"}
    assert all((of, asked) == ("small", options) for _, of, _, asked in pool.asked) and pool.asked


# ---------------------------------------------------------------- RDS+


def weighted_mean(hidden: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The mean of each text's states, token t weighted by t."""
    parts = np.split(hidden, np.cumsum(lengths)[:-1])
    return np.array([np.average(part, axis=0, weights=np.arange(1, len(part) + 1)) for part in parts])


@pytest.mark.parametrize("case", [case for case in RDS if case.startswith("pool")])
def test_unit_rows_of_weighted_means_have_the_recorded_cosines(case: str):
    vectors = RDS[case]
    points = unit_rows(weighted_mean(vectors["hidden"], vectors["lengths"]))
    queries = unit_rows(weighted_mean(vectors["q_hidden"], vectors["q_lengths"]))
    np.testing.assert_allclose(points, vectors["index"], atol=1e-6)
    np.testing.assert_allclose(queries @ points.T, vectors["sims"], atol=1e-6)


@pytest.mark.parametrize("case", [case for case in RDS if case.startswith("select")])
def test_turns_maxima_and_means_select_what_is_recorded(case: str):
    vectors, seen = RDS[case], set()
    for key in (key for key in vectors if key.endswith("_idx")):
        name, budget = key.removesuffix("_idx").removeprefix("max_json").rsplit("_b", 1)
        ours = select_official(vectors["scores"], int(budget), name or "max")
        assert ours.tolist() == vectors[key].tolist(), key
        seen.add(name)
    assert len(seen) >= 6


def test_by_turns_infinite_scores_are_passed_over_and_a_budget_above_the_samples_is_refused():
    scores = np.array([[-np.inf, 0.3, 0.2, 0.1], [0.4, 0.1, 0.2, np.inf]])
    assert select_official(scores, 3, "min").tolist() == [1, 3, 2]
    with pytest.raises(UserError, match="a budget of 5 is more than the 4 samples"):
        select_official(scores, 5, "max")


def test_tasks_take_turns_as_queries_do_and_those_reduced_by_a_mean_take_the_lowest():
    scores = [np.array([[0.9, 0.0, 0.1, 0.2], [0.0, 0.8, 0.1, 0.2]]), np.array([[0.7, 0.1, 0.6, 0.5]])]
    expected = {"max": [0, 1, 2], "min": [0, 1, 3], "mean": [2, 1, 3]}
    for method, picked in expected.items():
        assert select_multi_task_official(scores, 3, method).tolist() == picked, method
    assert select_multi_task_official(scores, 2, "mean", "mean_maximize").tolist() == [0, 2]


@settings(max_examples=100)
@given(arrays(np.int8, st.tuples(st.integers(1, 6), st.integers(1, 20)), elements=st.integers(0, 4)), st.data())
def test_in_turns_every_query_gets_its_best_sample_that_is_left(scores: np.ndarray, data: st.DataObject):
    budget = data.draw(st.integers(1, scores.shape[1]))
    ranked = best_first(scores.astype(float), budget)
    picked = take_turns(ranked, budget, lose_turn=False)
    assert len(set(picked.tolist())) == budget
    left = np.ones(scores.shape[1], dtype=bool)
    for turn, sample in enumerate(picked):
        query = scores[turn % len(scores)]
        assert query[sample] == query[left].max()
        left[sample] = False


def test_a_query_whose_choice_is_taken_goes_on_or_loses_its_turn():
    ranked = np.array([[0, 1, 2, 3], [0, 2, 1, 3], [3, 0, 1, 2]])
    assert take_turns(ranked, 3, lose_turn=False).tolist() == [0, 2, 3]
    assert take_turns(ranked, 3, lose_turn=True).tolist() == [0, 3, 1]


@pytest.mark.parametrize("lose_turn", [False, True])
def test_blocks_of_queries_change_nothing(lose_turn: bool, monkeypatch: pytest.MonkeyPatch):
    pool = AnyPool(80, {"embedding/dev": np.random.default_rng(2).normal(size=(23, 8))})
    whole = select(RDSPlus(lose_turn=lose_turn), pool, 30)
    monkeypatch.setattr("baselines.rds_plus.BLOCK_QUERIES", 5)
    blocks = select(RDSPlus(lose_turn=lose_turn), pool, 30)
    assert whole.indices.tolist() == blocks.indices.tolist()
    np.testing.assert_allclose(whole.scores["highest_similarity"], blocks.scores["highest_similarity"], rtol=1e-6)


@pytest.mark.parametrize("aggregate", ["round_robin", "max", "mean", "normalised_mean"])
def test_a_sample_like_the_slice_is_selected_and_one_of_norm_zero_is_not_preferred(aggregate: str):
    points = np.random.default_rng(0).normal(size=(30, 8))
    points[:5] = 0
    pool = AnyPool(30, {"embedding": points, "embedding/dev": points[[9, 9, 9]] * 7})
    chosen = select(RDSPlus(aggregate=aggregate), pool, 1)
    assert chosen.indices.tolist() == [9] and (chosen.scores["highest_similarity"][:5] == 0).all()


def test_a_validation_sample_that_is_not_finite_is_refused():
    queries = np.ones((3, 8))
    queries[2, 1] = np.inf
    with pytest.raises(UserError, match="'2 of the validation slice' is inf"):
        select(RDSPlus(), AnyPool(10, {"embedding/dev": queries}), 3)


# ---------------------------------------------------------------- k-center


@pytest.mark.parametrize("case", CENTERS)
@pytest.mark.parametrize("window", [2048, 8])
def test_farthest_points_come_in_the_recorded_order_until_only_duplicates_are_left(
    case: str, window: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(k_center, "WINDOW", window)
    vectors = CENTERS[case]
    exact = int(vectors["exact_prefix"])
    picked, radii = farthest_first(vectors["embeddings"], vectors["start"], len(vectors["order"]))
    assert picked[:exact].tolist() == vectors["order"][:exact].tolist()
    # Equal points are as far as rounding has it in the released code, and 0 here.
    np.testing.assert_allclose(radii, vectors["radius"], atol=5e-3)
    np.testing.assert_allclose(radii[:exact], vectors["radius"][:exact], atol=1e-5)
    extra = 1 if vectors["seed"] >= 0 else 0  # a random start is part of the budget
    for budget in (b for b in vectors["budgets"] if b - extra <= exact):
        chosen = {*vectors["start"].tolist(), *picked[: budget - extra].tolist()}
        assert chosen == set(vectors[f"selected_{budget}"].tolist())


@settings(max_examples=60)
@given(st.integers(2, 60), st.integers(0, 5), st.booleans(), st.data())
def test_every_pick_is_the_first_of_the_farthest_points_whatever_the_window(n, seed, on_grid, data):
    rng = np.random.default_rng(seed)
    points = rng.integers(0, 4, (n, 2)) if on_grid else rng.normal(size=(n, 3))
    exact = ((points[:, None] - points[None]) ** 2).sum(2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(k_center, "WINDOW", data.draw(st.integers(1, n + 1)))
        picked, radii = farthest_first(points, np.array([0]), n - 1)
    centres = [0]
    for pick, radius in zip(picked.tolist(), radii):
        to_nearest = exact[:, centres].min(1)
        to_nearest[centres] = -1
        np.testing.assert_allclose(radius**2, to_nearest.max(), atol=1e-9)
        if on_grid:
            assert pick == to_nearest.argmax()
        centres.append(pick)
    assert sorted(centres) == list(range(n))


@pytest.mark.parametrize("fraction", [0.05, 0.3, 1.0])
def test_by_class_every_pick_is_the_farthest_of_its_class(fraction: float):
    rng = np.random.default_rng(0)
    points, labels = rng.integers(0, 9, (60, 2)).astype(np.float32), rng.integers(0, 3, 60)
    starts = np.array([rng.choice(np.flatnonzero(labels == label)) for label in range(3)])
    picked, expected = balanced_official(points, labels, fraction, starts), []
    for label, start in enumerate(starts.tolist()):
        members, chosen = np.flatnonzero(labels == label), [start]
        while len(chosen) < round(fraction * len(members)):
            squares = ((points[members][:, None] - points[chosen]) ** 2).sum(axis=2).min(axis=1)
            squares[np.isin(members, chosen)] = -1
            chosen.append(int(members[squares.argmax()]))
        expected += chosen
    assert picked.tolist() == expected


def test_k_center_reaches_every_blob_before_any_twice_and_reports_its_radius():
    pool = AnyPool(100, {"embedding": in_blobs([1, 9, 30, 60])})
    for seed in range(5):
        coreset = select(KCenter(features="raw"), pool, 4, seed)
        assert np.searchsorted([1, 10, 40], coreset.indices, side="right").tolist() == [0, 1, 2, 3]
        assert (np.diff(coreset.diagnostics["radius"]) <= 0).all() and len(coreset.diagnostics) == 3


def test_normalised_features_ignore_the_norm_which_raw_features_follow():
    points = np.random.default_rng(0).normal(size=(50, 8))
    pool, stretched = AnyPool(50, {"embedding": points}), points.copy()
    stretched[7] *= 1000
    other = AnyPool(50, {"embedding": stretched})
    assert select(KCenter(), pool, 9).indices.tolist() == select(KCenter(), other, 9).indices.tolist()
    assert 7 in select(KCenter(features="raw"), other, 2).indices


# ---------------------------------------------------------------- Moderate


@pytest.mark.parametrize("case", MODERATE)
def test_distances_to_the_median_and_ranks_are_the_recorded_ones_for_classes_of_two_or_more(case: str):
    vectors = MODERATE[case]
    alone = (np.bincount(vectors["labels"]) == 1)[vectors["labels"]]  # the released median of these is a scalar
    distances = np.where(
        alone, vectors["distance"], distances_to_median(vectors["features"], vectors["labels"], np.ones(len(alone)))
    )
    np.testing.assert_allclose(distances, vectors["distance"], atol=1e-6)
    for rate in vectors["rates"]:
        name = f"{rate:g}" if rate < 1 else "1.0"
        first, end = middle_ranks(len(distances), rate)
        assert [first, end] == vectors[f"range_{name}"].tolist()
        kept = np.argsort(distances, kind="stable")[first:end]
        # As values, because equal distances come in any order there.
        recorded_distances = np.sort(vectors["distance"][vectors[f"kept_{name}"]])
        np.testing.assert_allclose(np.sort(distances[kept]), recorded_distances, atol=1e-6)


@pytest.mark.parametrize(("classes", "largest"), [("one", 62), ("groups", 12)])
def test_moderate_keeps_the_middle_ranks_by_distance_to_the_median_of_the_pool_or_the_group(
    classes: str, largest: int
):
    line = np.concatenate([np.arange(-12.0, 13.0), 100 + np.arange(-12.0, 13.0)])  # medians 50, or 0 and 100
    pool = AnyPool(50, {"embedding": line[:, None]}, groups=["a"] * 25 + ["b"] * 25)
    coreset = select(Moderate(classes=classes, features="raw"), pool, 10)
    distances = coreset.scores["distance"]
    assert sorted(distances[coreset.indices]) == np.sort(distances)[20:30].tolist()
    assert distances.max() == largest


def test_moderate_by_kmeans_measures_from_the_median_of_each_cluster():
    sizes = [20, 40, 60]
    pool = AnyPool(120, {"embedding": in_blobs(sizes)})
    coreset = select(Moderate(classes="kmeans", num_clusters=3, features="raw"), pool, 30)
    assert sorted(np.bincount(coreset.scores["class"])) == sizes
    assert coreset.scores["distance"].max() < 10  # from one median they would lie at 50


def test_classes_by_groups_need_groups():
    with pytest.raises(UserError, match="classes=groups needs groups"):
        select(Moderate(classes="groups"), AnyPool(10), 3)


# ---------------------------------------------------------------- coverage and prototypes


@pytest.mark.parametrize("case", PROTOTYPES)
def test_nearest_prototypes_distances_and_orders_are_the_recorded_ones(case: str):
    vectors, metric = PROTOTYPES[case], case.split("_", 2)[2]
    labels, distances = prototype_distances(vectors["embeddings"], vectors["centroids"], metric)
    assert labels.tolist() == vectors["nearest"].tolist()
    assert np.bincount(labels, minlength=len(vectors["centroids"])).tolist() == vectors["cluster_sizes"].tolist()
    np.testing.assert_allclose(distances[vectors["order_hard_first"]], vectors["sort_distance"], atol=1e-6)
    assert np.lexsort((-distances, labels)).tolist() == vectors["order_hard_first"].tolist()
    assert np.lexsort((distances, labels)).tolist() == vectors["order_easy_first"].tolist()


@pytest.mark.parametrize("metric", ["cosine_spherical", "cosine", "l2"])
def test_hard_prototypes_are_the_farthest_and_easy_ones_the_nearest(metric: str):
    pool = AnyPool(100, {"embedding": in_blobs([40, 60])})
    hard = select(Prototypes(num_clusters=2, metric=metric), pool, 30)
    easy = select(Prototypes(num_clusters=2, metric=metric, keep="easy"), pool, 70)
    assert not set(hard.indices) & set(easy.indices)
    distances = hard.scores["distance"]
    assert distances[hard.indices].min() >= distances[easy.indices].max()


@pytest.mark.parametrize("pick", ["random", "nearest", "farthest"])
def test_coverage_shares_the_budget_out_equally_and_picks_inside_a_cluster_as_told(pick: str):
    sizes = [4, 30, 60]
    pool = AnyPool(94, {"embedding": in_blobs(sizes)})
    coreset = select(KMeansCoverage(num_clusters=3, pick=pick), pool, 44)
    blob = np.repeat(range(3), sizes)
    assert np.bincount(blob[coreset.indices]).tolist() == [4, 20, 20]
    assert coreset.diagnostics["size"].tolist() == sizes
    distances, left = coreset.scores["distance"], np.setdiff1d(np.arange(94), coreset.indices)
    inside, outside = (distances[which[blob[which] == 2]] for which in (coreset.indices, left))
    assert (inside.max() <= outside.min()) == (pick == "nearest")
    assert (inside.min() >= outside.max()) == (pick == "farthest")


@pytest.mark.parametrize("method", [Prototypes(), Prototypes(metric="l2"), KMeansCoverage(pick="farthest")])
def test_equal_distances_on_a_grid_fall_alike_in_every_order_of_the_pool(method: Any):
    for seed in range(6):
        rng = np.random.default_rng(seed)
        pool = AnyPool(97, {"embedding": rng.integers(-1, 2, (97, 16)).astype(np.float32)})
        for budget in (1, 40):
            other = pool.reordered(rng.permutation(97))
            assert chosen(method, other, budget) == chosen(method, pool, budget)
