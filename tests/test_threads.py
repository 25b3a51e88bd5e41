"""Threads of the application sleep while they wait, workers share the cores, and what the user sets wins."""

import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from experiments import threads

SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"].values()
COMMANDS = [*sorted(script.partition(":")[0] for script in SCRIPTS), "experiments.benchmarks.scoring"]
OURS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")


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
import {command}
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
    code = "import os, staff.training.trainer, staff.dataset, staff.pool; print(*os.environ)"
    assert not {*python(code).stdout.split()} & {*OURS}


@pytest.mark.parametrize(("workers", "each"), [(1, "8"), (2, "4"), (3, "2"), (8, "1"), (20, "1")])
def test_each_worker_has_its_share_of_the_cores_unless_the_user_has_set_threads(
    workers: int, each: str, monkeypatch: pytest.MonkeyPatch
):
    """What a worker of the launcher then finds in its environment: test_launcher.py."""
    monkeypatch.setattr(threads, "cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert threads.of_worker(workers) == {"OMP_NUM_THREADS": each}
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert threads.of_worker(workers) == {}


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, 8),
        ({"": "max 100000"}, 8),
        ({"": "250000 100000"}, 2),
        ({"": "50000 100000"}, 1),
        ({"pod": "600000 100000", "pod/box": "300000 100000"}, 3),
        ({"pod": "200000 100000", "pod/box": "max 100000"}, 2),
    ],
)
def test_a_container_has_the_cores_of_its_cpu_limit(
    limits: dict[str, str], expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "own").write_text("1:cpu:/other\n0::/pod/box\n")
    for group, limit in limits.items():
        (tmp_path / group).mkdir(parents=True, exist_ok=True)
        (tmp_path / group / "cpu.max").write_text(f"{limit}\n")
    monkeypatch.setattr(threads, "CGROUPS", tmp_path)
    monkeypatch.setattr(threads, "OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8), raising=False)
    assert threads.cores() == expected


@pytest.fixture
def torch_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads.settled.cache_clear()
    yield
    torch.set_num_threads(before)
    threads.settled.cache_clear()


@pytest.mark.parametrize("load", [0.0, 2.0, 64.0])
def test_threads_are_those_of_the_machine_whatever_else_it_does_and_the_log_says_both(
    load: float, torch_threads: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(threads, "cores", lambda: 3)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    said = threads.settled()
    assert torch.get_num_threads() == 3 and said.startswith("computing with 3 threads on 3 cores")
    assert (f"beside other work ({load} processes" in said) == (load > 0)


def test_the_users_number_of_threads_stands(torch_threads: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(threads, "cores", lambda: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert threads.settled().startswith("computing with 4 threads on 2 cores")
    assert torch.get_num_threads() == 4
