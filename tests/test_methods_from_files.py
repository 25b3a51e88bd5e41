"""Selections from a user's file, a coreset or scores: the same wherever it lies, refused where it does not fit."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from support.any_pool import AnyPool, select

from baselines.imported import Imported
from baselines.perplexity import Perplexity
from baselines.precomputed import Precomputed
from staff import ArrayPool
from staff.errors import UserError
from staff.selection import Draws, run_method
from staff.store.stage import identity

# ---------------------------------------------------------------- a coreset


POOL = ArrayPool([f"d{i}" for i in range(9)], {}, np.arange(9))
POSITIONS = [7, 0, 3]


def coreset_file(folder: Path, name: str, content: Any) -> str:
    """The path of a file with this content, by its kind."""
    file = folder / name
    if file.suffix == ".pt":
        torch.save(content, file)
    else:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(file)


def selected(method: Precomputed, budget: int | None = None) -> list[int]:
    return run_method(method, POOL, budget or len(method.entries), Draws(0, POOL.ids)).indices.tolist()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("ids.json", ["d7", "d0", "d3"]),
        ("positions.json", POSITIONS),
        ("ids.csv", "effort,id\n1.5,d7\n,d0\n2,d3\n"),
        ("positions.csv", "position\n7\n0\n3\n"),
        ("numpy.pt", [np.int64(7), np.int32(0), np.uint8(3)]),
        ("plain.pt", POSITIONS),
        ("tensor.pt", torch.tensor(POSITIONS)),
    ],
)
def test_ids_and_positions_are_read_from_each_kind_of_file(tmp_path: Path, name: str, content: Any):
    assert selected(Precomputed(coreset_file(tmp_path, name, content), pool_size=9)) == [0, 3, 7]


def test_a_list_of_numpy_1_is_read_which_names_its_scalars_otherwise(tmp_path: Path):
    """The authors' lists were written so."""
    new = coreset_file(tmp_path, "new.pt", [np.int64(i) for i in POSITIONS])
    old = tmp_path / "old.pt"
    with zipfile.ZipFile(new) as source, zipfile.ZipFile(old, "w") as target:
        for entry in source.namelist():
            target.writestr(entry, source.read(entry).replace(b"cnumpy._core.", b"cnumpy.core."))
    assert old.read_bytes().count(b"numpy.core.multiarray") == 1
    assert selected(Precomputed(str(old), pool_size=9)) == [0, 3, 7]


class Harmful:
    def __reduce__(self):
        return (Path.touch, (Path("harmful"),))


def test_nothing_but_integers_is_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"method.path=.*harm.pt holds more than integers, and is not unpickled"):
        Precomputed(coreset_file(tmp_path, "harm.pt", [Harmful()]), pool_size=9)
    assert not Path("harmful").exists()


def test_the_order_and_the_kind_of_the_file_do_not_change_what_a_list_is(tmp_path: Path):
    lists = [
        ("a.json", ["d7", "d0"]),
        ("b.json", ["d0", "d7"]),
        ("c.csv", "id\nd7\nd0\n"),
        ("d.json", ["d7", "d1"]),
    ]
    contents = [identity(Precomputed(coreset_file(tmp_path, *each))) for each in lists]
    assert contents[0] == contents[1] == contents[2] != contents[3]


@pytest.mark.parametrize(
    ("name", "content", "pool_size", "sentence"),
    [
        ("a.json", [7, 0], None, "lists positions, which do not identify their pool: set method.pool_size"),
        ("a.json", ["d7"], 0, "method.pool_size=0 must be a whole number of at least 1"),
        ("a.json", [], 9, "a.json holds nothing: it must be a list of ids"),
        ("a.json", ["d7", 0], 9, "a.json holds int, str: it must be a list of ids"),
        ("a.json", [1.0], 9, "a.json holds float: it must be"),
        ("a.json", {"d7": 1}, 9, "a.json holds dict: it must be"),
        ("a.pt", {"d7": 1}, 9, "a.pt holds dict: it must be"),
        ("a.pt", torch.zeros(2, 2), 9, "a.pt holds list: it must be"),
        ("a.json", '["d7"', 9, "a.json cannot be read (Expecting ',' delimiter"),
        ("a.csv", "sample\nd7\n", 9, "a.csv needs a column id or position; it has sample"),
        ("a.csv", "position\nd7\n", 9, "a.csv cannot be read (invalid literal for int() with base 10: 'd7')"),
        ("a.txt", "d7", 9, "a.txt is none of .json, .csv, .pt: convert it"),
        ("a.json", ["d7", "d0", "d7"], 9, "a.json lists 'd7' 2 times: list each sample once"),
        ("a.json", [0, 9, 12], 9, "lists 9 (2 in total), which is not among the pool's 9 samples (0 to 8)"),
        ("a.json", [-1], 9, "lists -1 (1 in total), which is not among"),
        (
            "a.json",
            ["d7", "x"],
            9,
            "lists 'x' (1 in total), which is not among the pool's 9 samples (such as 'd0')",
        ),
        ("a.json", ["d7"], 10, "method.pool_size=10, but this pool has 9 samples"),
    ],
)
def test_a_list_that_does_not_fit_is_refused_in_a_sentence(
    tmp_path: Path, name: str, content: Any, pool_size: int | None, sentence: str
):
    with pytest.raises(UserError) as refused:
        selected(Precomputed(coreset_file(tmp_path, name, content), pool_size))
    assert sentence in str(refused.value)


