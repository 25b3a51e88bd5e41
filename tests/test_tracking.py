"""The record of a run and its environment. Its page on Weights & Biases: test_mirror.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from staff.tracking import environment, write_record


def test_a_record_is_strict_json_and_replaces_the_last_one_whole(tmp_path):
    write_record(tmp_path, {"metrics": {"rougeL": 1.0}})
    record = {
        "metrics": {"rougeL": np.float64("nan"), "bleu": float("inf"), "n": np.int64(3), "name": "Grüße"},
        "scores": np.array([1.0, np.nan]),
        "run": {"folder": tmp_path, "seeds": (0, 1), 5: True},
    }
    path = write_record(tmp_path, record)
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {
        "metrics": {"rougeL": None, "bleu": None, "n": 3, "name": "Grüße"},
        "scores": [1.0, None],
        "run": {"folder": str(tmp_path), "seeds": [0, 1], "5": True},
    }
    with pytest.raises(TypeError):
        write_record(tmp_path, {"model": object()})
    assert json.loads(path.read_text())["metrics"]["n"] == 3
    assert [file.name for file in tmp_path.iterdir() if "metrics" in file.name] == ["metrics.json"]


def git(folder: Path, *arguments: str) -> None:
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    subprocess.run(["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True)


def test_the_environment_names_the_commit_and_whether_it_was_changed(tmp_path):
    git(tmp_path, "init")
    (tmp_path / "code.py").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    clean = environment(tmp_path)
    assert len(clean["git_commit"]) == 40 and clean["git_dirty"] is False
    (tmp_path / "results").mkdir()
    (tmp_path / "results/metrics.json").write_text("what runs write does not change them")
    assert environment(tmp_path)["git_dirty"] is False
    (tmp_path / "code.py").write_text("2")
    assert environment(tmp_path)["git_dirty"] is True
    (tmp_path / "package").mkdir()
    inside = environment(tmp_path / "package")  # installed into somebody else's project
    assert inside["git_commit"] is None and inside["git_dirty"] is None
    assert clean["versions"]["numpy"] == np.__version__
    assert json.loads(json.dumps(clean)) == clean


def test_the_commit_of_another_users_checkout_is_read_and_no_program_of_its_configuration_is_run(
    tmp_path, monkeypatch
):
    git(tmp_path, "init")
    git(tmp_path, "commit", "--allow-empty", "-m", "first")
    git(tmp_path, "config", "core.fsmonitor", f"touch {tmp_path}/ran; false")
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    refused = subprocess.run(["git", "-C", str(tmp_path), "rev-parse", "HEAD"], capture_output=True, text=True)
    assert "dubious ownership" in refused.stderr
    read = environment(tmp_path)
    assert len(read["git_commit"]) == 40 and read["git_dirty"] is False
    assert not (tmp_path / "ran").exists()


def test_the_environment_is_read_without_importing_what_it_names():
    code = (
        "import sys; from pathlib import Path; from staff.tracking import environment;"
        "assert environment(Path('/'))['versions']['torch'];"
        "assert not {'torch', 'transformers', 'wandb', 'datasets'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
