"""Sweeps share their work, resume after they were killed or failed, and end with the same records."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import ROOT
from support.processes import (
    PARALLEL,
    SHRUNK,
    check_left_behind,
    check_store,
    computed,
    finish,
    here,
    manifests,
    records,
    stages,
    start,
)

from experiments.report import means
from experiments.report.__main__ import main as report
from experiments.run import main
from experiments.sweep import FOLDER, end, name
from hydra_plugins.staff_sweeper import in_cases
from staff.errors import UserError
from staff.tracking import write_record

# ---------------------------------------------------------------- resumed and averaged


GRID = ("method=full,staff,ccs", "pruning_rate=0.5,0.75")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Results and output of a sweep in one process."""
    results = tmp_path_factory.mktemp("undisturbed")
    return results, sweep_here(results, *GRID)


def sweep_here(results: Path, *arguments: str) -> str:
    """All that a sweep prints that has to succeed, run in this process."""
    ended = here(main, "-m", *SHRUNK, f"results_dir={results}", *arguments)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout + ended.stderr


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Results of the same sweep, killed in its middle and given again in two workers, and what it then printed."""
    results = tmp_path_factory.mktemp("killed")
    sweep, deadline = start(results, *GRID), time.monotonic() + 300
    while len(manifests(results)) < 5:
        assert sweep.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    sweep.kill()
    sweep.communicate(timeout=60)
    assert len(records(results)) < 5
    check_store(results)
    return results, finish(start(results, *GRID, *PARALLEL))


def test_a_grid_carries_out_every_stage_once(undisturbed: tuple[Path, str]):
    results, output = undisturbed
    assert len(records(results)) == 5, "full ignores the pruning rate"
    done = stages(results)
    assert set(computed(output).values()) == {1} and computed(output).total() == done.total()
    assert done["fine-tune small on 16 samples"] == 1
    assert done["fine-tune target on 16 samples"] == 1, "for the scores of CCS, and as the full fine-tuning"
    assert done["effort of 16 samples, fine-tuned small"] == 1
    assert done["el2n of 16 samples, fine-tuned target"] == 1
    assert sum(count for label, count in done.items() if label.startswith("answer")) == 5


def test_the_same_command_again_does_nothing_and_says_so(undisturbed: tuple[Path, str]):
    results, _ = undisturbed
    before = {file: file.stat().st_mtime_ns for file in results.glob("runs/*/*")}
    output = sweep_here(results, *GRID)
    assert output.count("recorded already") == 6 and "computed in" not in output
    assert {file: file.stat().st_mtime_ns for file in results.glob("runs/*/*")} == before


def test_a_sweep_that_is_killed_and_given_again_ends_with_the_records_of_an_undisturbed_one(
    undisturbed: tuple[Path, str], killed: tuple[Path, str]
):
    """Thirty kills at random moments, of the sweep alone and with its workers: tests/stress/test_sweeps.py."""
    results, output = killed
    assert "failed" not in output
    assert records(results) == records(undisturbed[0])
    assert stages(results) == stages(undisturbed[0])
    check_left_behind(results)


def test_two_workers_compute_what_both_need_once(killed: tuple[Path, str]):
    assert set(computed(killed[1]).values()) == {1}


def test_a_job_that_left_no_report_is_named_as_failed(tmp_path: Path, monkeypatch, capsys):
    """Where a cluster ends a job, or the launcher itself fails."""
    (tmp_path / "jobs.json").write_text('["seed=0", "seed=1"]')
    (tmp_path / "00001.json").write_text('{"job": "seed=1", "failure": "a defect", "traceback": "file"}')
    monkeypatch.setenv(FOLDER, str(tmp_path))
    assert end() == 2
    assert capsys.readouterr().out.splitlines() == [
        "failed: seed=0: it left no report",
        "failed: seed=1: a defect (traceback: file)",
        "2 of 2 jobs failed; the same command runs what is missing.",
    ]
    assert end() == 0, "the sweep is over"


def test_a_sweep_ends_with_means_over_seeds_of_every_method_and_rate(undisturbed: tuple[Path, str], tmp_path: Path):
    """Runs that differ in a setting are not averaged."""
    original = min(undisturbed[0].glob("runs/*staff*p0.75*/metrics.json")).read_text()
    values = {("random", 0): 20.0, ("random", 1): 23.0, ("random", 2): 26.0, ("full", 0): 30.0}
    for regions in (5, 9):
        values |= {(f"staff num_regions={regions}", seed): 10.0 + regions + seed for seed in (0, 1)}
    folders = []
    for (variant, seed), value in values.items():
        method, _, regions = variant.partition(" num_regions=")
        record = json.loads(original)
        record["run"] |= {"name": f"{variant}-{seed}", "method": method, "seed": seed}
        record["metrics"]["rougeL"] = value
        record["config"]["method"]["num_regions"] = int(regions or 50)
        folders.append(tmp_path / f"{variant}-{seed}")
        write_record(folders[-1], record)
    shown = [line.split(" 0.75 ") for line in str(means(folders)).splitlines() if " 0.75 " in line]
    lines = {variant.strip(): values.split()[1:] for variant, values in shown}
    assert lines["random"] == ["23.00", "±", "3.00", "3"]
    assert lines["staff num_regions=5"] == ["15.50", "±", "0.71", "2"]
    assert lines["staff num_regions=9"] == ["19.50", "±", "0.71", "2"]
    assert lines["full"] == ["30.00", "1"]
    assert means(folders[3:4]) is None, "a single run has no mean"
    assert "over seeds" not in undisturbed[1]


def test_a_sweep_has_a_name_that_the_same_sweep_has_again_and_no_other(tmp_path: Path, monkeypatch):
    def named(*jobs: str) -> str | None:
        (tmp_path / "jobs.json").write_text(json.dumps(jobs))
        return name()

    assert name() is None, "a single run"
    monkeypatch.setenv(FOLDER, str(tmp_path))
    first = named("method=staff seed=0 results_dir=a", "method=staff seed=1 results_dir=a")
    assert first and first.startswith("sweep-seed-")
    assert named("method=staff seed=1 results_dir=b", "method=staff seed=0 results_dir=b") == first
    other = named("method=random seed=0", "method=random seed=1")
    assert other and other.startswith("sweep-seed-") and other != first


def test_the_report_averages_over_seeds_alone_and_names_what_is_missing(
    undisturbed: tuple[Path, str], tmp_path: Path, monkeypatch, capsys
):
    results, _ = undisturbed

    def reported(*arguments: object) -> tuple[object, str]:
        """Exit status and output."""
        monkeypatch.setattr(sys, "argv", ["staff-report", *map(str, arguments)])
        try:
            report()
            status = None
        except SystemExit as exit:
            status = exit.code
        return status, capsys.readouterr().out

    status, out = reported("--results", results)
    assert status is None and "runs differ by method, pruning_rate" in out
    assert (results / "metrics.csv").read_text().count("\n") == 6
    assert str(reported("--results", tmp_path)[0]).startswith(f"staff: {tmp_path}/runs holds no record")

    for record in results.glob("runs/*ccs*0.75*/metrics.json"):
        record.unlink()
    status, out = reported("--results", results)
    (missing,) = [line for line in out.splitlines() if line.startswith("missing:")]
    assert str(status).startswith("0 failed, 1 missing") and missing.endswith("method=ccs pruning_rate=0.75")
    assert reported("--results", results, "--allow-missing")[0] is None


def test_a_sweep_in_cases_runs_every_case_with_every_value_of_its_parameters():
    jobs = [["candidate=ifd", "seed=0"], ["candidate=ifd", "seed=1"]]
    last = {"when": "group", "run": "method=<candidate> 'a=[b, c]'"}
    cases = ["method=raw", {"when": None, "run": "method=d2"}, last]
    expected = [[*case, f"seed={s}"] for s in (0, 1) for case in (["method=raw"], ["method=ifd", "a=[b, c]"])]
    assert in_cases(jobs, cases) == expected
    assert in_cases(jobs, []) == jobs
    with pytest.raises(UserError, match=r"cases names <model>: set hydra.sweeper.params.model"):
        in_cases(jobs, ["method=<model>"])


# ---------------------------------------------------------------- what fails says so in one line


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
    *("method=random", "pruning_rate=0.5", "evaluation=none"),
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
    """Four jobs in a worker, three of which fail, logged to a W&B server that is dead; then given again."""
    folder = tmp_path_factory.mktemp("failed")
    (folder / "failing.py").write_text(METHODS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{folder}:{ROOT}")
        patch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
        patch.setenv("WANDB_API_KEY", "0123456789" * 4)
        patch.setenv("WANDB_INIT_TIMEOUT", "2")
        patch.setenv("FAILS", "yes")
        sweep = start(folder, "tracking.mode=online", *JOBS, *PARALLEL[:1], "hydra.launcher.workers=1")
        out, err = sweep.communicate(timeout=300)
        assert sweep.returncode == 1, out + err
        patch.setenv("FAILS", "no")
        patch.syspath_prepend(folder)
        return Sweep(folder, out, err, resumed=sweep_here(folder, *JOBS))


def test_a_job_that_is_killed_raises_or_exhausts_memory_fails_alone_and_says_why_in_one_line(failed: Sweep):
    assert "3 of 4 jobs failed; the same command runs what is missing" in failed.out
    dies, raises, exhausts = failed.failures()
    assert "method._target_=failing.Dies: its worker process was killed by SIGKILL" in dies
    assert "method._target_=failing.Raises: RuntimeError: a defect (" in raises
    assert "method._target_=failing.Exhausts: out of memory" in exhausts and "lower" in exhausts
    assert "Error executing job" not in failed.err and "staff: " not in failed.err, (
        "the first failure ends no sweep"
    )


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
    assert f"the model '{NAME}' cannot be read from the Hugging Face hub" in failure
    assert "accept its licence" in failure and "a local folder: family.target.path=FOLDER" in failure
    assert "Retry" not in sweep.out + sweep.err and "thrown while" not in sweep.out + sweep.err

    repository = folder / "cache" / f"models--{NAME.replace('/', '--')}"
    shutil.copytree(ROOT / "staff/assets/tiny/target", repository / "snapshots" / ("a" * 40))
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs/main").write_text("a" * 40)
    monkeypatch.setenv("HF_HUB_CACHE", str(folder / "cache"))
    finish(start(folder, *GATED))
    assert len(records(folder)) == 1
