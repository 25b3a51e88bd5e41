"""The pool whose truth is known: what was planted is there as stated, and the oracle, metric and record know it."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from baselines.oracle import Oracle
from experiments.single import data_digest
from staff.arrays import ArrayPool
from staff.data.planted import MOST_COPIES, SKILLS, PlantedTask
from staff.data.samples import Sample
from staff.data.splits import load_splits
from staff.data.task import Task
from staff.errors import UserError
from staff.evaluation.metrics import measure, named_metric
from staff.selection import Draws
from staff.store.stage import identity

TASK = PlantedTask()


def solve(question: str) -> str:
    """The right answer, worked out from the question's words alone."""
    words = question.removesuffix(" =").removeprefix("please ")
    closing = {"say": " it is so", "tell": " and that is the end"}.get(words.split()[0], "")
    words = words.removeprefix("say ").removeprefix("tell ")
    asked, _, listed = words.partition(" of ")
    digits = [int(digit) for digit in listed.split()]
    places = {"first": 0, "second": 1, "third": 2, "fourth": 3}
    match asked:
        case "first two":
            answer = digits[:2]
        case "last":
            answer = [digits[-1]]
        case "sort the first two":
            answer = [min(digits[:2]), max(digits[:2])]
        case "largest":
            answer = [max(digits)]
        case "last two backwards":
            answer = [digits[-1], digits[-2]]
        case "last plus one":
            answer = [(digits[-1] + 1) % 10]
        case place:
            answer = [digits[places[place]]]
    return " ".join(map(str, answer)) + closing


def asked(row: dict[str, Any]) -> tuple[str, str]:
    """The question whatever its wording and the form of its answer."""
    words = row["question"].removeprefix("please ")
    return row["group"], words.removeprefix("say ").removeprefix("tell ")


# ---------------------------------------------------------------- the generator


def test_a_pool_is_made_of_its_settings_and_seed_alone():
    assert TASK.make("train") == PlantedTask().make("train") and TASK.make("test") == PlantedTask().make("test")
    other = replace(TASK, seed=1)
    assert {asked(row) for row in other.make("test")} != {asked(row) for row in TASK.make("test")}
    assert data_digest(TASK.load("train")) != data_digest(other.load("train"))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"wrong": 0.4, "repeats": 0.3, "near": 0.2},
        {"wrong": 0, "repeats": 0, "near": 0, "rarity": 1},
        {"wrong": 0.8, "repeats": 0.5, "near": 0, "size": 500},
        {"size": 20_000, "rarity": 20, "near": 0.3},
    ],
    ids=str,
)
def test_what_is_stated_is_planted_in_every_skill_and_right_answers_are_right(settings: dict[str, Any]):
    task = PlantedTask(**settings)
    rows = {row["id"]: row for row in task.make("train")}
    assert len(rows) == task.size == sum(task.skill_counts.values())
    assert Counter(row["group"] for row in rows.values()) == task.skill_counts
    for skill, count in task.skill_counts.items():
        of = [row for row in rows.values() if row["group"] == skill]
        short = round(task.wrong * count) - sum(row["wrong"] for row in of)
        assert 0 <= short <= MOST_COPIES and (short == 0 or task.repeats + task.near == 0.5)
        assert sum(row["copy_of"] is not None for row in of) == round(task.repeats * count)
        assert sum(row["near_copy_of"] is not None for row in of) == round(task.near * count)
        originals = [row for row in of if row["copy_of"] is row["near_copy_of"] is None]
        assert len({asked(row) for row in originals}) == len(originals)
    for row in rows.values():
        right = solve(row["question"])
        assert (row["answer"] == right) != row["wrong"]
        assert len(row["answer"]) == len(right), "a wrong answer is as long as the right one"
        if row["copy_of"]:
            assert {**rows[row["copy_of"]], "id": "", "copy_of": ""} == {**row, "id": "", "copy_of": ""}
        if row["near_copy_of"]:
            near = rows[row["near_copy_of"]]
            assert near["question"] != row["question"] and asked(near) == asked(row)
            assert near["answer"] == row["answer"] and near["copy_of"] is near["near_copy_of"] is None


