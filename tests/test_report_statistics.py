"""The report's statistics keep what they promise, in simulations where the truth is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from support.records import copied, only_context

from experiments.report import performance
from experiments.report.comparisons import mean
from experiments.report.statistics import (
    Difference,
    holm,
    power,
    seed_variance,
    seeds_needed,
    seeds_to_decide,
    t_interval,
    typical,
    with_seeds,
)
from experiments.report.supplementary import region_similarity
from experiments.report.variance import BetweenSeeds, Layout, between_seeds

SITUATIONS = {  # standard deviations of differences over seeds, over test samples, and of single answers
    "seeds differ": (1.0, 1.0, 0.0),
    "samples differ": (0.0, 10.0, 3.0),
    "single answers differ": (0.0, 1.0, 10.0),
    "seeds and single answers differ": (1.0, 1.0, 6.0),
    "all differ": (0.7, 6.0, 6.0),
}


def simulated(
    rng: np.random.Generator, spreads: tuple[float, float, float], effect: float, shape: tuple[int, int, int]
) -> Difference:
    """The difference of two methods of a layout, the first `effect` better; `shape`: methods, seeds, samples."""
    methods, seeds, samples = shape
    of_seed, of_sample, of_answer = np.array(spreads) / np.sqrt(2)
    values = rng.normal(25, 15, size=samples) + rng.normal(0, 2, size=(1, seeds, 1))  # what all have in common
    values = (
        values + of_seed * rng.normal(size=(methods, seeds, 1)) + of_sample * rng.normal(size=(methods, 1, samples))
    )
    values = values + of_answer * rng.normal(size=shape)
    values[0] += effect
    return Layout([f"{i}" for i in range(methods)], values, [np.arange(seeds)]).difference("0", "1")


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize(("methods", "seeds"), [(2, 1), (2, 3), (6, 2), (6, 3)])
def test_intervals_hold_the_true_difference_as_often_as_they_say(situation: str, methods: int, seeds: int):
    spreads = SITUATIONS[situation] if seeds > 1 else (0.0, *SITUATIONS[situation][1:])
    rng = np.random.default_rng(0)
    found = [simulated(rng, spreads, 2.0, (methods, seeds, 60)) for _ in range(700)]
    held = np.mean([abs(d.mean - 2.0) <= d.half for d in found])
    assert 0.925 <= held <= 0.985, f"{held:.3f} of 95 % intervals"  # 700 simulations: within 0.016 of the truth


def test_a_null_is_declared_significant_no_more_often_than_stated_at_any_level():
    rng = np.random.default_rng(1)
    for spreads in SITUATIONS.values():
        p = np.array([simulated(rng, spreads, 0.0, (6, 3, 60)).p for _ in range(1000)])
        assert np.mean(p <= 0.05) <= 0.07 and np.mean(p <= 0.005) <= 0.012, spreads


def test_methods_that_vary_alike_lend_one_another_degrees_of_freedom_and_two_alone_have_two():
    rng = np.random.default_rng(2)
    found = {k: [simulated(rng, (1.0, 0.01, 0.0), 0.0, (k, 3, 60)) for _ in range(300)] for k in (2, 6, 9)}
    assert [max(d.freedom for d in found[k]) for k in (2, 6, 9)] == [2, 10, 16]
    assert all(np.mean([d.freedom for d in found[k]]) > 5 for k in (6, 9))
    assert np.mean([d.half for d in found[6]]) < 0.85 * np.mean([d.half for d in found[2]])


def pooled(means: np.ndarray) -> BetweenSeeds:
    """The textbook rule: every pair has twice the residual mean square of methods by seeds."""
    methods, seeds = means.shape[-2:]
    residual = means - means.mean(axis=-1, keepdims=True) - means.mean(axis=-2, keepdims=True)
    residual += means.mean(axis=(-1, -2), keepdims=True)
    freedom = (methods - 1) * (seeds - 1)
    shape = (*means.shape[:-1], methods)
    variance = 2 * (residual**2).sum(axis=(-1, -2), keepdims=True) / freedom
    return BetweenSeeds(np.broadcast_to(variance, shape), np.full(shape, freedom))


def paired(means: np.ndarray) -> BetweenSeeds:
    return between_seeds(means[:, :2])


def rejected(
    deviations: Sequence[float],
    seeds: int,
    errors: float = 0.0,
    rule: Callable[[np.ndarray], BetweenSeeds] = between_seeds,
    draws: int = 2000,
) -> float:
    """The percentage of tests at 5 % that reject that the first two of some methods are equal.

    Args:
        deviations: of the methods over seeds; an effect of the seed is common to them.
        errors: the true difference, in standard errors where both methods have a deviation of 1.
    """
    rng = np.random.default_rng([len(deviations), seeds])
    means = rng.normal(size=(draws, len(deviations), seeds)) * np.array(deviations)[:, None]
    means += 2 * rng.normal(size=(draws, 1, seeds))
    means[:, 0] += errors * np.sqrt(2 / seeds)
    between = rule(means)
    t = (means[:, 0] - means[:, 1]).mean(axis=-1) / np.sqrt(between.variance[:, 0, 1] / seeds)
    return 100 * float(np.mean(2 * stats.t.sf(abs(t), between.freedom[:, 0, 1]) <= 0.05))


def size_and_power(methods: int, seeds: int, draws: int = 2000) -> list[float]:
    """A row of the table in experiments/README.md."""
    alike, noisy, very = [1.0] * methods, [3.0] + [1.0] * (methods - 1), [10.0] + [1.0] * (methods - 1)
    size = [rejected(deviations, seeds, draws=draws) for deviations in (alike, noisy, very)]
    power = [rejected(deviations, seeds, 3.5, draws=draws) for deviations in (alike, very[::-1])]
    others = [rejected(noisy, seeds, 0.0, pooled, draws)]
    others += [rejected(alike, seeds, 3.5, rule, draws) for rule in (pooled, paired)]
    return size + power + others


def test_size_and_power_are_those_of_the_readme_and_a_noisy_method_borrows_no_variance_from_the_others():
    table = Path("experiments/README.md").read_text().split("tests at 5 % reject")[1].split("\n\n")[1].splitlines()
    rows = [[float(cell) for cell in line.strip("|").split("|")] for line in table[2:]]
    assert [row[:2] for row in rows] == [[methods, seeds] for methods in (3, 6, 8) for seeds in (3, 5, 10)]
    for methods, seeds, *stated in rows:
        found = size_and_power(int(methods), int(seeds))
        assert found == pytest.approx(stated, abs=3.5), (methods, seeds)  # 2,000 simulations: three standard errors
        *size, power, beside_noisy, size_if_pooled, power_if_pooled, power_if_paired = found
        assert max(size) <= (8.5 if seeds == 3 else 7), (methods, seeds, size)
        assert size_if_pooled > max(size) + 1, (methods, seeds)
        assert power_if_pooled > power > power_if_paired - 2, (methods, seeds)
        assert beside_noisy > power_if_paired - 2 or methods == 3, (methods, seeds)


@pytest.mark.parametrize("seeds", [3, 5])
def test_a_true_null_is_rejected_as_often_as_stated_with_many_methods_constant_ones_or_all_unlike(seeds: int):
    unlike = (0.5, 2, 0.5, 1, 1.5, 0.5)
    for deviations in (unlike, (0, *[1] * 5), (0.1, *[1] * 7), (5, *[1] * 7), (3, *[1] * 23), (*[1] * 5, 10)):
        assert rejected(deviations, seeds) <= 8, deviations


def test_a_much_noisier_method_leaves_the_group_and_its_pairs_have_their_own_variance():
    rng = np.random.default_rng(4)
    means = rng.normal(size=(6, 5))
    means[4] *= 50
    found, without = between_seeds(means), between_seeds(np.delete(means, 4, axis=0))
    assert found.freedom[0, 4] == 4 < found.freedom[0, 5] <= 16
    assert found.variance[0, 4] == pytest.approx((means[0] - means[4]).var(ddof=1))
    assert found.variance[0, 5] == pytest.approx(without.variance[0, 4])
    leaves = between_seeds(rng.normal(size=(4000, 6, 3))).freedom.max(axis=(1, 2)) < 10
    assert np.mean(leaves) == pytest.approx(0.05, abs=0.015), "of six methods that vary alike"


def test_the_variance_of_a_layout_is_the_residual_mean_square_of_methods_by_seeds():
    means = np.array([[1.0, 2.0, 4.0], [2.0, 2.0, 3.0]])
    found = between_seeds(means)
    assert found.variance[0, 1] == pytest.approx((means[0] - means[1]).var(ddof=1)) and found.freedom[0, 1] == 2
    seed_effect = np.array([5.0, -3.0, 1.0])
    assert between_seeds(means + seed_effect).variance == pytest.approx(found.variance)


def test_in_a_grid_of_both_seeds_an_interval_holds_the_truth_as_often_as_it_says_whichever_seed_matters():
    rng = np.random.default_rng(9)
    selection, finetune = (grid.ravel() for grid in np.meshgrid(range(3), range(3), indexing="ij"))
    for of_selection, of_finetuning in ((1, 0), (1, 1), (0.1, 1)):
        held = []
        for _ in range(400):
            noise = of_selection * rng.normal(size=(4, 3))[:, selection]
            noise = noise + of_finetuning * rng.normal(size=(4, 3))[:, finetune]
            values = noise[:, :, None] + rng.normal(size=(4, 9, 60))
            found = Layout("abcd", values, [selection, finetune]).difference("a", "b")
            held.append(abs(found.mean) <= found.half)
        assert np.mean(held) >= 0.92, (of_selection, of_finetuning, np.mean(held))


def test_pairing_sees_what_the_means_of_two_methods_apart_would_not():
    difference = simulated(np.random.default_rng(3), (0.0, 0.5, 0.5), 0.5, (2, 3, 100))
    assert difference.p is not None and difference.p < 0.01, "though single answers differ by 15 points"


def test_one_seed_has_an_interval_over_samples_and_no_p():
    difference = simulated(np.random.default_rng(4), (0.0, 5.0, 0.0), 3.0, (6, 1, 60))
    assert difference.p is None and difference.half > 0 and difference.of_seeds == 0


def test_answers_that_never_differ_are_no_difference_and_nothing_is_divided_by_zero():
    same = Layout("abc", np.stack([np.full((3, 5), 20.0)] * 2 + [np.full((3, 5), 21.0)]), [np.arange(3)])
    assert (same.difference("a", "b").p, same.difference("a", "b").half) == (1, 0)
    assert (same.difference("c", "a").mean, same.difference("c", "a").p) == (1, 0)
    assert seeds_needed(same.difference("a", "b"), 1.0) == 2


@given(st.floats(-30, 30), st.floats(0.01, 10), st.integers(2, 5), st.integers(2, 500), st.floats(0, 1))
def test_a_difference_is_significant_where_its_interval_leaves_zero_out(mean, error, seeds, samples, share):
    difference = Difference(mean, seeds, samples, share * error**2, 5.0 * (seeds - 1), (1 - share) * error**2)
    assert difference.p is not None
    assert abs(difference.half - abs(mean)) < 1e-9 or (difference.p < 0.05) == (difference.half < abs(mean))
    assert difference.above(1.0) + difference.below(1.0) == pytest.approx(1)


@pytest.mark.parametrize("spreads", [(1.0, 0.0, 0.0), (1.0, 4.0, 0.0)])
def test_with_the_seeds_that_are_planned_an_effect_is_found_four_times_in_five(spreads: tuple[float, float, float]):
    rng = np.random.default_rng(7)
    pilots = [simulated(rng, spreads, 0.0, (6, 3, 400)) for _ in range(200)]
    seeds = seeds_needed(typical(pilots), 1.0)
    assert seeds is not None and 4 <= seeds <= 16
    shares = [
        np.mean([simulated(rng, spreads, 1.0, (6, n, 400)).p <= 0.05 for _ in range(200)]) for n in (seeds, 3)
    ]
    assert shares[0] >= 0.72 and shares[1] < shares[0] - 0.1, (seeds, shares)  # within 0.06 of the truth


def test_seeds_are_planned_for_what_is_asked_and_none_help_where_test_samples_are_too_few():
    measured = Difference(mean=0.8, seeds=3, samples=300, of_seeds=0.3, freedom=10.0, of_samples=0.02)
    needed = [seeds_needed(measured, effect) for effect in (2.0, 1.0, 0.5)]
    assert None not in needed and needed == sorted(needed) and needed[0] < needed[2]  # type: ignore[type-var]
    assert power(with_seeds(measured, needed[1]), 1.0) >= 0.8 > power(with_seeds(measured, needed[1] - 1), 1.0)
    assert with_seeds(measured, 6).of_seeds == pytest.approx(0.15) and with_seeds(measured, 6).freedom == 25
    few = Difference(mean=0.8, seeds=3, samples=20, of_seeds=0.3, freedom=10.0, of_samples=0.5)
    assert seeds_needed(few, 0.5) is None
    assert seeds_needed(Difference(0.8, 1, 300, 0.0, 0.0, 0.02), 1.0) is None, "one seed tells nothing of others"


def test_a_difference_near_zero_is_decided_as_equal_and_a_large_one_as_a_difference():
    near, large, between = (Difference(mean, 3, 300, 0.3, 10.0, 0.002) for mean in (0.02, 2.0, 0.5))
    for difference, other in ((near, large), (large, near)):
        decided = seeds_to_decide(difference, 1.0)
        assert decided is not None and 3 < decided < 15 and seeds_to_decide(other, 1.0) is not None
    assert seeds_to_decide(between, 1.0) > max(seeds_to_decide(near, 1.0), seeds_to_decide(large, 1.0))  # type: ignore[operator]


def test_t_intervals_over_seeds_cover_as_stated_and_one_seed_has_none():
    rng = np.random.default_rng(5)
    intervals = [t_interval(rng.normal(10, 2, size=3)) for _ in range(2000)]
    assert 0.935 <= np.mean([abs(mean - 10) <= half for mean, half in intervals if half]) <= 0.965
    assert t_interval([4.0]) == (4.0, None)
    assert t_interval([1.0, 2.0, 3.0]) == pytest.approx((2.0, 4.302653 * 1 / np.sqrt(3)))


def test_holm_agrees_with_a_known_case():
    # R: p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm")
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_holm_lies_between_no_correction_and_bonferronis(p: list[float]):
    adjusted = holm(p)
    assert np.all(adjusted >= np.array(p)) and np.all(adjusted <= np.minimum(1, np.array(p) * len(p)) + 1e-12)
    assert np.all(np.diff(adjusted[np.argsort(p, kind="stable")]) >= 0), "the order of the p-values is kept"


def test_the_variance_of_selection_and_of_fine_tuning_seeds_is_separated():
    rng = np.random.default_rng(6)
    estimates = []
    for _ in range(300):
        selection, finetuning = rng.normal(0, 2, size=(4, 1)), rng.normal(0, 1, size=(1, 5))
        estimates.append(seed_variance(20 + selection + finetuning + rng.normal(0, 0.5, size=(4, 5))))
    mean = [np.mean([getattr(e, part) for e in estimates]) for part in ("selection", "finetuning", "rest")]
    assert mean == pytest.approx([4, 1, 0.25], rel=0.2)


def test_regions_are_alike_where_both_models_rank_alike_and_by_chance_where_nothing_is_shared():
    rng = np.random.default_rng(0)
    small = rng.random(5000)
    same = region_similarity(small, 3 * small + 1, 10)
    assert (same["same region"], same["mean overlap"], same["Spearman"]) == (1, 1, pytest.approx(1))
    other = region_similarity(small, rng.random(5000), 10)
    assert other["same region"] == pytest.approx(other["by chance"], abs=0.02) == pytest.approx(0.1, abs=0.02)
    shifted = region_similarity(np.arange(10.0), np.array([*range(1, 10), 0.0]), 2)
    assert shifted["same region"] == 0.8 and shifted["mean overlap"] == pytest.approx(4 / 6)
    assert region_similarity(np.ones(5), small[:5], 3)["Spearman"] != 1


def test_variance_is_split_where_the_grid_has_both_seeds(real: Path, tmp_path: Path):
    rng = np.random.default_rng(3)
    for selection, chance in enumerate(rng.normal(0, 3, size=4)):
        for finetune in range(3):
            answers = np.full(5, 20 + chance + rng.normal(0, 0.01))
            copied(real, tmp_path, "staff", 0.5, (selection, finetune), answers)
    context = only_context(tmp_path)
    table = performance.variance(context)
    assert table is not None and table.cells.loc[0, "grid"] == "4 x 3"
    assert float(table.cells.loc[0, "selection"]) > 1 and float(table.cells.loc[0, "fine-tuning"]) < 0.1
    found = mean(context, "staff", 0.5)
    assert found and found.units == 3, "runs that share a coreset, or a fine-tuning seed, are no independent draws"


def test_the_interval_of_a_grid_knows_of_fine_tuning_though_no_selection_differs(real: Path, tmp_path: Path):
    for selection in range(3):
        for finetune, result in enumerate((24.0, 26.0, 25.0)):
            copied(real, tmp_path, "staff", 0.5, (selection, finetune), np.full(5, result))
    found = mean(only_context(tmp_path), "staff", 0.5)
    assert found and (found.value, found.half) == pytest.approx((25.0, t_interval([24.0, 26.0, 25.0])[1]))
