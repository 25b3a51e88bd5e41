"""The report's statistics keep what they promise, in simulations where the truth is known."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.report.statistics import (
    Difference,
    crossed,
    holm,
    paired_difference,
    resampled,
    seed_variance,
    t_interval,
    typical,
)

SITUATIONS = {  # standard deviations over seeds, over test samples, and of single answers
    "seeds differ": (1.0, 1.0, 0.0),
    "samples differ": (0.0, 10.0, 3.0),
    "single answers differ": (0.0, 1.0, 10.0),
    "seeds and single answers differ": (1.0, 1.0, 6.0),
    "all differ": (0.7, 6.0, 6.0),
}


def simulated(rng: np.random.Generator, spreads: tuple[float, float, float], effect: float, shape: tuple[int, int]):
    """A difference of two methods by seed and test sample, and its analysis; `shape`: seeds, samples."""
    seeds, samples = shape
    of_seed, of_sample, of_answer = spreads
    b = rng.normal(25, 15, size=shape)
    a = b + effect + of_seed * rng.normal(size=(seeds, 1)) + of_sample * rng.normal(size=samples)
    a = a + of_answer * rng.normal(size=shape)
    return paired_difference(a, b, resampled(a), resampled(b))


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("seeds", [1, 2, 3])
def test_intervals_hold_the_true_difference_at_least_as_often_as_they_say(situation: str, seeds: int):
    spreads = SITUATIONS[situation] if seeds > 1 else (0.0, *SITUATIONS[situation][1:])
    rng = np.random.default_rng(0)
    found = [simulated(rng, spreads, 2.0, (seeds, 60)) for _ in range(1000)]
    held = np.mean([abs(d.mean - 2.0) <= d.half for d in found])
    assert held >= 0.925, f"{held:.3f} of 95 % intervals"  # 1,000 simulations: within 0.014 of the truth


def test_a_null_is_declared_significant_no_more_often_than_stated():
    rng = np.random.default_rng(1)
    rates = [np.mean([simulated(rng, s, 0.0, (3, 60)).p <= 0.05 for _ in range(1000)]) for s in SITUATIONS.values()]
    assert max(rates) <= 0.065, rates


def test_a_null_among_many_is_declared_significant_no_more_often_than_holms_level():
    rng = np.random.default_rng(8)
    level, spreads = 0.005, (1.0, 1.0, 0.0)
    assert np.mean([simulated(rng, spreads, 0.0, (3, 60)).p <= level for _ in range(2000)]) <= 2 * level


@given(st.floats(-30, 30), st.floats(0.01, 10), st.integers(1, 5), st.integers(2, 500), st.floats(0, 1))
def test_a_difference_is_significant_where_its_interval_leaves_zero_out(mean, error, seeds, samples, share):
    difference = Difference(mean, error, seeds, samples, share if seeds > 1 else 0.0)
    assert abs(difference.half - abs(mean)) < 1e-9 or (difference.p < 0.05) == (difference.half < abs(mean))


@pytest.mark.parametrize("level", [0.05, 0.0005])
@pytest.mark.parametrize("of_seed", [0.0, 0.2, 1.0])
def test_an_effect_of_the_smallest_detectable_size_is_found_four_times_in_five(level: float, of_seed: float):
    rng = np.random.default_rng(2)
    spreads, shape = (of_seed, 6.0, 1.0), (3, 80)
    size = typical([simulated(rng, spreads, 0.0, shape) for _ in range(200)]).detectable(level)
    found = np.mean([simulated(rng, spreads, size, shape).p <= level for _ in range(400)])
    assert 0.72 <= found <= 0.88, found  # 400 simulations: within 0.04 of the truth


def test_in_a_grid_of_both_seeds_an_interval_holds_the_truth_as_often_as_it_says_whichever_seed_matters():
    rng = np.random.default_rng(9)
    for of_selection, of_finetuning in ((1, 0), (1, 1), (0.1, 1)):
        held = []
        for _ in range(400):
            effect = of_selection * rng.normal(size=(3, 1, 1)) + of_finetuning * rng.normal(size=(1, 3, 1))
            a, b = effect + rng.normal(size=(3, 3, 60)), rng.normal(25, 15, size=(3, 3, 1))
            sides = [((a + b).mean(axis=axis), np.broadcast_to(b, a.shape).mean(axis=axis)) for axis in (1, 0)]
            found = crossed([paired_difference(x, y, resampled(x), resampled(y)) for x, y in sides])
            held.append(abs(found.mean) <= found.half)
        assert np.mean(held) >= 0.92, (of_selection, of_finetuning, np.mean(held))


def test_pairing_sees_what_the_means_of_two_methods_apart_would_not():
    rng = np.random.default_rng(3)
    difference = simulated(rng, (0.0, 0.5, 0.5), 0.5, (3, 100))
    assert difference.p < 0.01, "though single answers differ by 15 points from one another"


def test_answers_that_never_differ_are_no_difference_and_nothing_is_divided_by_zero():
    same = np.full((3, 5), 20.0)
    difference = paired_difference(same, same, resampled(same), resampled(same))
    assert (difference.mean, difference.p, difference.half, difference.detectable()) == (0, 1, 0, 0)
    shifted = paired_difference(same + 1, same, resampled(same + 1), resampled(same))
    assert (shifted.mean, shifted.p) == (1, 0)


def test_the_same_values_give_the_same_interval_every_time():
    values = np.random.default_rng(4).normal(size=(2, 3, 40))
    a, b = [paired_difference(*values, resampled(values[0]), resampled(values[1])) for _ in range(2)]
    assert a == b


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


def test_the_variance_of_selection_and_of_fine_tuning_seeds_is_told_apart():
    rng = np.random.default_rng(6)
    estimates = []
    for _ in range(300):
        selection, finetuning = rng.normal(0, 2, size=(4, 1)), rng.normal(0, 1, size=(1, 5))
        estimates.append(seed_variance(20 + selection + finetuning + rng.normal(0, 0.5, size=(4, 5))))
    mean = [np.mean([getattr(e, part) for e in estimates]) for part in ("selection", "finetuning", "rest")]
    assert mean == pytest.approx([4, 1, 0.25], rel=0.2)


def test_the_smallest_detectable_difference_grows_with_the_number_of_comparisons():
    difference = Difference(mean=1.0, error=0.5, seeds=3, samples=20, seed_share=0.5)
    assert difference.detectable(0.05) < difference.detectable(0.05 / 100)