def test_the_commonest_skill_is_rarity_times_as_common_as_the_rarest():
    counts = list(replace(TASK, size=20_000).skill_counts.values())
    assert counts == sorted(counts, reverse=True) and counts[0] / counts[-1] == pytest.approx(9, rel=0.01)
    assert counts[0] / counts[1] == pytest.approx(9 ** (1 / 6), rel=0.01)


def test_a_stronger_setting_changes_nothing_but_what_it_plants():
    weak, strong = ({r["id"]: r for r in replace(TASK, wrong=wrong).make("train")} for wrong in (0.1, 0.3))
    assert [row["question"] for row in weak.values()] == [row["question"] for row in strong.values()]
    spoilt = [id for id, row in weak.items() if row["wrong"]]
    assert np.mean([strong[id]["wrong"] for id in spoilt]) > 0.95
    few, many = ({r["id"]: r for r in replace(TASK, repeats=repeats).make("train")} for repeats in (0.1, 0.3))
    kept = [id for id, row in many.items() if row["copy_of"] is row["near_copy_of"] is None]
    assert [few[id]["question"] for id in kept] == [many[id]["question"] for id in kept]


def test_the_length_of_an_answer_says_nothing_of_its_worth():
    rows = TASK.make("train")
    closing = np.array([len([w for w in row["answer"].split() if not w.isdigit()]) for row in rows])
    assert sorted(Counter(closing.tolist())) == [0, 3, 5]
    for of in (
        [row["wrong"] for row in rows],
        [row["copy_of"] is not None for row in rows],
        [row["group"] in ("lookup", "add") for row in rows],
    ):
        assert abs(np.corrcoef(closing, of)[0, 1]) < 0.06
    assert {len(row["answer"]) for row in replace(TASK, lengths=1).make("train")} == {1, 3}


def test_the_test_set_is_balanced_right_and_asks_nothing_that_the_pool_asks():
    test = TASK.make("test")
    assert Counter(row["group"] for row in test) == dict.fromkeys(SKILLS, TASK.test_per_skill)
    assert all(row["answer"] == solve(row["question"]) for row in test)
    assert len({asked(row) for row in test}) == len(test) == len(TASK.load("test"))
    for task in (TASK, replace(TASK, size=20_000)):
        assert not {asked(row) for row in test} & {asked(row) for row in task.make("train")}
    assert Counter(row["id"] for row in test).most_common(1)[0][1] == 1


@pytest.mark.parametrize("lengths", [1, 2, 3])
def test_the_best_constant_answer_scores_at_most_12(lengths: int):
    for seed in range(5):
        answers = [row["answer"] for row in replace(TASK, lengths=lengths, seed=seed).make("test")]
        assert 100 * Counter(answers).most_common(1)[0][1] / len(answers) <= 12


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"size": 0}, "task.size=0 must be at least 1 and at most 50000"),
        ({"size": 4e3}, "task.size=4000.0 must be a whole number"),
        ({"size": 100}, "task.size=100 leaves the rarest skill 4 rows: raise it, or lower task.rarity=9.0"),
        ({"size": 50_000}, "of the commonest skill, test set included, which has 11000 different ones: lower it"),
        ({"wrong": 0.9}, "task.wrong=0.9 must be at least 0 and at most 0.8"),
        ({"wrong": "many"}, "task.wrong='many' must be a number"),
        ({"wrong": float("nan")}, "task.wrong=nan must be at least 0"),
        ({"repeats": 0.4, "near": 0.2}, "make more than half of the pool copies: lower one of them"),
        ({"rarity": 0.5}, "task.rarity=0.5 must be at least 1"),
        ({"lengths": 4}, "task.lengths=4 must be at least 1 and at most 3"),
        ({"lengths": True}, "task.lengths=True must be a whole number"),
        ({"test_per_skill": 0}, "task.test_per_skill=0 must be at least 1"),
        ({"seed": -1}, "task.seed=-1 must be at least 0"),
    ],
    ids=str,
)
def test_a_setting_out_of_range_is_one_sentence(settings: dict[str, Any], sentence: str):
    with pytest.raises(UserError) as raised:
        PlantedTask(**settings)
    assert sentence in str(raised.value)


