"""Runs in tables are the runs that were in folders, digit by digit, and a report of either is the same."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from support.processes import here
from support.records import copied, grid

from experiments.campaign import differences, main, pack
from experiments.recorded import packed_runs, recorded_run, recorded_runs, run_folders
from experiments.report.__main__ import summary, write
from experiments.report.records import collect
from staff.errors import UserError
from staff.tracking import write_record

IDS = ["007", "NA", "Grüße 1", "d"]
REGIONS = "region,low,ratio\n0,0.30000000000000004,\n3,5e-324,1.5\n"


def leave(results: Path, name: str, scores: dict[str, Any], **changes: Any) -> Path:
    """The folder of a run, as a run leaves it."""
    folder = results / "runs" / name
    record = {
        "run": {"name": name, "method": "staff", "experiment": None, "seed": 1},
        "metrics": {"rougeL": 0.1 + 0.2},
        "overhead": {"seconds": 1e-17, "stages": [{"label": "scores – effort", "seconds": 1.0}]},
        "config": {"method": {"speculation": "small", "options": {}}, "task": {"metrics": ["rougeL"]}},
    }
    write_record(folder, record | changes)
    answers = {"id": IDS[:2], "prediction": ["", 'a "line"\nand another'], "tokens": [0, 7]}
    references = [["one"], ["two", "zwölf"]]
    pd.DataFrame({**answers, "references": references, "rougeL": [1 / 3, np.nan]}).to_parquet(
        folder / "predictions.parquet"
    )
    selected, lengths = [True, False, True, False], np.array([3, 1, 4, 1])
    samples = pd.DataFrame({"id": IDS, "selected": selected, "answer_tokens": lengths, **scores})
    samples.to_parquet(folder / "samples.parquet")
    chosen = samples[samples["selected"]].drop(columns=["selected", "answer_tokens"])
    chosen.to_csv(folder / "coreset.csv", index=False)
    (folder / "training.csv").write_text("training,step,loss\nfine-tune small,1,0.30000000000000004\n")
    return folder


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Three runs that share some scores, of which one has regions and one another task's metrics."""
    effort = np.array([0.1, -0.0, 5e-324, 1e300])
    verified = np.array([np.nan, 2.5, np.nan, np.nan])
    leave(tmp_path, "a", {"speculative": effort, "verified": verified})
    (tmp_path / "runs/a/regions.csv").write_text(REGIONS)
    leave(tmp_path, "b", {"speculative": effort, "verified": verified * 2})
    other = leave(tmp_path, "c", {"el2n": np.float32([1, 2, 3, 0.1])}, config={"method": {"speculation": 3}})
    answers = pd.read_parquet(other / "predictions.parquet").drop(columns="rougeL")
    answers.assign(exact_match=[0.0, 100.0]).to_parquet(other / "predictions.parquet")
    return tmp_path


def command(*arguments: object) -> subprocess.CompletedProcess:
    return here(main, *arguments)


def test_packed_runs_are_read_as_they_were_from_their_folders(results: Path):
    pack(recorded_runs(results), results)
    folders, packed = run_folders(results), packed_runs(results)
    assert list(packed) == sorted(folders) == ["a", "b", "c"]
    for name, run in packed.items():
        assert run.record() == folders[name].record()
        assert list(run.samples()) == list(pd.read_parquet(results / "runs" / name / "samples.parquet"))
        for kind in ("samples", "predictions", "regions"):
            first, again = getattr(folders[name], kind)(), getattr(run, kind)()
            assert (first is None) == (again is None)
            if first is not None:
                pd.testing.assert_frame_equal(first, again, check_exact=True, check_like=kind == "predictions")
    assert packed["a"].regions()["low"].tolist() == [0.1 + 0.2, 5e-324] and packed["b"].regions() is None
    assert list(packed["a"].predictions(["id", "rougeL", "bleu"])) == ["id", "rougeL"]
    assert np.signbit(packed["a"].samples()["speculative"][1]), "-0.0 is not 0.0"
    assert packed["c"].samples()["el2n"].dtype == np.float32


