"""What fails says so in one line, leaves its traceback in a file, stops nobody else, and is resumed by the same
command. Workers that the system kills: test_sweep.py."""

import shutil
from pathlib import Path

from conftest import ROOT
from test_sweep import finish, records, start

EXHAUSTS = """
import os

import torch

from baselines.random import Random


class Exhausts(Random):
    def select(self, pool, budget, rng):
        if os.environ["MEMORY"] == "short":
            torch.ones(2**55)  # an exabyte and more
        return super().select(pool, budget, rng)
"""
NAME = "somebody/not-in-any-cache"


def failures(out: str, err: str) -> list[str]:
    """The line of every job that failed; each names a file with the traceback, and nothing else speaks of it."""
    found = [line for line in out.splitlines() if line.startswith("failed: ")]
    for line in found:
        assert "Traceback" in Path(line.split("traceback: ")[1].rstrip(")")).read_text()
    assert "Traceback" not in out + err
    return found


def test_lack_of_memory_ends_its_job_alone_and_the_same_command_resumes(tmp_path: Path, monkeypatch):
    (tmp_path / "exhausts.py").write_text(EXHAUSTS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    jobs = ("method=random", "pruning_rate=0.5", "method._target_=exhausts.Exhausts,baselines.random.Random")
    monkeypatch.setenv("MEMORY", "short")
    out, err = (sweep := start(tmp_path, *jobs)).communicate(timeout=300)
    assert sweep.returncode == 1 and "1 of 2 jobs failed; the same command runs what is missing" in out
    (failed,) = failures(out, err)
    assert "exhausts.Exhausts" in failed and "out of memory" in failed and "lower" in failed
    assert len(records(tmp_path)) == 1
    monkeypatch.setenv("MEMORY", "enough")
    said = finish(start(tmp_path, *jobs))
    assert len(records(tmp_path)) == 2 and said.count("recorded already") == 1


def test_a_hub_that_cannot_be_reached_is_one_line_ends_its_job_alone_and_the_same_command_resumes(
    tmp_path: Path, monkeypatch
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    targets = f"family.target.path={NAME},pkg://staff/assets/tiny/target"
    jobs = ("method=random", "pruning_rate=0.5", targets, "family.target.gated=true")
    out, err = (sweep := start(tmp_path, *jobs)).communicate(timeout=300)
    assert sweep.returncode == 1 and "1 of 2 jobs failed; the same command runs what is missing" in out
    (failed,) = failures(out, err)
    assert f"the model '{NAME}' cannot be had from the Hugging Face hub" in failed
    assert "It is gated: accept its licence" in failed and "a local folder: family.target.path=FOLDER" in failed
    assert "Retry" not in out + err and "thrown while" not in out + err
    assert len(records(tmp_path)) == 1

    repository = tmp_path / "cache" / f"models--{NAME.replace('/', '--')}"
    shutil.copytree(ROOT / "staff/assets/tiny/target", repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs/main").write_text("a" * 40)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    said = finish(start(tmp_path, *jobs))
    assert len(records(tmp_path)) == 2 and said.count("recorded already") == 1


def test_a_dead_tracking_server_costs_every_run_a_line_and_fails_none(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    out, err = (
        sweep := start(tmp_path, "method=raw,random", "pruning_rate=0.5", "tracking.mode=online")
    ).communicate(timeout=300)
    assert sweep.returncode == 0, out + err
    assert err.count("logging offline, upload later with `wandb sync`") == err.count("Weights & Biases") == 2
    assert "wandb:" not in out + err and not failures(out, err)
    assert len(records(tmp_path)) == len(list(tmp_path.glob("runs/*/wandb/offline-run-*/*.wandb"))) == 2
