"""Methods that ask each epoch of a fine-tuning: S2L and its k-means, data maps, forgetting and AUM."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import vectors
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from support.any_pool import AnyPool, chosen, select

from baselines.cartography import (
    STATISTICS,
    Cartography,
    cartography_official,
    forgetting,
    forgetting_balanced_official,
    forgetting_events,
    learning_official,
    margins_official,
    training_dynamics_official,
)
from baselines.kmeans import kmeans, nearest, squared_distances
from baselines.s2l import S2L, clusters_to_serve, equal_shares, serve, trajectories
from staff.errors import UserError
from staff.selection import Draws

# ---------------------------------------------------------------- S2L


S2L_VECTORS = vectors("s2l")
every_case = pytest.mark.parametrize("case", S2L_VECTORS)


def priorities(n: int, seed: int = 0) -> np.ndarray:
    return Draws(seed, [f"sample {i}" for i in range(n)]).priorities("k-means")


# ---------------------------------------------------------------- recorded vectors


@every_case
def test_trajectories_take_the_recorded_checkpoints(case: str):
    vectors = S2L_VECTORS[case]
    as_read = vectors["losses"].T[:, vectors["glob_order"]]
    asked = int(vectors["num_loss_ckpts"])
    np.testing.assert_array_equal(trajectories(as_read, None if asked < 0 else asked), vectors["traj"])


@every_case
def test_points_go_to_the_recorded_centroids(case: str):
    vectors = S2L_VECTORS[case]
    sources = [source for source, ran in zip(vectors["source_order"], vectors["source_ran_kmeans"]) if ran]
    for source, centroids in zip(sources, vectors["centroids"]):
        members = vectors["source_code"] == source
        labels, _ = nearest(vectors["traj"][members], centroids)
        np.testing.assert_array_equal(labels, vectors["cluster"][members])


@every_case
def test_shares_sizes_and_with_the_recorded_draws_the_selection_are_the_recorded_ones(case: str):
    vectors, draws = S2L_VECTORS[case], np.random.RandomState(int(S2L_VECTORS[case]["np_seed"]))
    sources = [np.flatnonzero(vectors["source_code"] == source) for source in vectors["source_order"]]
    shares = equal_shares(sources, int(vectors["budget"]))
    sizes = [len(members) for members in sources]
    assert shares.tolist() == np.minimum(vectors["source_budget"], sizes).tolist() and sizes == sorted(sizes)
    selected = []
    for turn, (members, share) in enumerate(zip(sources, shares)):
        if share == len(members):
            selected.append(members)
            continue
        clusters = clusters_to_serve(vectors["cluster"][members], members, pooled_size=2)
        rows = vectors["serve"][vectors["serve"][:, 0] == turn]
        assert [len(m) for _, m in clusters][: len(rows)] == rows[:, 2].tolist()
        by_label = dict(clusters)  # in the recorded order: clusters of one size come as they fall there
        in_order = [(label, by_label[label]) for label in rows[:, 1]]
        rest = [cluster for cluster in clusters[len(rows) :] if cluster[0] == -1]
        selected += serve([*in_order, *rest], int(share), lambda of, n: draws.choice(of, n, replace=False))
    assert np.sort(np.concatenate(selected)).tolist() == vectors["selected"].tolist()


# ---------------------------------------------------------------- the method


def losses_in_blobs(sizes: list[int], seed: int = 0) -> np.ndarray:
    """Trajectories around as many well-separated centres as there are sizes, (sum of sizes, 4)."""
    rng = np.random.default_rng(seed)
    return np.repeat(np.arange(1, len(sizes) + 1) * 10.0, sizes)[:, None] + rng.normal(0, 0.1, (sum(sizes), 4))


def test_small_clusters_are_taken_whole_and_large_ones_share_what_is_left():
    sizes = [3, 10, 40, 50]
    pool = AnyPool(103, {"loss": losses_in_blobs(sizes)})
    coreset = S2L(num_clusters=4).select(pool, 50, Draws(0, pool.ids))  # type: ignore[arg-type]
    blob = np.repeat(range(4), sizes)[coreset.indices]
    assert np.bincount(blob).tolist() == [3, 10, 18, 19]
    assert coreset.diagnostics["size"].tolist() == sizes and coreset.diagnostics["budget"].sum() == 50
    assert pool.asked == [("loss", "small@epochs", "pool", {})]


def test_pooled_clusters_get_only_what_the_others_leave():
    pool = AnyPool(104, {"loss": losses_in_blobs([2, 2, 40, 60])})
    method = S2L(num_clusters=4, pooled_size=2)
    for budget, from_small in ((100, 0), (103, 3)):
        chosen = method.select(pool, budget, Draws(0, pool.ids)).indices  # type: ignore[arg-type]
        assert (chosen < 4).sum() == from_small and len(chosen) == budget


def test_groups_share_the_budget_first_unless_they_are_ignored():
    groups = ["small"] * 10 + ["large"] * 90
    pool = AnyPool(100, groups=groups)
    with_groups = S2L(num_clusters=5).select(pool, 40, Draws(0, pool.ids))  # type: ignore[arg-type]
    assert (with_groups.indices < 10).sum() == 10  # floor(40 / 2) is more than there are
    assert set(with_groups.diagnostics["group"]) == {"small", "large"}
    without = S2L(num_clusters=5, by_group=False).select(pool, 40, Draws(0, pool.ids))  # type: ignore[arg-type]
    assert set(without.diagnostics["group"]) == {"all"}


@settings(max_examples=100)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=12), st.integers(0, 3), st.data())
def test_serving_is_never_short_and_never_takes_more_from_a_smaller_cluster(sizes, pooled_size, data):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    budget = data.draw(st.integers(1, len(labels)))
    clusters = clusters_to_serve(labels, np.arange(len(labels)), pooled_size)
    chosen = serve(clusters, budget, lambda of, n: of[:n])
    assert sum(len(c) for c in chosen) == budget == len(np.unique(np.concatenate(chosen)))
    taken = [len(c) for (label, _), c in zip(clusters, chosen) if label != -1]
    assert taken == sorted(taken)


# ---------------------------------------------------------------- k-means


def test_kmeans_finds_blobs_that_lie_apart():
    truth = np.repeat(np.arange(5), [10, 40, 70, 20, 60])
    points = np.eye(5)[truth] * 200 + np.random.default_rng(1).normal(size=(200, 5))
    for seed in range(10):
        labels, centroids = kmeans(points, 5, priorities(200, seed))
        assert len(np.unique(truth * 5 + labels)) == 5 and centroids.shape == (5, 5)


@settings(max_examples=50)
@given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 5), st.booleans())
def test_kmeans_ends_at_means_of_nearest_points_or_after_its_iterations(n, k, seed, few_values):
    rng = np.random.default_rng(seed)
    points = rng.integers(0, 3, (n, 2)).astype(float) if few_values else rng.normal(size=(n, 3))
    labels, centroids = kmeans(points, k, priorities(n, seed), iterations=200)
    assert len(centroids) == min(k, len(np.unique(points, axis=0)))
    np.testing.assert_array_equal(labels, nearest(points, centroids)[0])
    for label in np.unique(labels):
        np.testing.assert_allclose(points[labels == label].mean(0), centroids[label], atol=1e-9)


@settings(max_examples=50)
@given(st.permutations(range(30)))
def test_kmeans_clusters_alike_in_every_order(order: list[int]):
    points, draws = np.random.default_rng(3).normal(size=(30, 4)), priorities(30)
    labels, centroids = kmeans(points, 6, draws)
    other, same = kmeans(points[order], 6, draws[order])
    np.testing.assert_array_equal(other, labels[order])
    np.testing.assert_array_equal(same, centroids)


def test_a_cluster_that_loses_all_its_points_moves_to_the_farthest_one(monkeypatch: pytest.MonkeyPatch):
    points = np.array([[0.0], [1], [2], [40]])
    monkeypatch.setattr("baselines.kmeans._start", lambda *_: np.array([[1.0], [999]]))
    labels, centroids = kmeans(points, 2, priorities(4))
    assert labels.tolist() == [0, 0, 0, 1] and centroids.ravel().tolist() == [1, 40]


def test_spherical_centroids_have_norm_one():
    points = np.random.default_rng(0).normal(size=(80, 6))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    _, centroids = kmeans(points, 7, priorities(80), spherical=True)
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1)


@settings(max_examples=50)
@given(arrays(np.float32, (7, 5), elements=st.floats(-1e3, 1e3, width=32)))
def test_squared_distances_are_right_and_exactly_zero_between_equal_rows(points: np.ndarray):
    points = points.astype(np.float64)
    distances = squared_distances(points, (points**2).sum(1), points)
    exact = ((points[:, None] - points[None]) ** 2).sum(2)
    np.testing.assert_allclose(distances, exact, atol=1e-11 * max(1, exact.max(), (points**2).sum(1).max()))
    assert (np.diag(distances) == 0).all()


# ---------------------------------------------------------------- data maps


VECTORS = vectors("cartography")
MAPS, EVENTS, AUM = (
    [case for case in VECTORS if case.startswith(name)] for name in ("cartography", "forgetting", "aum")
)


def pool_of(signal: str, values: np.ndarray) -> AnyPool:
    return AnyPool(len(values), {signal: values})


@pytest.mark.parametrize("epochs", [None, 3])
@pytest.mark.parametrize("case", MAPS)
def test_the_statistics_of_data_maps_are_those_of_the_released_code(case: str, epochs: int | None):
    golden = VECTORS[case]
    correct = (golden["logits"].argmax(axis=2) == golden["gold"])[:epochs]
    ours = training_dynamics_official(golden["true_prob"][:epochs].T, correct.T)
    for name, values in ours.items():
        np.testing.assert_allclose(values, golden[name + ("_burn3" if epochs else "")], atol=1e-7, err_msg=name)


@pytest.mark.parametrize("case", MAPS)
def test_selections_from_data_maps_have_the_released_values_and_size_whichever_way_ties_fall(case: str):
    golden = VECTORS[case]
    names = [name for name in golden if name.startswith("sel_")]
    assert len(names) >= 28
    for name in names:
        metric, ends, fraction = name.removeprefix("sel_").rsplit("_", 2)
        values = golden[metric]
        ours = cartography_official(values, metric, float(fraction), ends)
        assert values[ours].tolist() == values[golden[name]].tolist(), name


@pytest.mark.parametrize("case", EVENTS)
def test_counts_of_forgetting_are_those_of_both_released_codes(case: str):
    golden = VECTORS[case]
    correct = golden["correct"].T
    assert forgetting_events(correct).tolist() == golden["deepcore_events"].tolist()
    assert forgetting(correct).tolist() == golden["toneva_counts"].tolist()
    needed, first = learning_official(correct)
    assert needed.tolist() == golden["presentations_needed_to_learn"].tolist()
    np.testing.assert_array_equal(first, golden["first_learned"])


@pytest.mark.parametrize("case", EVENTS)
def test_the_most_forgotten_are_selected_as_by_deepcore_whichever_way_ties_fall(case: str):
    golden = VECTORS[case]
    pool = pool_of("correct", golden["correct"].T)
    events, labels = golden["deepcore_events"], golden["labels"]
    for fraction in ("0.1", "0.3", "0.7"):
        theirs = golden[f"selected_global_{fraction}"]
        ours = select(Cartography("forgetting_events"), pool, len(theirs)).indices
        assert sorted(events[ours]) == sorted(events[theirs])
        theirs = golden[f"selected_balanced_{fraction}"]
        ours = forgetting_balanced_official(events, labels, float(fraction))
        assert sorted(zip(labels[ours], events[ours])) == sorted(zip(labels[theirs], events[theirs]))


@pytest.mark.parametrize("case", AUM)
def test_margins_and_their_means_are_those_of_the_released_code(case: str):
    golden = VECTORS[case]
    margins, means = margins_official(golden["logits"], golden["targets"], golden["seen"])
    np.testing.assert_allclose(margins, golden["margins"], atol=1e-6)
    np.testing.assert_allclose(means, golden["aum"], atol=1e-6)
    if case != "aum_N60_constant":
        ours = select(Cartography("margin", "lowest"), pool_of("margin", means[:, None]), 20).indices
        assert set(ours) == set(golden["order_desc"][-20:])


def test_an_epoch_without_the_sample_does_not_count_and_one_never_seen_has_no_margin():
    logits = np.zeros((3, 2, 2))
    logits[:, 0, 0] = [1, 2, 6]
    margins, means = margins_official(logits, np.array([0, 1]), np.array([[1, 0], [0, 0], [1, 0]], dtype=bool))
    np.testing.assert_array_equal(margins, [[1, np.nan], [np.nan, np.nan], [6, np.nan]])
    np.testing.assert_array_equal(means, [3.5, np.nan])


def test_each_statistic_ranks_plain_trajectories_as_its_name_says():
    trajectories = {"probability": [[0.1, 0.9], [0.9, 0.9], [0.1, 0.1]], "correct": [[1, 0], [1, 1], [0, 0]]}
    first = {
        ("variability", "highest"): {"sample 0"},
        ("confidence", "highest"): {"sample 1"},
        ("confidence", "lowest"): {"sample 2"},
        ("threshold_closeness", "highest"): {"sample 0"},
        ("correctness", "highest"): {"sample 1"},
        ("forgetting", "highest"): {"sample 2"},
        ("forgetting_events", "highest"): {"sample 0"},
    }
    for (statistic, keep), ids in first.items():
        signal = STATISTICS[statistic][0]
        pool = pool_of(signal, np.array(trajectories[signal], dtype=float))
        assert chosen(Cartography(statistic, keep), pool, 1) == ids, statistic


@given(st.integers(1, 30), st.integers(1, 8), st.integers(0, 2**32))
def test_falls_add_up_to_what_was_lost_and_exceed_every_single_loss(n: int, epochs: int, seed: int):
    shares = np.random.default_rng(seed).integers(0, 5, (n, epochs)) / 4
    falls, rises = forgetting_events(shares), forgetting_events(1 - shares)
    np.testing.assert_allclose(falls - rises, shares[:, 0] - shares[:, -1])
    losses = [shares[:, i] - shares[:, j] for j in range(epochs) for i in range(j + 1)]
    assert (falls >= np.max(losses, axis=0)).all()
    assert (forgetting(shares) == np.where(shares.any(axis=1), falls, epochs)).all()


def test_one_checkpoint_leaves_a_note_and_a_random_choice():
    coreset = select(Cartography(), pool_of("probability", np.random.default_rng(0).random((40, 1))), 10)
    assert len(coreset.indices) == 10
    assert coreset.notes == ("variability needs more than one checkpoint: set finetune.small_epochs above 1.",)


def test_a_value_that_is_not_finite_at_one_checkpoint_names_its_sample_and_bad_fields_their_choices():
    values = np.random.default_rng(0).random((5, 3))
    values[3, 1] = np.nan
    for statistic, (signal, _) in STATISTICS.items():
        with pytest.raises(UserError, match=f"{signal} at a checkpoint of sample 'sample 3' is nan"):
            select(Cartography(statistic), pool_of(signal, values), 2)
    with pytest.raises(UserError, match=r"method.statistic='entropy' is unknown: choose variability or"):
        Cartography("entropy")
    with pytest.raises(UserError, match=r"method.keep='middle' is unknown: choose highest or lowest"):
        Cartography(keep="middle")