def test_a_score_vector_is_stored_once_and_fields_are_columns(results: Path):
    pack(recorded_runs(results), results)
    scores = pd.read_parquet(results / "scores.parquet")
    vectors = scores.drop_duplicates("vector")["signal"].value_counts().to_dict()
    assert vectors == {"answer_tokens": 1, "speculative": 1, "verified": 2, "el2n": 1} and len(scores) == 5 * len(
        IDS
    )
    runs = pd.read_parquet(results / "runs.parquet").set_index("run")
    assert runs["metrics.rougeL"].tolist() == 3 * [0.1 + 0.2] and runs.loc["a", "run.seed"] == 1
    assert runs["config.method.speculation"].tolist() == ['"small"', '"small"', "3"], "one column, one type"
    positions = pd.read_parquet(results / "selections.parquet").set_index("run")["positions"]
    assert positions["a"].tolist() == [0, 2]


def test_the_folder_of_a_run_takes_precedence_over_the_tables(results: Path):
    pack(recorded_runs(results), results)
    shutil.rmtree(results / "runs/b")
    leave(results, "a", {}, metrics={"rougeL": 9.0})
    leave(results, "new", {})
    runs = recorded_runs(results)
    assert list(runs) == ["a", "b", "c", "new"]
    assert runs["a"].record()["metrics"] == {"rougeL": 9.0} and runs["b"].record()["metrics"] == {
        "rougeL": 0.1 + 0.2
    }
    assert recorded_run(results / "runs/b").samples() is not None
    pack(runs, results)
    assert list(packed_runs(results)) == ["a", "b", "c", "new"] and list(differences(results, results)) == []


def test_packing_what_is_packed_changes_no_byte(results: Path):
    assert command("pack", results, "--into", results / "packed").returncode == 0
    before = {file.name: file.read_bytes() for file in (results / "packed").iterdir()}
    assert set(before) == {f"{name}.parquet" for name in ("runs", "predictions", "selections", "scores")}
    said = command("pack", results / "packed")
    assert said.returncode == 0 and said.stdout.startswith("3 runs packed: "), said.stderr
    assert {file.name: file.read_bytes() for file in (results / "packed").iterdir()} == before


def test_unpacked_runs_are_the_folders_that_were_packed(results: Path):
    pack(recorded_runs(results), results / "packed")
    assert command("unpack", results / "packed", "--into", results / "again").returncode == 0
    for file in results.glob("runs/*/*.*"):
        again = results / "again" / file.relative_to(results)
        assert again.read_bytes() == file.read_bytes() if file.suffix != ".parquet" else again.is_file()
    assert list(differences(results / "again", results / "packed")) == []
    said = command("check", results, "--tables", results / "packed")
    assert said.returncode == 0 and "3 runs" in said.stdout


def edit_text(file: str, old: str, new: str) -> Callable[[Path], None]:
    def edit(run: Path) -> None:
        text = (run / file).read_text()
        assert old in text
        (run / file).write_text(text.replace(old, new, 1))

    return edit


def edit_cell(file: str, column: str, value: Any) -> Callable[[Path], None]:
    def edit(run: Path) -> None:
        table = pd.read_parquet(run / file)
        assert table.loc[1, column] != value
        table.loc[1, column] = value
        table.to_parquet(run / file)

    return edit


