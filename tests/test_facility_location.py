"""Facility location against recorded orders, and the blocked greedy choice against the plain one."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.any_pool import AnyPool, select
from support.golden import recorded

from baselines import facility_location as module
from baselines.facility_location import (
    FacilityLocation,
    exponential,
    greedy,
    half_cosine,
    kernel_matrix,
    lazy_greedy,
    superfiltering_official,
)
from staff.errors import UserError

VECTORS = recorded("facility_location")
PLAIN = [case for case in VECTORS if "superfiltering" not in case]


def recorded_kernel(case: str) -> np.ndarray:
    golden = VECTORS[case]
    return golden["kernel"] if "kernel" in golden else kernel_matrix(golden["embeddings"], case.split("_")[-1])


def replay(kernel: np.ndarray, order: np.ndarray) -> tuple[float, np.ndarray]:
    """By how much each pick misses the largest gain, at worst, and the gains, in float64."""
    kernel, covered, worst, gains = kernel.astype(np.float64), np.zeros(len(kernel)), 0.0, []
    left = np.ones(kernel.shape[1], dtype=bool)
    for pick in order:
        now = np.maximum(kernel - covered[:, None], 0).sum(axis=0)
        worst = max(worst, now[left].max() - now[pick])
        gains.append(now[pick])
        left[pick] = False
        covered = np.maximum(covered, kernel[:, pick])
    return worst, np.array(gains)


@pytest.mark.parametrize("case", PLAIN)
def test_the_lazy_order_and_gains_are_those_of_submodlib(case: str):
    golden = VECTORS[case]
    order, gains = lazy_greedy(recorded_kernel(case), len(golden["order"]))
    assert order.tolist() == golden["order"].tolist()
    np.testing.assert_allclose(gains, golden["gains"], atol=1e-6)


@pytest.mark.parametrize("case", [case for case in PLAIN if "dense" in case and "N60" in case])
def test_kernels_are_those_of_submodlib_to_the_last_bit_but_for_the_exponential(case: str):
    golden = VECTORS[case]
    kernel = kernel_matrix(golden["embeddings"], case.split("_")[-1])
    np.testing.assert_array_max_ulp(kernel, golden["kernel"], maxulp=0 if "cosine" in case else 1)


@pytest.mark.parametrize("case", PLAIN)
def test_the_blocked_choice_is_greedy_on_recorded_kernels_whichever_way_ties_fall(case: str):
    golden, kernel = VECTORS[case], recorded_kernel(case)
    order, gains, covered = greedy(lambda r, c: kernel[np.ix_(r, c)], *kernel.shape, len(golden["order"]))
    worst, replayed = replay(kernel, order)
    assert worst < 1e-5 and len(set(order)) == len(order)
    np.testing.assert_allclose(gains, replayed, atol=1e-5)
    np.testing.assert_array_equal(covered, np.maximum(kernel[:, order].max(axis=1), 0))


@pytest.mark.parametrize("case", [case for case in VECTORS if case not in PLAIN])
def test_superfiltering_with_diversity_selects_what_was_recorded(case: str):
    golden = VECTORS[case]
    count, budget = int(golden["ifd_num"]), int(golden["fla_num"])
    kept, selected = superfiltering_official(golden["embeddings"], golden["ifd"], count, budget)
    assert kept.tolist() == golden["kept_after_ifd"].tolist()
    assert selected.tolist() == golden["selected"].tolist()


@pytest.mark.parametrize(("similarity", "metric"), [(half_cosine, "half_cosine"), (exponential, "euclidean")])
def test_similarities_in_blocks_are_those_of_the_whole_matrix(similarity, metric: str):
    embeddings = np.random.default_rng(0).normal(size=(40, 12)).astype(np.float32)
    embeddings[7] = 0
    rows, columns = np.array([7, 3, 11]), np.arange(40)
    block = similarity(embeddings)(rows, columns)
    np.testing.assert_allclose(block, kernel_matrix(embeddings, metric)[rows], atol=1e-4)


@settings(deadline=None, max_examples=40)
@given(
    n=st.integers(1, 90),
    kind=st.sampled_from(["plain", "duplicates", "grid", "constant", "zero"]),
    seed=st.integers(0, 2**32),
    share=st.sampled_from([1, 2, 16]),
    data=st.data(),
)
def test_few_exact_gains_and_small_blocks_still_give_the_greedy_choice(
    n: int, kind: str, seed: int, share: int, data: st.DataObject
):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, 5))
    x = {
        "plain": x,
        "duplicates": x[rng.integers(0, n, n)],
        "grid": np.round(x),
        "constant": np.ones((n, 5)),
        "zero": np.where(rng.random((n, 1)) < 0.3, 0, x),
    }[kind].astype(np.float32)
    budget = data.draw(st.integers(1, n))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "ROWS", 7)
        patch.setattr(module, "COLUMNS", 11)
        patch.setattr(module, "ACTIVE_SHARE", share)
        patch.setattr(module, "FEWEST_ACTIVE", 1)
        order, gains, _ = greedy(half_cosine(x), n, n, budget)
    assert len(set(order)) == budget
    worst, replayed = replay(kernel_matrix(x, "half_cosine"), order)
    assert worst < 1e-4
    np.testing.assert_allclose(gains, replayed, atol=1e-4)


def test_every_cluster_is_represented_before_any_is_represented_twice():
    centres = np.eye(6, 10)
    members = np.repeat(np.arange(6), 20)
    x = centres[members] + 0.05 * np.random.default_rng(0).normal(size=(120, 10))
    pool = AnyPool(120, {"embedding": x})
    coreset = select(FacilityLocation(of="target"), pool, 6)
    assert sorted(members[coreset.indices]) == list(range(6))
    assert coreset.scores["coverage"].min() > 0.9
    assert np.isfinite(coreset.scores["gain"]).sum() == 6


def test_an_embedding_that_is_not_finite_names_its_sample_and_an_unknown_similarity_its_choices():
    x = np.ones((5, 3))
    x[3, 1] = np.nan
    pool = AnyPool(5, {"embedding": x})
    with pytest.raises(UserError, match=r"the embedding of sample 'sample 3' is nan"):
        select(FacilityLocation(), pool, 2)
    with pytest.raises(UserError, match=r"method.similarity='dot' is unknown: choose cosine or euclidean"):
        FacilityLocation(similarity="dot")
