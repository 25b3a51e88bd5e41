"""A coreset from a file: the same wherever it lies and however it is written, and refused where it does not fit."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from baselines.precomputed import Precomputed
from staff import ArrayPool
from staff.errors import UserError
from staff.selection import Draws, run_method
from staff.store.stage import identity

POOL = ArrayPool([f"d{i}" for i in range(9)], {}, np.arange(9))
POSITIONS = [7, 0, 3]


def written(folder: Path, name: str, content: Any) -> str:
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
    assert selected(Precomputed(written(tmp_path, name, content), pool_size=9)) == [0, 3, 7]


def test_a_list_of_numpy_1_is_read_which_names_its_scalars_otherwise(tmp_path: Path):
    """The authors' lists were written so."""
    new = written(tmp_path, "new.pt", [np.int64(i) for i in POSITIONS])
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
        Precomputed(written(tmp_path, "harm.pt", [Harmful()]), pool_size=9)
    assert not Path("harmful").exists()


def test_the_order_and_the_kind_of_the_file_do_not_change_what_a_list_is(tmp_path: Path):
    lists = [
        ("a.json", ["d7", "d0"]),
        ("b.json", ["d0", "d7"]),
        ("c.csv", "id\nd7\nd0\n"),
        ("d.json", ["d7", "d1"]),
    ]
    contents = [identity(Precomputed(written(tmp_path, *each))) for each in lists]
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
        selected(Precomputed(written(tmp_path, name, content), pool_size))
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
    with pytest.raises(InstantiationException, match=r"method.path=None is not a file: set method.path=FILE"):
        run("method=precomputed")
    path = written(tmp_path, "authors.pt", [np.int64(i) for i in range(3)])
    with pytest.raises(UserError, match=r"method.pool_size=13014, but this pool has 24 samples"):
        run("method=precomputed", f"method.path={path}", "method.pool_size=13014")
