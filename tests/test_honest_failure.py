"""What fails says so in one line, leaves its traceback in a file, stops nobody else, and is resumed by the same
command. Workers that the system kills: test_sweep.py."""

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
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
Waiting = tuple[Path, tuple[str, ...], subprocess.Popen]


def failures(out: str, err: str) -> list[str]:
    """The line of every job that failed; each names a file with the traceback, and nothing else speaks of it."""
    found = [line for line in out.splitlines() if line.startswith("failed: ")]
    for line in found:
        assert "Traceback" in Path(line.split("traceback: ")[1].rstrip(")")).read_text()
    assert "Traceback" not in out + err
    return found


@pytest.fixture(scope="module", autouse=True)
def unreachable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Waiting]:
    """Folder, jobs and process of a sweep that waits for a hub while other tests run."""
    folder = tmp_path_factory.mktemp("unreachable")
    jobs = ("method=random", "pruning_rate=0.5", f"family.target.path={NAME}", "family.target.gated=true")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "0")
        patch.setenv("HF_HUB_CACHE", str(folder / "cache"))
        patch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
        sweep = start(folder, *jobs)
    yield folder, jobs, sweep
    sweep.kill()


@pytest.fixture(scope="module")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, tuple[str, ...], str, str]]:
    """Folder, jobs and words of a sweep of two, one short of memory, logged to a server that is dead."""
    folder = tmp_path_factory.mktemp("memory")
    (folder / "exhausts.py").write_text(EXHAUSTS)
    jobs = ("method=random", "pruning_rate=0.5", "method._target_=exhausts.Exhausts,baselines.random.Random")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(folder))
        patch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
        patch.setenv("WANDB_API_KEY", "0123456789" * 4)
        patch.setenv("WANDB_INIT_TIMEOUT", "2")
        patch.setenv("MEMORY", "short")
        out, err = (sweep := start(folder, *jobs, "tracking.mode=online")).communicate(timeout=300)
        assert sweep.returncode == 1, out + err
        patch.setenv("MEMORY", "enough")
        yield folder, jobs, out, err


def test_a_dead_tracking_server_costs_a_run_a_line_and_does_not_fail_it(memory):
    folder, _, out, err = memory
    assert err.count("logging offline, upload later with `wandb sync`") == err.count("Weights & Biases") == 1
    assert "wandb:" not in out + err
    (record,) = records(folder)
    assert len(list(folder.glob(f"runs/{record}/wandb/offline-run-*/*.wandb"))) == 1


def test_lack_of_memory_ends_its_job_alone_and_the_same_command_resumes(memory):
    folder, jobs, out, err = memory
    assert "1 of 2 jobs failed; the same command runs what is missing" in out
    (failed,) = failures(out, err)
    assert "exhausts.Exhausts" in failed and "out of memory" in failed and "lower" in failed
    said = finish(start(folder, *jobs))
    assert len(records(folder)) == 2 and said.count("recorded already") == 1


def test_a_hub_that_cannot_be_reached_is_one_line_and_the_same_command_resumes(unreachable, monkeypatch):
    folder, jobs, sweep = unreachable
    out, err = sweep.communicate(timeout=300)
    assert sweep.returncode == 1 and "1 of 1 jobs failed; the same command runs what is missing" in out
    (failed,) = failures(out, err)
    assert f"the model '{NAME}' cannot be had from the Hugging Face hub" in failed
    assert "It is gated: accept its licence" in failed and "a local folder: family.target.path=FOLDER" in failed
    assert "Retry" not in out + err and "thrown while" not in out + err

    repository = folder / "cache" / f"models--{NAME.replace('/', '--')}"
    shutil.copytree(ROOT / "staff/assets/tiny/target", repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs/main").write_text("a" * 40)
    monkeypatch.setenv("HF_HUB_CACHE", str(folder / "cache"))
    finish(start(folder, *jobs))
    assert len(records(folder)) == 1
