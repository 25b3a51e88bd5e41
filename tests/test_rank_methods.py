"""Methods that rank the pool by one number: length, perplexity, IFD, imported scores."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from support.any_pool import AnyPool, select
from support.golden import recorded

from baselines.ifd import IFD, difficulty, is_kept, preference
from baselines.imported import Imported
from baselines.length import Length
from baselines.perplexity import Perplexity, window_from
from staff.errors import UserError

PERPLEXITY, DIFFICULTY = recorded("perplexity"), recorded("ifd")


# ---------------------------------------------------------------- length


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


@pytest.mark.parametrize("case", [case for case in DIFFICULTY if case.startswith("super")])
def test_superfilterings_ratio_and_what_it_selects_are_the_recorded_ones(case: str):
    vectors = DIFFICULTY[case]
    scores = vectors["ifd_ppl"]  # 0 where the released code failed on the sample
    computed = difficulty(vectors["loss_condition"], vectors["loss_direct"], "perplexities")
    np.testing.assert_allclose(computed[scores != 0], scores[scores != 0], rtol=1e-6)
    for name in (name for name in vectors if name.startswith("selected")):
        rate, _, limit = name.removeprefix("selected_rate_").partition("_thresh_")
        kept = is_kept(scores, "perplexities", float(limit or 1))
        order = np.argsort(-preference(scores, kept), kind="stable")
        assert order[: min(int(52002 * float(rate)), kept.sum())].tolist() == vectors[name].tolist(), name


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


# ---------------------------------------------------------------- imported

SCORES = {"sample 0": 0.5, "sample 1": -2, "sample 2": 7.25, "sample 3": 1, "another": 99}


def write(folder: Path, suffix: str) -> Path:
    file = folder / f"scores{suffix}"
    table = pd.DataFrame({"id": list(SCORES), "score": list(SCORES.values()), "other": range(5)})
    if suffix == ".json":
        file.write_text(json.dumps(SCORES))
    elif suffix == ".csv":
        table.to_csv(file, index=False)
    else:
        table.to_parquet(file)
    return file


@pytest.mark.parametrize("suffix", [".json", ".csv", ".parquet"])
@pytest.mark.parametrize(("which", "expected"), [("top", [2, 3]), ("middle", [0, 3]), ("low", [0, 1])])
def test_imported_scores_are_ranked_by_id_whatever_the_order_of_the_file(tmp_path, suffix, which, expected):
    method = Imported(str(write(tmp_path, suffix)), which=which)
    assert select(method, AnyPool(4), 2).indices.tolist() == expected


def test_the_scores_of_a_coreset_can_be_imported(tmp_path: Path):
    pool = AnyPool(30)
    select(Perplexity(), pool, 5).save(tmp_path, pool.ids)
    method = Imported(str(tmp_path / "samples.parquet"), column="loss", which="low")
    assert select(method, pool, 5).indices.tolist() == select(Perplexity("low"), pool, 5).indices.tolist()


def test_imported_scores_are_known_by_what_they_are_and_not_by_their_file(tmp_path: Path):
    digests = {Imported(str(write(tmp_path, suffix))).content_digest for suffix in (".json", ".csv", ".parquet")}
    assert len(digests) == 1
    (tmp_path / "turned.json").write_text(json.dumps(dict(reversed(SCORES.items()))))
    assert Imported(str(tmp_path / "turned.json")).content_digest in digests
    (tmp_path / "other.json").write_text(json.dumps({**SCORES, "sample 3": 1.5}))
    assert Imported(str(tmp_path / "other.json")).content_digest not in digests


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("scores.txt", "", "is none of .csv, .parquet, .json"),
        ("scores.csv", "id,value\na,1\n", "has no column 'score'; it has id, value"),
        ("scores.csv", "name,score\na,1\n", "has no column 'id'"),
        ("scores.csv", "id,score\na,1\na,2\n", "lists 'a' more than once"),
        ("scores.csv", "id,score\nNA,high\n", "gives 'NA' the score 'high'"),
        ("scores.json", '{"a": 1, "a": 2}', "lists 'a' more than once"),
        ("scores.json", '{"a": null}', "gives 'a' the score None"),
        ("scores.json", "[1, 2]", "must hold a JSON object"),
        ("scores.json", "3", "must hold a JSON object"),
        ("scores.json", "{", "cannot be read"),
        ("scores.parquet", "torn", "cannot be read"),
        ("missing.csv", None, "cannot be read"),
    ],
)
def test_a_file_that_holds_no_scores_is_refused_at_once(tmp_path: Path, name: str, text: str | None, said: str):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said) as raised:
        Imported(str(tmp_path / name))
    assert f"method.path={tmp_path / name}" in str(raised.value)


def test_a_sample_without_a_score_or_with_a_nan_is_refused_by_its_id(tmp_path: Path):
    method = Imported(str(write(tmp_path, ".csv")))
    with pytest.raises(UserError, match="no score for sample 'sample 4' \\(2 such in all\\)"):
        select(method, AnyPool(6), 2)
    (tmp_path / "nan.json").write_text('{"sample 0": 1, "sample 1": NaN}')
    with pytest.raises(UserError, match="imported score of sample 'sample 1' is nan"):
        select(Imported(str(tmp_path / "nan.json")), AnyPool(2), 1)
    with pytest.raises(UserError, match="path=None names no scores"):
        Imported()