def test_a_run_on_the_coreset_of_another_run_reads_its_fine_tuning_and_its_answers(run, tmp_path: Path):
    chosen = run("method=random")
    moved = tmp_path / "moved.csv"
    moved.write_bytes((chosen["folder"] / "coreset.csv").read_bytes())
    again = run("method=precomputed", f"method.path={chosen['folder'] / 'coreset.csv'}", "pruning_rate=0.1")
    assert again["run"]["pruning_rate"] == again["config"]["pruning_rate"] == 0.75, "as the list has it"
    assert again["counts"]["budget"] == again["counts"]["selected"] == 6
    assert again["overhead"]["flops"] == 0
    for stage in ("finetuning", "evaluation"):
        assert again[stage]["fingerprint"] == chosen[stage]["fingerprint"]
    assert run("method=precomputed", f"method.path={moved}")["folder"] == again["folder"], "known by its content"


def test_a_run_without_a_file_or_with_a_list_of_another_pool_ends_before_a_model_loads(run, tmp_path, monkeypatch):
    from hydra.errors import InstantiationException

    from staff.models.spec import ModelSpec

    monkeypatch.setattr(ModelSpec, "load", lambda self: pytest.fail("a model was loaded"))
    with pytest.raises(InstantiationException, match=r"method.path=null is not a file: set method.path=FILE"):
        run("method=precomputed")
    path = coreset_file(tmp_path, "authors.pt", [np.int64(i) for i in range(3)])
    with pytest.raises(UserError, match=r"method.pool_size=13014, but this pool has 24 samples"):
        run("method=precomputed", f"method.path={path}", "method.pool_size=13014")


# ---------------------------------------------------------------- scores


SCORES = {"sample 0": 0.5, "sample 1": -2, "sample 2": 7.25, "sample 3": 1, "another": 99}


def score_file(folder: Path, suffix: str) -> Path:
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
    method = Imported(str(score_file(tmp_path, suffix)), which=which)
    assert select(method, AnyPool(4), 2).indices.tolist() == expected


@pytest.mark.parametrize(
    ("scores", "said"),
    [
        (np.arange(100.0), ""),
        (np.arange(100) % 10, ""),
        (np.arange(100) % 9, "9 different values, and 12% of the samples share one"),
        (np.maximum(np.arange(100) - 89, 0), "11 different values, and 90% of the samples share one"),
        (np.ones(100), "1 different value, and 100% of the samples share one"),
    ],
)
def test_a_score_of_few_values_or_of_one_for_nearly_all_is_told(scores: np.ndarray, said: str, tmp_path: Path):
    file = tmp_path / "scores.csv"
    pd.DataFrame({"id": [f"sample {i}" for i in range(100)], "score": scores}).to_csv(file, index=False)
    notes = select(Imported(str(file)), AnyPool(100), 10).notes
    assert said in "".join(notes) and bool(notes) == bool(said)


def test_the_scores_of_a_coreset_can_be_imported(tmp_path: Path):
    pool = AnyPool(30)
    select(Perplexity(), pool, 5).save(tmp_path, pool.ids)
    method = Imported(str(tmp_path / "samples.parquet"), column="loss", which="low")
    assert select(method, pool, 5).indices.tolist() == select(Perplexity("low"), pool, 5).indices.tolist()


def test_imported_scores_are_known_by_what_they_are_and_not_by_their_file(tmp_path: Path):
    digests = {
        Imported(str(score_file(tmp_path, suffix))).content_digest for suffix in (".json", ".csv", ".parquet")
    }
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
    method = Imported(str(score_file(tmp_path, ".csv")))
    with pytest.raises(UserError, match="no score for sample 'sample 4' \\(2 such in all\\)"):
        select(method, AnyPool(6), 2)
    (tmp_path / "nan.json").write_text('{"sample 0": 1, "sample 1": NaN}')
    with pytest.raises(UserError, match="imported score of sample 'sample 1' is nan"):
        select(Imported(str(tmp_path / "nan.json")), AnyPool(2), 1)
    with pytest.raises(UserError, match="path=null names no scores"):
        Imported()