def test_the_preset_names_every_setting_with_its_default():
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        preset = instantiate(compose("config", overrides=["task=planted"]).task, _convert_="all")
    assert replace(preset, metrics=TASK.metrics, learning_rate=None) == TASK and preset.metrics == ["exact", "nll"]


def test_a_validation_slice_is_drawn_from_the_pool_and_data_of_its_own_is_refused():
    splits = load_splits(replace(TASK, dev_size=30))
    assert len(splits.dev) == 30 and len(splits.pool) == TASK.size - 30
    assert {sample.group for sample in splits.dev} <= set(SKILLS)
    with pytest.raises(UserError, match=r"task.dev_split='dev' names data, and the rows are generated: set"):
        replace(TASK, dev_split="dev")


# ---------------------------------------------------------------- groups and the metric


def test_a_sample_has_the_group_of_its_field_and_a_row_without_it_is_refused():
    task = Task("t", "{q}", " {a}", ["exact"], 4, data_dir="x", group_field="kind")
    row = {"q": "1 + 1 =", "a": "2"}
    (sample,) = task.samples([("line 1", {**row, "kind": "sums"})])
    assert sample.group == "sums" and replace(task, group_field=None).samples([("", row)])[0].group is None
    with pytest.raises(UserError, match=r"line 1: no field 'kind' .wanted by task.group_field.; it has a, q"):
        task.samples([("line 1", row)])
    with pytest.raises(UserError, match=r"line 1: field 'kind' is list, not text .wanted by task.group_field."):
        task.samples([("line 1", {**row, "kind": [3]})])
    with pytest.raises(UserError, match=r"task.group_field=\['kind'\] must be null or name a field"):
        replace(task, group_field=["kind"])


def test_samples_without_groups_keep_the_digest_they_had_before_there_were_any():
    sample = Sample("a", "p", "q", ("q", "r"))
    before = json.dumps([{"id": "a", "prompt": "p", "answer": "q", "references": ["q", "r"]}])
    assert data_digest([sample]) == hashlib.sha256(before.encode()).hexdigest()
    assert data_digest([replace(sample, group="g")]) != data_digest([sample])


def test_exact_compares_whole_texts_but_for_case_spaces_and_one_final_full_stop():
    right = ["4 1", " 4  1\n", "4 1.", "4 1 .", "Ja", "x.y"]
    wrong = ["4 1..", "41", "4 1 7", "", ".", "ja!"]
    expected = ["4 1", "4 1", "4 1", "4 1", "jA.", "X.Y"], ["4 1", "4 1", "4 1", "4 1", ".", "ja"]
    headline, table = measure(
        [named_metric("exact")], right + wrong, [(text,) for text in (*expected[0], *expected[1])]
    )
    assert headline == {"exact": 50} and table["exact"].tolist() == [100] * 6 + [0] * 6
    assert measure([named_metric("exact")], ["b"], [("a", "b")])[0] == {"exact": 100}


# ---------------------------------------------------------------- the oracle, and the record


def pool_of(task: PlantedTask, order: np.ndarray | None = None) -> ArrayPool:
    ids = [sample.id for sample in task.load("train")]
    return ArrayPool(ids if order is None else [ids[i] for i in order], {})


def test_the_oracle_is_balanced_over_skills_without_wrong_answers_and_copies_while_it_can():
    pool = pool_of(TASK)
    for budget, filled in ((400, False), (700, False), (3000, True), (4000, True)):
        coreset = Oracle(TASK).select(pool, budget, Draws(0, pool.ids))
        assert len(set(coreset.indices.tolist())) == budget
        shares = TASK.shares([pool.ids[i] for i in coreset.indices])
        counts = coreset.diagnostics.set_index("group")["picked"]
        if not filled:
            assert shares == {"wrong": 0, "copies": 0, "near_copies": 0} and not coreset.filled
            clean = coreset.diagnostics.set_index("group")["clean"]
            assert (counts.max() - counts[counts < clean].min()) <= 1
        else:
            assert coreset.filled and "copies or wrong" in coreset.notes[0]
            assert (shares["wrong"] > 0) == (budget > 0.85 * TASK.size)


