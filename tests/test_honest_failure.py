"""What fails says so in one line, leaves its traceback in a file, stops no other job, and is resumed by the same
command."""

import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT
from support.processes import PARALLEL, finish, records, start

METHODS = """
import os, signal
import torch
from baselines.random import Random

class Failing(Random):
    def select(self, pool, budget, rng):
        if os.environ["FAILS"] == "yes":
            self.fail()
        return super().select(pool, budget, rng)

class Dies(Failing):
    def fail(self):
        os.kill(os.getpid(), signal.SIGKILL)

class Raises(Failing):
    def fail(self):
        raise RuntimeError("a defect")

class Exhausts(Failing):
    def fail(self):
        torch.ones(2**55)  # an exabyte and more
"""
JOBS = (
    *("method=random", "pruning_rate=0.5"),
    "method._target_=failing.Dies,failing.Raises,failing.Exhausts,baselines.random.Random",
)
NAME = "somebody/not-in-any-cache"
GATED = ("method=random", "pruning_rate=0.5", f"family.target.path={NAME}", "family.target.gated=true")


@dataclass
class Sweep:
    """Folder, standard output and standard error of a sweep; `resumed`: all that the same command printed once
    nothing failed any more."""

    folder: Path
    out: str
    err: str
    resumed: str = ""

    def failures(self) -> list[str]:
        """The line of every job that failed. Each names a file with the traceback, which is printed nowhere."""
        found = [line for line in self.out.splitlines() if line.startswith("failed: ")]
        for line in found:
            told = Path(line.split("traceback: ")[1].rstrip(")")).read_text()
            assert "Traceback" in told or "its worker process was killed" in told
        assert "Traceback" not in self.out + self.err and "Error executing job" not in self.err
        return found


@pytest.fixture(scope="module", autouse=True)
def unreachable(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, subprocess.Popen]]:
    """A sweep that waits for a hub while other tests run."""
    folder = tmp_path_factory.mktemp("unreachable")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "0")
        patch.setenv("HF_HUB_CACHE", str(folder / "cache"))
        patch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
        sweep = start(folder, *GATED)
    yield folder, sweep
    sweep.kill()


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """Four jobs in two workers, three of which fail, logged to a W&B server that is dead; then given again."""
    folder = tmp_path_factory.mktemp("failed")
    (folder / "failing.py").write_text(METHODS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{folder}:{ROOT}")
        patch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
        patch.setenv("WANDB_API_KEY", "0123456789" * 4)
        patch.setenv("WANDB_INIT_TIMEOUT", "2")
        patch.setenv("FAILS", "yes")
        sweep = start(folder, "tracking.mode=online", *JOBS, *PARALLEL)
        out, err = sweep.communicate(timeout=300)
        assert sweep.returncode == 1, out + err
        patch.setenv("FAILS", "no")
        return Sweep(folder, out, err, resumed=finish(start(folder, *JOBS)))


def test_a_job_that_is_killed_raises_or_exhausts_memory_fails_alone_and_says_why_in_one_line(failed: Sweep):
    assert "3 of 4 jobs failed; the same command runs what is missing" in failed.out
    dies, raises, exhausts = failed.failures()
    assert "method._target_=failing.Dies: its worker process was killed by SIGKILL" in dies
    assert "method._target_=failing.Raises: RuntimeError: a defect (" in raises
    assert "method._target_=failing.Exhausts: out of memory" in exhausts and "lower" in exhausts


def test_the_same_command_runs_the_jobs_that_failed_and_no_other(failed: Sweep):
    assert len(records(failed.folder)) == 4 and failed.resumed.count("recorded already") == 1


def test_a_dead_tracking_server_costs_a_run_a_line_and_does_not_fail_it(failed: Sweep):
    said = failed.out + failed.err
    assert said.count("logging offline, upload later with `wandb sync`") == said.count("Weights & Biases") == 4
    assert "wandb:" not in said
    assert len(list(failed.folder.glob("runs/*/wandb/offline-run-*/*.wandb"))) == 4, "one for every job"
    assert "resource_tracker" not in said


def test_a_hub_that_cannot_be_reached_is_one_line_and_the_same_command_resumes(unreachable, monkeypatch):
    folder, process = unreachable
    sweep = Sweep(folder, *process.communicate(timeout=300))
    assert process.returncode == 1 and "1 of 1 jobs failed; the same command runs what is missing" in sweep.out
    (failure,) = sweep.failures()
    assert f"the model '{NAME}' cannot be had from the Hugging Face hub" in failure
    assert "accept its licence" in failure and "a local folder: family.target.path=FOLDER" in failure
    assert "Retry" not in sweep.out + sweep.err and "thrown while" not in sweep.out + sweep.err

    repository = folder / "cache" / f"models--{NAME.replace('/', '--')}"
    shutil.copytree(ROOT / "staff/assets/tiny/target", repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs/main").write_text("a" * 40)
    monkeypatch.setenv("HF_HUB_CACHE", str(folder / "cache"))
    finish(start(folder, *GATED))
    assert len(records(folder)) == 1