CHANGES = {
    "metrics.json": edit_text("metrics.json", "0.30000000000000004", "0.3"),
    "training.csv": edit_text("training.csv", "0.30000000000000004", "0.3"),
    "regions.csv": edit_text("regions.csv", "5e-324", "0"),
    "coreset.csv": edit_text("coreset.csv", "007", "7"),
    "predictions.parquet, prediction": edit_cell("predictions.parquet", "prediction", 'a "line"'),
    "predictions.parquet, rougeL": edit_cell("predictions.parquet", "rougeL", 0.0),
    "samples.parquet, selected": edit_cell("samples.parquet", "selected", True),
    "samples.parquet, speculative": edit_cell("samples.parquet", "speculative", np.nextafter(0, 1)),
    "samples.parquet, id": edit_cell("samples.parquet", "id", "na"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_check_finds_the_smallest_difference_and_names_it(results: Path, what: str):
    pack(recorded_runs(results), results)
    CHANGES[what](results / "runs/a")
    assert f"a: {what}" in list(differences(results, results))


def test_a_check_fails_for_a_run_that_is_not_packed_or_a_column_that_is_not_its_field(results: Path):
    pack(recorded_runs(results), results)
    runs = pd.read_parquet(results / "runs.parquet")
    runs.assign(**{"metrics.rougeL": [0.3, *runs["metrics.rougeL"][1:]]}).to_parquet(results / "runs.parquet")
    leave(results, "new", {})
    said = command("check", results)
    assert said.returncode == 1 and "2 differences" in said.stderr
    assert "differs: new: not in the tables" in said.stdout
    assert "differs: a: the column metrics.rougeL of runs.parquet" in said.stdout


def test_what_cannot_be_packed_or_read_is_refused_in_a_sentence(results: Path):
    assert "holds no record: name the folder" in command("pack", results / "empty").stderr
    assert "TABLES.md is not there: name the tables" in command("tables", results / "empty").stderr
    assert "has no table 'main': run staff-report" in command("tables", results / "empty", "main").stderr
    assert "holds no runs.parquet" in command("unpack", results).stderr
    pack(recorded_runs(results), results / "packed")
    shutil.rmtree(results / "runs/a")
    with pytest.raises(UserError, match=r"hold 1 other run.*such as a: pack into another folder"):
        pack(recorded_runs(results), results / "packed")
    leave(results, "a", {"group": ["x", "y", "x", "y"]})
    with pytest.raises(
        UserError, match=r"a: the column 'group' of samples.parquet is .*: only numbers can be packed"
    ):
        pack(recorded_runs(results), results)
    (results / "packed/scores.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"scores.parquet cannot be read .*: restore the file"):
        packed_runs(results / "packed")["a"].samples()


@settings(max_examples=25)
@given(
    st.lists(st.floats(width=64), min_size=len(IDS), max_size=len(IDS)),
    st.lists(st.text(st.characters(exclude_categories=["Cs"])), min_size=2, max_size=2),
)
def test_any_number_and_any_text_come_back(tmp_path_factory, numbers: list[float], words: list[str]):
    results = tmp_path_factory.mktemp("any")
    run = leave(results, "a", {"el2n": np.array(numbers)}, run={"name": "a", "note": words[0]})
    answers = pd.read_parquet(run / "predictions.parquet")
    answers.assign(prediction=words, rougeL=numbers[:2]).to_parquet(run / "predictions.parquet")
    pack(recorded_runs(results), results)
    assert list(differences(results, results)) == []
    samples = packed_runs(results)["a"].samples()
    assert samples is not None
    np.testing.assert_array_equal(samples["el2n"], numbers)


def test_the_committed_results_are_small():
    said = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if said.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in said.stdout.decode().split("\0") if name and (ROOT / name).is_file()]
    results = [file for file in files if file.is_relative_to(ROOT / "results")]
    assert len(results) < 60 and sum(file.stat().st_size for file in results) < 12e6
    assert [file for file in results if "runs" in file.parts or file.suffix == ".html"] == []


def test_a_report_of_a_packed_campaign_is_that_of_its_run_folders(real: Path, tmp_path: Path):
    grid(real, tmp_path / "folders", {"raw": -5, "full": 0, "random": -2, "staff": 3}, seeds=2)
    copied(real, tmp_path / "folders", "staff", 0.5, (0, 0), np.full(8, 30.0), config__method__num_regions=20)
    pack(recorded_runs(tmp_path / "folders"), tmp_path / "tables")
    texts, reports = [], []
    for results in (tmp_path / "folders", tmp_path / "tables"):
        texts.append(summary(table := collect(results)))
        write(results, table)
        files = [
            results / "metrics.csv",
            results / "report.html",
            *results.glob("tables/*"),
            *results.glob("*/*.svg"),
        ]
        named = {file.relative_to(results): file.read_text().replace(str(results), "RESULTS") for file in files}
        reports.append({name: re.sub(r"base64,[\w+/=]+", "", text) for name, text in named.items()})
    assert texts[0] == texts[1]
    assert len(reports[0]) > 20 and [name for name in reports[0] if reports[0][name] != reports[1].get(name)] == []
