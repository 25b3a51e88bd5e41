"""Methods that rank the pool by length, perplexity or IFD, and facility location, against recorded vectors."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import vectors
from hypothesis import given, settings
from hypothesis import strategies as st
from support.any_pool import AnyPool, select

from baselines import facility_location as facility
from baselines.facility_location import (
    FacilityLocation,
    exponential,
    greedy,
    half_cosine,
    kernel_matrix,
    lazy_greedy,
    nearest_alone,
    superfiltering_official,
)
from baselines.ifd import (
    IFD,
    cherry_official,
    difficulty,
    is_kept,
    pre_experience_official,
    preference,
    superfiltering_rate_official,
    vicuna_official,
)
from baselines.length import Length
from baselines.perplexity import Perplexity, ccds_official, window_from
from staff.errors import UserError

# ---------------------------------------------------------------- length, perplexity and IFD

PERPLEXITY, DIFFICULTY = vectors("perplexity"), vectors("ifd")


@pytest.mark.parametrize(
    ("which", "expected"), [("top", [37, 38, 39]), ("middle", [19, 20, 21]), ("low", [0, 1, 2])]
)
def test_length_selects_the_longest_the_shortest_or_those_around_the_median(which: str, expected: list[int]):
    pool = AnyPool(40)
    pool.answer_lengths = np.arange(40)
    assert select(Length(which), pool, 3).indices.tolist() == expected


def test_among_answers_of_one_length_the_draw_decides():
    pool = AnyPool(40)
    pool.answer_lengths = np.repeat([5, 9, 30], [20, 19, 1])
    hits = np.zeros(40)
    for seed in range(400):
        hits[select(Length(), pool, 3, seed).indices] += 1
    assert hits[39] == 400 and hits[:20].sum() == 0
    assert np.abs(hits[20:39] - 400 * 2 / 19).max() < 4 * np.sqrt(400 * 2 / 19)


# ---------------------------------------------------------------- perplexity


@pytest.mark.parametrize("case", PERPLEXITY)
def test_the_top_and_the_middle_of_perplexity_are_the_recorded_ones(case: str):
    vectors = PERPLEXITY[case]
    order = np.argsort(-vectors["nll"], kind="stable")
    for name in (name for name in vectors if name.startswith(("top_", "mid_"))):
        budget = int(name.split("_")[1].removeprefix("b"))
        start = 0 if name.startswith("top") else 0.33
        assert window_from(order, start, budget).tolist() == vectors[name].tolist(), name


@pytest.mark.parametrize("case", PERPLEXITY)
def test_the_lowest_perplexities_are_the_set_that_ccds_keeps(case: str):
    perplexities = PERPLEXITY[case]["ccds_ppl"]
    pool = AnyPool(len(perplexities), {"loss": np.log(perplexities)})
    for name, kept in PERPLEXITY[case].items():
        if name.endswith("_ascending") and len(kept):
            assert set(select(Perplexity("low"), pool, len(kept)).indices) == set(kept), name


@pytest.mark.parametrize("case", PERPLEXITY)
def test_shuffled_thirds_of_the_lowest_come_in_the_recorded_order(case: str):
    for name in (name for name in PERPLEXITY[case] if name.endswith("_idx") and name.startswith("ccds")):
        _, which, share, seed, _ = name.split("_")
        ours = ccds_official(PERPLEXITY[case]["ccds_ppl"], float(share[1:]), int(seed[4:]), which)
        assert ours.tolist() == PERPLEXITY[case][name].tolist(), name


def test_a_middle_that_would_end_past_the_pool_moves_up_and_says_so():
    pool = AnyPool(60, {"loss": np.arange(60.0)[::-1]})  # the highest loss first
    method = Perplexity("middle", middle_start=0.33)
    within = select(method, pool, 20)
    assert within.indices.tolist() == list(range(19, 39)) and not within.filled and not within.notes
    past = select(method, pool, 50)
    assert past.indices.tolist() == list(range(10, 60)) and past.filled == 9 and past.notes


def test_perplexity_asks_for_the_text_that_is_set():
    pool = AnyPool(8)
    select(Perplexity(text="all"), pool, 3)
    assert pool.asked == [("loss", "target", "pool", {"text": "all"})]


# ---------------------------------------------------------------- IFD


def means(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    parts = np.split(values, np.cumsum(lengths)[:-1])
    return np.array([part.mean(dtype=np.float64) if len(part) else np.nan for part in parts])


@pytest.mark.parametrize("case", [case for case in DIFFICULTY if case.startswith("cherry")])
def test_cherrys_ratio_and_the_ratios_it_selects_are_the_recorded_ones(case: str):
    vectors = DIFFICULTY[case]
    given, alone = (means(vectors[f"{a}_answer_loss"], vectors[f"{a}_answer_len"]) for a in ("whole", "direct"))
    scores = vectors["ifd"]  # NaN where the sample was cut, which a pool has none of
    measured = np.isfinite(scores)
    np.testing.assert_allclose(difficulty(given, alone, "losses")[measured], scores[measured], rtol=1e-7)
    kept = is_kept(scores, "losses", 1.0)
    assert "kept" not in vectors or kept.tolist() == vectors["kept"].tolist()
    order = np.argsort(-preference(scores, kept), kind="stable")
    for name in (name for name in vectors if name.startswith("selected")):
        chosen = order[: len(vectors[name])]
        assert sorted(scores[chosen]) == sorted(scores[vectors[name]]), name
    if "vic" in case:
        for name, count in (("rate_0.06", 3), ("rate_0.5", 30), ("number_5", 5)):
            assert vicuna_official(scores, count).tolist() == vectors[f"selected_sample_{name}"].tolist()


@pytest.mark.parametrize("case", [case for case in DIFFICULTY if "cherry" in case and "vic" not in case])
def test_cherrys_selection_is_the_recorded_one_where_a_nan_is_kept_too(case: str):
    vectors = DIFFICULTY[case]
    kept, names = vectors["kept"], [name for name in vectors if name.startswith("selected")]
    assert np.isnan(vectors["ifd"][kept]).any() == case.startswith("nan") and len(names) > 3
    for name in names:
        number = name.rpartition("_")[2]
        count = int(number) if "number" in name else int(kept.sum() * float(number))
        assert cherry_official(vectors["ifd"], kept, count).tolist() == vectors[name].tolist(), name
    assert len(cherry_official(vectors["ifd"], kept, 0)) == kept.sum()


def test_before_it_scores_cherrys_model_sees_evenly_spread_samples_of_middling_perplexity():
    labels, perplexity = np.repeat([0, 1, 2], [3, 9, 40]), np.r_[5.0, 1, 9, np.arange(9), np.arange(40)[::-1]]
    picked = pre_experience_official(labels, perplexity, count=4, low=25, high=75)
    # A small cluster whole; ranks 2 to 6, every one, at most four; ranks 9.75 to 29.25, every fifth of twenty.
    assert picked.tolist() == [0, 1, 2, 5, 6, 7, 8, 22, 27, 32, 37]


@pytest.mark.parametrize("case", [case for case in DIFFICULTY if case.startswith("super")])
def test_superfilterings_ratio_and_what_it_selects_are_the_recorded_ones(case: str):
    vectors = DIFFICULTY[case]
    scores = vectors["ifd_ppl"]  # 0 where the released code failed on the sample
    computed = difficulty(vectors["loss_condition"], vectors["loss_direct"], "perplexities")
    np.testing.assert_allclose(computed[scores != 0], scores[scores != 0], rtol=1e-6)
    for name in (name for name in vectors if name.startswith("selected")):
        rate, _, limit = name.removeprefix("selected_rate_").partition("_thresh_")
        expected = vectors[name].tolist()
        assert superfiltering_rate_official(scores, float(rate), float(limit or 1)).tolist() == expected, name
        order = np.argsort(-preference(scores, is_kept(scores, "perplexities", float(limit or 1))), kind="stable")
        assert order[: len(expected)].tolist() == expected, name


class WithAndWithoutPrompt(AnyPool):
    """Losses given the prompt, and 1 without it."""

    def ask(self, signal, of, at=None, view="pool", **options):
        values = super().ask(signal, of, at, view, **options)
        return values if options.get("prompt", True) else np.ones(len(values))


def test_what_the_prompt_makes_harder_is_dropped_and_fills_up_only_what_is_short_nearest_first():
    pool = WithAndWithoutPrompt(6, {"loss": np.array([0.2, 0.9, 1.0, 1.1, 3.0, 0.5])})
    assert select(IFD(), pool, 3).indices.tolist() == [1, 2, 5]
    filled = select(IFD(), pool, 5)
    assert filled.indices.tolist() == [0, 1, 2, 3, 5] and filled.filled == 1 and "1 samples" in filled.notes[0]
    assert select(IFD(ratio="perplexities"), pool, 3).indices.tolist() == [0, 1, 5]  # 1 itself is dropped


def test_an_answer_of_no_loss_without_its_prompt_is_refused_by_its_id():
    pool = AnyPool(3, {"loss": np.array([0.5, 0.0, 0.5])})
    with pytest.raises(UserError, match="IFD of sample 'sample 1' is nan"):
        select(IFD(), pool, 2)


# ---------------------------------------------------------------- facility location


KERNELS = vectors("facility_location")
PLAIN = [case for case in KERNELS if "superfiltering" not in case]


def recorded_kernel(case: str) -> np.ndarray:
    golden = KERNELS[case]
    if "sparse" in case:
        kernel = np.zeros((golden["size"], golden["size"]), dtype=np.float32)
        kernel[golden["row"], golden["col"]] = golden["val"]
        return nearest_alone(kernel, int(golden["num_neighbors"]))
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
    golden = KERNELS[case]
    order, gains = lazy_greedy(recorded_kernel(case), len(golden["order"]))
    assert order.tolist() == golden["order"].tolist()
    np.testing.assert_allclose(gains, golden["gains"], atol=1e-6)


@pytest.mark.parametrize("case", [case for case in PLAIN if "dense" in case and "N60" in case])
def test_kernels_are_those_of_submodlib_to_the_last_bit_but_for_the_exponential(case: str):
    golden = KERNELS[case]
    kernel = kernel_matrix(golden["embeddings"], case.split("_")[-1])
    np.testing.assert_array_max_ulp(kernel, golden["kernel"], maxulp=0 if "cosine" in case else 1)


@pytest.mark.parametrize("case", PLAIN)
def test_the_blocked_choice_is_greedy_on_recorded_kernels_whichever_way_ties_fall(case: str):
    golden, kernel = KERNELS[case], recorded_kernel(case)
    order, gains, covered = greedy(lambda r, c: kernel[np.ix_(r, c)], *kernel.shape, len(golden["order"]))
    worst, replayed = replay(kernel, order)
    assert worst < 1e-5 and len(set(order)) == len(order)
    np.testing.assert_allclose(gains, replayed, atol=1e-5)
    np.testing.assert_array_equal(covered, np.maximum(kernel[:, order].max(axis=1), 0))


@pytest.mark.parametrize("case", [case for case in KERNELS if case not in PLAIN])
def test_superfiltering_with_diversity_selects_what_was_recorded(case: str):
    golden = KERNELS[case]
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


def test_of_its_nearest_alone_a_sample_keeps_itself_and_pairs_count_from_either_side():
    kernel = np.array([[1, 0.9, 0.5], [0.9, 1, 0.8], [0.5, 0.8, 1]], dtype=np.float32)
    expected = [[1, 0.9, 0], [0.9, 1, 0.8], [0, 0.8, 1]]  # the third keeps the second, which keeps the first
    np.testing.assert_array_equal(nearest_alone(kernel, 2), np.float32(expected))


def test_apricots_kernels_are_squared_cosines_and_what_is_left_of_the_largest_squared_distance():
    x = np.array([[0, 0], [3, 4], [6, 8], [-4, 3]], dtype=np.float32)
    cosines = [[1, 0, 0, 0], [0, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1]]  # a zero vector is like itself alone
    np.testing.assert_allclose(kernel_matrix(x, "apricot_cosine"), cosines, atol=1e-6)
    distances = np.array([[0, 25, 100, 25], [25, 0, 25, 50], [100, 25, 0, 125], [25, 50, 125, 0]])
    np.testing.assert_allclose(kernel_matrix(x, "apricot_euclidean"), 125 - distances)


@settings(max_examples=40)
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
        patch.setattr(facility, "ROWS", 7)
        patch.setattr(facility, "COLUMNS", 11)
        patch.setattr(facility, "ACTIVE_SHARE", share)
        patch.setattr(facility, "FEWEST_ACTIVE", 1)
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
