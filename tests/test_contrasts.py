"""Registered contrasts, their verdicts, and a design with several looks."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats
from support.records import Invented, invented

from experiments.campaign import pack
from experiments.report import audit
from experiments.report.contrasts import Contrast, Outcome, parse, registered
from experiments.report.records import Context, collect, contexts
from experiments.report.rendering import Table
from experiments.report.seeds import PLANNED, Contest, Progress, nominal_levels, progress
from experiments.report.statistics import Difference
from experiments.report.variance import between_seeds
from experiments.report.verdicts import Question, verdicts
from staff.errors import UserError

METHODS = ["random", "random-2", "ccs", "staff", "staff_paper"]


def outcome(*gains: float, error: float = 0.2, seeds: int = 3, sign: int = 1) -> Outcome:
    """Of a contrast with as many others as there are gains, each measured with `error`."""
    differences = tuple(Difference(gain, seeds, 300, error**2, 10.0, 0.01**2) for gain in gains)
    return Outcome(Contrast("a", tuple(f"b{i}" for i in range(len(gains)))), (0.9,), differences, sign)


def words(*found: Outcome, margin: float = 1.0) -> list[str]:
    return [verdict.words for verdict in verdicts(found, margin)]


def test_contrasts_are_read_as_two_methods_whatever_hyphens_their_names_have():
    found = parse(
        ["staff-random", "staff-random-2", "random-2-ccs", "staff-best", "staff - ccs", "staff-random"], METHODS
    )
    assert [(c.method, *c.others) for c in found] == [
        ("staff", "random"),
        ("staff", "random-2"),
        ("random-2", "ccs"),
        ("staff", "best"),
        ("staff", "ccs"),
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "staff-grand",
            "'staff-grand' names 'grand', which is not a method of the recorded runs: choose from random, ",
        ),
        ("best-staff", "'best-staff' is not METHOD-METHOD"),
        ("staff", "'staff' is not METHOD-METHOD"),
        ("staff-staff", "'staff-staff' is not METHOD-METHOD"),
        ("a-b-c", "'a-b-c' is not METHOD-METHOD"),
    ],
)
def test_a_contrast_that_names_no_two_methods_is_refused_in_a_sentence(text: str, said: str):
    with pytest.raises(UserError) as error:
        parse([text], METHODS)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_contrast_that_may_be_read_in_two_ways_is_refused():
    with pytest.raises(UserError, match="may be read in 2 ways"):
        parse(["a-b-c"], ["a", "a-b", "b-c", "c"])


def test_verdicts_are_in_words():
    assert words(outcome(2.0)) == ["better"]
    assert words(outcome(-2.0)) == ["worse"]
    assert words(outcome(0.1)) == ["equal within 1 point"]
    assert words(outcome(0.4, error=0.1)) == ["better, by less than 1 point"]
    assert words(outcome(0.9, error=0.5)) == ["not worse by 1 point"]
    assert words(outcome(0.1, seeds=1)) == ["one seed: no verdict"]
    (undecided,) = words(outcome(-0.6, error=0.5))
    assert undecided.startswith("undecided: ") and undecided.endswith(" more seeds would decide")
    assert 0 < int(undecided.split()[1]) < 1000
    assert words(outcome(0.001, error=0.002), margin=0.02) == ["equal within 0.02 points"]
    (loss,) = verdicts([outcome(0.001, error=0.002)], 0.02, "nat")
    assert loss.words == "equal within 0.02 nats"


def test_no_number_of_seeds_decides_what_test_samples_leave_open():
    difference = Difference(-0.5, 3, 20, 0.01, 10.0, 0.5**2)
    (verdict,) = verdicts([Outcome(Contrast("a", ("b",)), (0.9,), (difference,), 1)], 1.0)
    assert verdict.words == "undecided: more seeds alone would not decide"


def test_verdicts_are_corrected_for_their_number():
    alone, *_ = verdicts([outcome(0.55)], 0.1)
    among = verdicts([outcome(0.55), *[outcome(0.0)] * 9], 0.1)[0]
    assert (
        alone.words == "better" and among.words.startswith("undecided") and among.p == pytest.approx(10 * alone.p)
    )
    without = verdicts([outcome(0.55), *[outcome(0.0, seeds=1)] * 9], 0.1)[0]
    assert without.p == alone.p, "what cannot be tested is not corrected for"


def test_a_lower_loss_is_better_and_shown_as_a_lower_number():
    found = outcome(0.3, 0.5, error=0.05, sign=-1)
    difference, low, high = found.shown
    assert difference == -0.3 and low < difference < high < 0 and words(found, margin=0.1) == ["better"]


def test_better_than_the_best_of_several_means_better_than_each():
    rng = np.random.default_rng(0)
    wrong = {"better": 0, "worse": 0}
    held, trials = 0, 3000
    for _ in range(trials):  # three others as good as the method: the best of them is it by chance
        ours, *others = rng.normal(scale=0.2 / np.sqrt(2), size=4)
        found = outcome(*(ours - other for other in others), error=0.2)
        _, low, high = found.shown
        held += low <= 0 <= high
        wrong["better"] += found.above(0.0) <= 0.025
        wrong["worse"] += found.below(0.0) <= 0.025
    assert wrong["better"] / trials <= 0.03 and wrong["worse"] / trials <= 0.03 and held / trials >= 0.945
    clear = outcome(1.0, 2.0, 3.0)
    assert clear.p is not None and clear.p < 0.01 and clear.hardest.mean == 1.0


def test_a_margin_is_the_metrics_own_and_an_effect_the_margin_unless_named():
    assert Question().margin_of("rougeL") == Question().effect_of("rougeL") == 1.0
    assert Question().margin_of("nll") == 0.02
    assert (Question(margin=2.0).effect_of("rougeL"), Question(effect=0.5).margin_of("rougeL")) == (2.0, 1.0)


def test_the_levels_of_looks_are_those_of_published_tables():
    def bounds(*planned: int) -> list[float]:
        return [float(stats.norm.isf(level / 2)) for level in nominal_levels(planned)]

    # Lan and DeMets' version of O'Brien and Fleming's bounds, two-sided 5 % (Reboussin et al., 2000; gsDesign)
    assert bounds(1, 2, 3, 4, 5) == pytest.approx([4.877, 3.357, 2.680, 2.290, 2.031], abs=2e-3)
    assert bounds(1, 2, 3) == pytest.approx([3.710, 2.511, 1.993], abs=2e-3)
    assert bounds(7) == pytest.approx([1.960], abs=1e-3)


def looked(gains: dict[Any, dict[int, float]], margin: float = 0.0) -> Progress:
    """Of contrasts by themselves, each of a method with these gains over another."""
    alone = {
        name: Contest("a", "b", {"a": by_seed, "b": dict.fromkeys(by_seed, 0.0)}) for name, by_seed in gains.items()
    }
    return progress(alone, margin=margin)


def test_looking_at_five_ten_and_twenty_seeds_finds_nothing_where_nothing_is_in_95_of_100_campaigns():
    rng = np.random.default_rng(1)
    trials, found = 1500, 0
    for _ in range(trials):
        gains = {name: dict(enumerate(rng.normal(size=20))) for name in "abc"}
        decisions = looked(gains).decisions.values()
        found += any(decision.verdict is not None for decision in decisions)
    assert found / trials <= 0.06, found / trials  # 1,500 campaigns: within 0.011 of the truth


def test_looks_find_nothing_where_nothing_is_in_95_of_100_campaigns_though_a_method_is_noisy():
    for noise in (1, 3, 10):
        means = np.random.default_rng(8).normal(size=(3000, 6, 20)) * np.array([noise, 1, 1, 1, 1, 1])[:, None]
        found = np.zeros(len(means), dtype=bool)
        for seeds, level in zip(PLANNED, nominal_levels(PLANNED)):
            between = between_seeds(means[..., :seeds])
            t = (means[:, 0] - means[:, 1])[:, :seeds].mean(axis=-1) / np.sqrt(between.variance[:, 0, 1] / seeds)
            found |= 2 * stats.t.sf(abs(t), between.freedom[:, 0, 1]) <= level
        assert found.mean() <= 0.06, (noise, found.mean())  # 3,000 campaigns: within 0.008 of the truth


def test_repeated_intervals_hold_the_truth_at_every_look_and_equality_is_rarely_wrong():
    rng = np.random.default_rng(2)
    trials = 1500
    wrong = sum(
        looked({"a": dict(enumerate(rng.normal(1.0, 1.5, size=20)))}, margin=1.0).decisions["a"].verdict == "equal"
        for _ in range(trials)
    )
    assert wrong / trials <= 0.035, "a gain as large as the margin is equal in 2.5 % of campaigns at most"


def test_a_large_gain_is_decided_early_a_small_one_late_and_none_as_equal():
    rng = np.random.default_rng(3)
    noise = rng.normal(scale=0.5, size=20)
    shown = {mean: dict(enumerate(noise - noise.mean() + mean)) for mean in (100.0, 1.0, 0.0, -100.0)}
    found = looked(shown, margin=1.0).decisions
    assert (found[100.0].verdict, found[100.0].seeds) == ("better", 5)
    assert (found[-100.0].verdict, found[-100.0].seeds) == ("worse", 5)
    assert found[1.0].verdict == "better" and found[1.0].seeds > 5
    assert found[0.0].verdict == "equal" and found[0.0].half < 1.0


def test_seeds_are_added_up_to_the_next_look_for_what_is_still_open():
    rng = np.random.default_rng(4)
    draws = rng.normal(size=20)
    assert looked({"a": dict(enumerate(draws[:3]))}).add == (3, 4)
    assert looked({"a": {0: 0.1, 2: -0.2, 7: 0.3}}).add == (1, 3)
    assert looked({"a": dict(enumerate(draws[:5]))}).add == (5, 6, 7, 8, 9)
    assert looked({"a": dict(enumerate(draws[:7]))}).add == (7, 8, 9)
    assert looked({"a": dict(enumerate(draws))}).add == (), "the last look was taken"
    decided = {seed: 30 + value for seed, value in enumerate(draws[:5])}
    assert looked({"a": decided}).add == () and looked({"a": decided}).decisions["a"].verdict == "better"
    both = looked({"a": decided, "b": dict(enumerate(draws[:10]))})
    assert both.add == tuple(range(10, 20)), "the decided contrast needs no more"


def test_methods_that_ran_beside_a_contrast_tell_how_seeds_vary_and_so_decide_it_earlier():
    rng = np.random.default_rng(6)
    trials, wrong, found, alone = 300, 0, 0, 0
    for _ in range(trials):
        means = {name: dict(enumerate(rng.normal(size=20))) for name in "abcdef"}
        wrong += progress({"null": Contest("a", "b", means)}).decisions["null"].verdict is not None
        early = {name: {seed: means[name][seed] + 8 * (name == "a") for seed in range(5)} for name in means}
        found += progress({"gain": Contest("a", "b", early)}).decisions["gain"].verdict == "better"
        two = {name: early[name] for name in "ab"}
        alone += progress({"gain": Contest("a", "b", two)}).decisions["gain"].verdict == "better"
    assert wrong / trials <= 0.08, "300 campaigns: within 0.025 of 5 %"
    assert found > 0.8 * trials > 5 * alone, (found, alone)


def test_seeds_that_are_added_follow_those_there_are():
    gains = {seed: float(value) for seed, value in zip(range(10, 15), np.random.default_rng(7).normal(size=5))}
    assert looked({"a": gains}).add == (15, 16, 17, 18, 19)


def test_seeds_beyond_a_look_do_not_change_it():
    gains = dict(enumerate(np.random.default_rng(5).normal(size=9)))
    early = {seed: gains[seed] for seed in range(5)}
    assert looked({"a": gains}).decisions == looked({"a": early}).decisions


# ---------------------------------------------------------------- audits


@dataclass(frozen=True)
class Audited(Invented):
    """A run of an audit: with the configuration of its method, and `finetune.match`."""

    method: Mapping[str, Any] = field(default_factory=dict)
    match: str = "epochs"

    def record(self) -> dict[str, Any]:
        record = super().record()
        record["config"] |= {"method": dict(self.method), "finetune": {"match": self.match}}
        return record


OURS = {"_target_": "mine.Ours", "k": 3}
PARTS: dict[str, tuple[dict[str, Any], str]] = {
    "random": ({"_target_": "baselines.random.Random"}, "epochs"),
    "ours": (OURS, "epochs"),
    "preset": ({**OURS, "k": 9}, "epochs"),
    "twin": ({"_target_": audit.TWIN, "reference": OURS, "match": ["length"]}, "epochs"),
    "random_matched tokens": ({"_target_": audit.TWIN, "reference": OURS, "match": ["tokens"]}, "epochs"),
    "random_matched ccs": (
        {"_target_": audit.TWIN, "reference": {"_target_": "a.CCS"}, "match": ["length"]},
        "epochs",
    ),
    "random_matched ccs tokens": (
        {"_target_": audit.TWIN, "reference": {"_target_": "a.CCS"}, "match": ["tokens"]},
        "epochs",
    ),
    "oracle": ({"_target_": "baselines.oracle.Oracle"}, "epochs"),
    "ccs": ({"_target_": "baselines.ccs.CCS"}, "epochs"),
    "random at steps": ({"_target_": "baselines.random.Random"}, "steps"),
    "ours at steps": (OURS, "steps"),
    "highest": ({"_target_": audit.LEFT_OUT, "reference": OURS, "out": "highest"}, "epochs"),
    "lowest": ({"_target_": audit.LEFT_OUT, "reference": OURS, "out": "lowest"}, "epochs"),
}


def audited_contexts(effects: Mapping[str, float], results: Path) -> list[Context]:
    """Of runs with these effects by part, of three seeds."""
    runs = {}
    for run in invented(effects, rates=(0.9,)):
        method, match = PARTS[run.about["method"]]
        about = {
            **run.about,
            "method": {"twin": "random_matched"}.get(run.about["method"], run.about["method"].split()[0]),
        }
        runs[run.name] = Audited(run.name, about, run.answers, run.texts, run.pool, method, match)
    pack(runs, results)
    return contexts(collect(results), results)


def audited(effects: Mapping[str, float], results: Path) -> list[Table]:
    return [table for context in audited_contexts(effects, results) for table in audit.tables(context)]


def test_by_default_a_method_meets_its_own_twin_of_matched_length_and_no_ceiling(tmp_path: Path):
    twins = ("twin", "random_matched tokens", "random_matched ccs", "random_matched ccs tokens")
    parts = ("random", "ours", *twins, "oracle", "ccs")
    context = audited_contexts(dict.fromkeys(parts, 0.0), tmp_path)[0]
    found = {(contrast.method, contrast.others) for contrast in registered(context, None)}
    twin = "random_matched reference=Ours match=[length]"
    assert found == {("ours", ("random",)), ("ours", ("random", "ccs")), ("ours", (twin,))}
    assert "random_matched reference=CCS match=[tokens]" in context.variants and "oracle" in context.variants


def test_an_audit_tells_what_is_left_of_a_gain_beyond_length_and_steps(tmp_path: Path):
    effects = {"random": 0.0, "ours": 8.0, "twin": 6.0, "random at steps": 10.0, "ours at steps": 10.0}
    (table,) = audited(effects, tmp_path)
    rows = table.cells.set_index("gain")
    assert float(rows.loc["over random", "difference"]) == pytest.approx(8, abs=0.7)
    assert float(rows.loc["beyond answer lengths", "difference"]) == pytest.approx(2, abs=0.7)
    assert int(rows.loc["beyond answer lengths", "left of the gain"].rstrip("%")) in range(15, 35)
    assert abs(float(rows.loc["over random at equal steps", "difference"])) < 0.7
    assert (
        "A gain of ours is left beyond answer lengths. No gain is shown over random at equal steps."
        in table.caption
    )


def test_another_preset_of_the_same_class_is_no_part_of_an_audit(tmp_path: Path):
    effects = {"random": 0.0, "ours": 8.0, "preset": -40.0, "twin": 6.0}
    (table,) = audited(effects, tmp_path)
    assert float(table.cells.set_index("gain").loc["over random", "difference"]) == pytest.approx(8, abs=0.7)
    (alone,) = audited({k: v for k, v in effects.items() if k != "ours"}, tmp_path / "alone")
    gain = float(alone.cells.set_index("gain").loc["over random", "difference"])
    assert gain == pytest.approx(-40, abs=0.7), (
        "where a family sets other fields than a reference has, the class decides"
    )


def test_no_gain_is_divided_where_none_is_shown(tmp_path: Path):
    (table,) = audited({"random": 0.0, "ours": 0.0, "twin": 0.0}, tmp_path)
    assert set(table.cells["left of the gain"]) == {"–"} and "No gain over random is shown" in table.caption


@pytest.mark.parametrize(
    ("highest", "lowest", "said"),
    [(-6, 0, "It measures utility:"), (0, -6, "in reverse"), (0, 0, "It is not shown to measure utility")],
)
def test_a_score_tells_utility_if_its_highest_ranks_are_missed_more(
    highest: float, lowest: float, said: str, tmp_path: Path
):
    (table,) = audited({"random": 0.0, "highest": highest, "lowest": lowest}, tmp_path)
    assert said in table.caption and table.name.startswith("score-validity-Ours-p0.9")
