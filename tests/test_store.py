"""`staff-store`: what is there, whether it is whole, and what no record needs."""

import json
import sys
from pathlib import Path

import pytest
from support.processes import KILLED_WHILE_WRITING, Job, flip_a_bit, run, wait_for

from experiments import store as tool
from experiments.campaign import pack
from experiments.recorded import recorded_runs
from staff.store.manifest import Artifact
from staff.store.store import Store


def write(folder, meter):
    (folder / "scores.json").write_text("[1, 2]" * 100_000)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    return tmp_path / "results"


@pytest.fixture(autouse=True)
def version_five(monkeypatch: pytest.MonkeyPatch) -> None:
    """The present version of the stage."""
    monkeypatch.setitem(tool.VERSIONS, "scores", 5)


@pytest.fixture
def made(results: Path) -> dict[str, Artifact]:
    """A scoring that a record needs, one that none needs, and one that an older version of the stage made."""
    store = Store(results / "artifacts")
    versions = {"needed": 5, "forgotten": 5, "old": 4}
    found = {
        name: store.get(Job({"name": name}, write, version=version, label=f"scores {name}"))
        for name, version in versions.items()
    }
    record = results / "runs/some-run/metrics.json"
    record.parent.mkdir(parents=True)
    fingerprints = [found[name].fingerprint for name in ("needed", "old")]
    record.write_text(json.dumps({"overhead": {"stages": [{"fingerprint": name} for name in fingerprints]}}))
    return found


def store(*arguments: object, monkeypatch: pytest.MonkeyPatch) -> str | int | None:
    """Run it; returns what it exits with."""
    monkeypatch.setattr(sys, "argv", ["store", *map(str, arguments)])
    try:
        tool.main()
    except SystemExit as exit:
        return exit.code
    return None


def test_list_shows_size_age_cost_and_how_many_records_need_it(made, results, monkeypatch, capsys):
    assert store("list", "--results", results, monkeypatch=monkeypatch) is None
    out = capsys.readouterr().out
    rows = {line.split()[2]: line.split() for line in out.splitlines() if line.startswith("scores")}
    assert rows["needed"][3:6] == [made["needed"].fingerprint[:8], "0.6", "0.0"]
    assert (rows["needed"][-1], rows["forgotten"][-1]) == ("1", "0") and rows["old"][-2:] == ["older", "version"]
    assert "3 artefacts, 1.8 MB; they cost 0.0 s" in out


def test_a_packed_record_needs_its_artefacts_too(made, results, tmp_path):
    pack(recorded_runs(results), tmp_path / "packed")
    assert tool.needed([tmp_path / "packed"]) == tool.needed([results])


def test_list_shows_attempts_that_led_to_nothing(made, results, tmp_path, monkeypatch, capsys):
    with run(KILLED_WHILE_WRITING, results / "artifacts", tmp_path / "started") as process:
        wait_for(tmp_path / "started")
        process.kill()
    store("list", "--results", results, monkeypatch=monkeypatch)
    unfinished = Job({"seed": 0}).fingerprint[:8]
    assert f"not finished: {unfinished}, 1 attempt(s), 0.0 s" in capsys.readouterr().out


def test_verify_names_every_damaged_artefact_and_ends_with_an_error(made, results, monkeypatch, capsys):
    assert store("verify", "--results", results, monkeypatch=monkeypatch) is None
    assert "3 of 3 artefacts are what was written" in capsys.readouterr().out
    flip_a_bit(made["needed"].path / "scores.json")
    (made["forgotten"].path / "manifest.json").write_text("{")
    assert store("verify", "--results", results, monkeypatch=monkeypatch) == 1
    out = capsys.readouterr().out
    assert f"damaged: {made['needed'].path}/scores.json is not what was written" in out
    assert f"damaged: {made['forgotten'].path}/manifest.json is damaged" in out and "1 of 3" in out


def test_prune_removes_what_no_record_needs_and_only_after_saying_so(made, results, tmp_path, monkeypatch, capsys):
    other = (elsewhere := tmp_path / "elsewhere") / "results/runs/other"
    other.mkdir(parents=True)
    (other / "metrics.json").write_text("{}")
    (checkpoints := results / "artifacts/checkpoints/0123456789").mkdir(parents=True)
    (checkpoints / "checkpoint-1").mkdir()
    assert store("prune", "--results", results, monkeypatch=monkeypatch) is None
    said = capsys.readouterr().out
    assert f"no record needs it: scores forgotten ({made['forgotten'].path}, 0.6 MB" in said
    assert "older version: scores old" in said and "needed (" not in said
    assert "2 artefacts, 1.2 MB to remove; nothing is removed without --yes" in said
    assert f"not finished: checkpoints of 01234567 ({checkpoints})" in said and checkpoints.exists()
    assert all(artefact.path.exists() for artefact in made.values())
    monkeypatch.chdir(elsewhere)  # with results of its own, which say nothing of another store
    assert store("prune", "--yes", "--store", results / "artifacts", monkeypatch=monkeypatch) is None
    assert not checkpoints.exists()
    assert [name for name, artefact in made.items() if artefact.path.exists()] == ["needed"]
    assert not list((results / "artifacts/tmp").iterdir())


def test_prune_removes_nothing_while_a_process_is_at_work_or_where_no_record_is(
    made, results, tmp_path, monkeypatch
):
    elsewhere = tmp_path / "elsewhere"
    arguments = ("prune", "--yes", "--store", results / "artifacts", "--results")
    assert "holds no record, so nothing says what is needed" in str(
        store(*arguments, elsewhere, monkeypatch=monkeypatch)
    )
    with run(KILLED_WHILE_WRITING, results / "artifacts", tmp_path / "started") as process:
        wait_for(tmp_path / "started")
        assert "a process is at work in" in str(store(*arguments, results, monkeypatch=monkeypatch))
        process.kill()
    assert all(artefact.path.exists() for artefact in made.values())


def test_a_store_that_is_not_there_is_a_sentence(tmp_path, monkeypatch):
    said = store("list", "--results", tmp_path, monkeypatch=monkeypatch)
    assert said == f"staff: {tmp_path}/artifacts is not there: name the folder of the artefacts by --store."