def test_the_oracle_selects_by_seed_and_id_and_not_by_the_order_of_the_pool():
    pool, other = pool_of(TASK), pool_of(TASK, np.random.default_rng(0).permutation(TASK.size))
    chosen = {pool.ids[i] for i in Oracle(TASK).select(pool, 200, Draws(0, pool.ids)).indices}
    assert {other.ids[i] for i in Oracle(TASK).select(other, 200, Draws(0, other.ids)).indices} == chosen
    assert {pool.ids[i] for i in Oracle(TASK).select(pool, 200, Draws(1, pool.ids)).indices} != chosen
    assert identity(Oracle(TASK)) != identity(Oracle(replace(TASK, wrong=0.3)))


def test_the_oracle_refuses_another_task_another_pool_and_a_budget_that_cannot_be_met():
    with pytest.raises(
        UserError, match="method=oracle needs a pool with known defects, unlike that of task 't': set task="
    ):
        Oracle(Task("t", "{q}", "{a}", ["exact"], 4, data_dir="x"))
    stranger = ArrayPool(["train-0", "elsewhere"], {})
    with pytest.raises(UserError, match="sample 'elsewhere' is not in the pool of task 'planted'"):
        Oracle(TASK).select(stranger, 1, Draws(0, stranger.ids))
    pool = pool_of(TASK)
    with pytest.raises(UserError, match="a budget of 0 samples"):
        Oracle(TASK).select(pool, 0, Draws(0, pool.ids))


def test_a_run_records_metrics_and_coreset_by_group_and_what_was_planted(run):
    small = ("task=planted", "task.train_limit=200", "task.test_limit=30", "pruning_rate=0.9")
    record = run("method=oracle", *small)
    by_group = record["metrics_by_group"]
    assert sum(part["samples"] for part in by_group.values()) == 30 and set(by_group) <= set(SKILLS)
    mean = sum(part["samples"] * part["exact"] for part in by_group.values()) / 30
    assert mean == pytest.approx(record["metrics"]["exact"])
    groups, planted = record["coreset"]["groups"], record["coreset"]["planted"]
    assert sum(part["pool"] for part in groups.values()) == 200
    assert sum(part["coreset"] for part in groups.values()) == 20
    assert planted["coreset"] == {"wrong": 0, "copies": 0, "near_copies": 0} and planted["pool"]["wrong"] > 0.05
    raw = run("method=raw", *small)
    assert "coreset" not in raw["coreset"]["planted"] and raw["run"]["fingerprint"] != record["run"]["fingerprint"]
    with pytest.raises(Exception, match="set task=planted"):
        run("method=oracle")
    plain = run("method=random", "task.train_limit=8", "task.test_limit=2")
    assert "metrics_by_group" not in plain and not {"groups", "planted"} & set(plain["coreset"])


def test_rows_of_ones_own_with_groups_are_recorded_by_group_and_select_the_same_coreset(run, tmp_path):
    for split in ("train", "test"):
        rows = [f'{{"prompt": "Say {i}:", "answer": "{i}", "kind": "k{i % 2}"}}\n' for i in range(8)]
        (tmp_path / f"{split}.jsonl").write_text("".join(rows))
    task = ("task=file", f"task.data_dir={tmp_path}", "method=random")
    grouped = run(*task, "task.group_field=kind")
    assert set(grouped["metrics_by_group"]) == {"k0", "k1"} and "planted" not in grouped["coreset"]
    assert grouped["coreset"]["groups"]["k0"]["pool"] == 4
    assert "metrics_by_group" not in run(*task, "task.group_field=kind", "evaluation=none")
    assert grouped["evaluation"]["fingerprint"] == run(*task)["evaluation"]["fingerprint"]
