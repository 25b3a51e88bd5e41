"""TSDS against recorded neighbours, densities and masses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.any_pool import AnyPool, chosen, pool_of, select
from support.golden import recorded

from baselines import tsds as module
from baselines.tsds import (
    TSDS,
    assign_mass,
    assign_mass_official,
    density_official,
    kernel_density,
    nearest_candidates,
)
from staff.errors import UserError

VECTORS = recorded("tsds")


@pytest.mark.parametrize("case", VECTORS)
def test_masses_levels_and_last_neighbours_are_those_of_the_released_code(case: str):
    golden = VECTORS[case]
    found = [golden[name] for name in ("top_indices", "top_dists", "top_kdes")]
    for alpha in golden["alphas"].tolist():
        given = (*found, len(golden["candidates"]), alpha, float(golden["C"]))
        if f"failed_{alpha}" in golden:
            with pytest.raises(ValueError, match="more than all of its mass"):
                assign_mass_official(*given)
            continue
        mass, level, last = assign_mass_official(*given)
        np.testing.assert_allclose(mass, golden[f"probs_{alpha}"], atol=1e-12)
        assert level == pytest.approx(float(golden[f"s_{alpha}"]), rel=1e-12)
        assert last.tolist() == golden[f"lastK_{alpha}"].tolist()


@pytest.mark.parametrize("case", VECTORS)
def test_neighbours_and_densities_are_the_released_ones_whichever_way_ties_fall(case: str):
    golden = VECTORS[case]
    candidates, queries = golden["candidates"], golden["queries"]
    neighbours, distances = nearest_candidates(candidates, queries, int(golden["max_K"]))
    np.testing.assert_allclose(distances, golden["top_dists"], atol=1e-5)
    if "dup" not in case and "grid" not in case and "constant" not in case:
        assert neighbours.tolist() == golden["top_indices"].tolist()
    if golden["sigma"] > 0:
        found, where = np.unique(golden["top_indices"], return_inverse=True)
        density = density_official(candidates[found], float(golden["sigma"]), int(golden["kde_K_used"]))
        np.testing.assert_allclose(density[where].reshape(neighbours.shape), golden["top_kdes"], rtol=1e-5)


@settings(deadline=None, max_examples=60)
@given(
    queries=st.integers(1, 6),
    count=st.integers(1, 8),
    alpha=st.sampled_from([0, 0.3, 0.9, 0.999, 1]),
    seed=st.integers(0, 2**32),
)
def test_mass_adds_up_to_one_and_each_query_hands_out_its_share(queries: int, count: int, alpha: float, seed: int):
    rng = np.random.default_rng(seed)
    neighbours = np.stack([rng.permutation(20)[:count] for _ in range(queries)])
    distances = np.sort(rng.random((queries, count)), axis=1)
    density = rng.uniform(0.5, 4, (queries, count))
    mass, level, last = assign_mass(neighbours, distances, density, 20, alpha, 5)
    assert mass.min() >= 0 and mass.sum() == pytest.approx(1)
    assert (last < max(count - 1, 1)).all() and level > 0
    if alpha == 1 and count > 1:  # alignment alone: all of it to the nearest
        np.testing.assert_allclose(mass, np.bincount(neighbours[:, 0], minlength=20) / queries)


def test_the_density_over_the_pool_in_blocks_is_the_plain_sum():
    points = np.random.default_rng(0).normal(size=(90, 3)).astype(np.float32)
    squared = ((points[:, None].astype(np.float64) - points) ** 2).sum(axis=2)
    plain = np.maximum(1 - squared / 1.5**2, 0).sum(axis=1)
    at = np.array([5, 80, 3])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ROWS", 2)
        patch.setattr(module, "COLUMNS", 7)
        np.testing.assert_allclose(kernel_density(points, at, 1.5), plain[at], rtol=1e-5)


def near_and_far(n: int = 100) -> AnyPool:
    """Samples 0 to 4 lie at the slice, 5 to 9 are copies of one near it, the others are far away."""
    rng = np.random.default_rng(0)
    x = np.concatenate(
        [rng.normal([9, 0, 0], 1.5, (5, 3)), np.tile([9, 6.0, 0], (5, 1)), rng.normal([-9, 0, 0], 1, (n - 10, 3))]
    )
    dev = rng.normal([9, 0, 0], 0.1, (3, 3))
    return AnyPool(n, {"embedding": x, "embedding/dev": dev})


def test_samples_near_the_slice_come_first_and_copies_share_their_mass():
    pool = near_and_far(120)  # twelve neighbours each
    coreset = select(TSDS(alpha=0, sigma=0.2), pool, 5)
    mass = coreset.scores["mass"]
    assert coreset.indices.tolist() == list(range(5)) and coreset.filled == 0
    assert mass[:5].min() > 1.2 * mass[5:10].max() > 0
    uniform = select(TSDS(alpha=0, density="uniform"), pool, 10).scores["mass"]
    np.testing.assert_allclose(uniform[:10], uniform[0])


def test_what_no_mass_reaches_is_drawn_counted_and_noted():
    coreset = select(TSDS(), near_and_far(), 30)
    reached = int((coreset.scores["mass"] > 0).sum())
    assert len(coreset.indices) == 30 and coreset.filled == 30 - reached > 0
    assert coreset.notes == (f"{30 - reached} samples without mass were drawn at random: raise max_neighbors.",)
    assert select(TSDS(), near_and_far(), 30, seed=1).indices.tolist() != coreset.indices.tolist()


@pytest.mark.parametrize("density", ["pool", "neighbours", "uniform"])
def test_the_order_of_the_pool_changes_nothing(density: str):
    for constant in (False, True):
        pool, method = pool_of(150, constant=constant), TSDS(density=density)
        order = np.random.default_rng(0).permutation(150)
        assert chosen(method, pool.reordered(order), 40) == chosen(method, pool, 40)


@pytest.mark.parametrize(
    ("field", "said"),
    [
        ({"alpha": 1.5}, r"method.alpha=1.5 must be a number of at least 0 and at most 1"),
        ({"sigma": 0}, r"method.sigma=0 must be a number"),
        ({"max_neighbors": 1}, r"method.max_neighbors=1 must be a whole number of at least 2"),
        ({"density": "kde"}, r"method.density='kde' is unknown"),
    ],
)
def test_bad_fields_are_refused(field: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        TSDS(**field)


def test_embeddings_that_are_not_finite_are_refused_by_name_in_the_pool_and_in_the_slice():
    for key, at, name in (("embedding", 4, "'sample 4'"), ("embedding/dev", 2, "'2 of the validation slice'")):
        pool = near_and_far()
        pool.given[key][at, 1] = np.nan
        with pytest.raises(UserError, match=f"the embedding of sample {name} is nan"):
            select(TSDS(), pool, 3)
