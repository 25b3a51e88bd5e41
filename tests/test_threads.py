"""Threads of the application sleep while they wait, workers share the cores, and what the user sets wins."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from experiments import threads

COMMANDS = ("run", "plan", "report.__main__", "export", "store", "compare", "replay", "benchmarks.scoring")
OURS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")
SEES_THREADS = """
import os
from dataclasses import dataclass

import torch

from staff.errors import UserError


@dataclass(frozen=True)
class Sees:
    def select(self, pool, budget, rng):
        raise UserError(f"{torch.get_num_threads()} threads, {os.environ['OMP_WAIT_POLICY']}")
"""


def environment(**settings: str) -> dict[str, str]:
    return {**{k: v for k, v in os.environ.items() if k not in OURS}, "PYTHONPATH": str(ROOT), **settings}


def python(code: str, **settings: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, cwd=ROOT, env=environment(**settings), capture_output=True, text=True, check=True
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_how_threads_wait_before_torch_is_loaded(command: str):
    """The import of torch is where it is looked at: by then OpenMP's setting must stand."""
    code = f"""
import os, sys
class Look:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("OMP_WAIT_POLICY"), flush=True)
            os._exit(0)
sys.meta_path.insert(0, Look())
import experiments.{command}
import torch
"""
    assert python(code).stdout.split() == ["passive"]


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP tells its settings, others may not")
def test_openmp_itself_has_read_it_and_the_users_own_setting_wins():
    def told(**settings: str) -> str:
        said = python("import experiments.run, torch", OMP_DISPLAY_ENV="true", **settings).stderr
        return next(line for line in said.splitlines() if "OMP_WAIT_POLICY" in line).split("'")[1]

    assert told() == "PASSIVE"
    assert told(OMP_WAIT_POLICY="active") == "ACTIVE"


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_whatever_the_user_has_set_of_it_is_left_alone(name: str, monkeypatch: pytest.MonkeyPatch):
    for each in OURS:
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv(name, "7")
    threads.wait_passively()
    assert {each: os.environ[each] for each in OURS if each in os.environ} == {name: "7"}


def test_the_library_leaves_the_environment_alone():
    code = "import os; before = dict(os.environ); import staff.finetune, staff.dataset, staff.pool; "
    assert python(code + "print(before == dict(os.environ))").stdout.split()[-1] == "True"


@pytest.mark.parametrize(("workers", "each"), [(2, "4"), (3, "2"), (8, "1"), (20, "1"), (1, None)])
def test_workers_share_the_cores(workers: int, each: str | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "cores", lambda: 8)
    said = threads.share_cores(workers)
    assert os.environ.get("OMP_NUM_THREADS") == each
    assert said == (f"each with {each} of 8 cores" if each else "with as many threads as torch chooses")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert threads.share_cores(workers) == "each with OMP_NUM_THREADS=5" and os.environ["OMP_NUM_THREADS"] == "5"


def test_the_workers_of_a_sweep_compute_so_and_the_log_says_it(tmp_path: Path):
    (tmp_path / "sees.py").write_text(SEES_THREADS)
    sweep = [sys.executable, "-m", "experiments.run", "-m", "hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    sweep += ["method=random", "method._target_=sees.Sees", "seed=0,1", "task.train_limit=8", "task.test_limit=2"]
    sweep += ["pruning_rate=0.5", "tracking=none", f"results_dir={tmp_path}"]
    seen = environment(PYTHONPATH=f"{ROOT}:{tmp_path}")
    done = subprocess.run(sweep, cwd=ROOT, env=seen, capture_output=True, text=True)
    each = max(1, threads.cores() // 2)
    said = done.stdout + done.stderr
    assert said.count(f"a sweep of 2 jobs, 2 at a time, each with {each} of {threads.cores()} cores") == 1, said
    assert done.stdout.count(f"{each} threads, passive") == 2, said
