"""What surrounds a run: progress, threads, and the record of it. Its page on Weights & Biases: test_mirror.py."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from conftest import ROOT

import experiments
from staff.runtime import machine, progress
from staff.tracking import environment, write_record
from staff.training.reports import Progress

# ---------------------------------------------------------------- progress


def test_a_log_gets_a_line_now_and_then_of_what_takes_long_and_none_of_what_does_not(monkeypatch, caplog, capsys):
    caplog.set_level(logging.INFO)
    with progress.progress(3, "effort") as bar:
        bar.update(3)
    assert not caplog.messages
    monkeypatch.setattr(progress, "EVERY", 1e-9)
    with progress.progress(3, "effort") as bar:
        bar.update(2)
        bar.update(1)
    assert caplog.messages[0].startswith("effort: 2 of 3 samples, 00:00 gone")
    assert len(caplog.messages) == 2 and capsys.readouterr() == ("", "")


def test_a_fine_tuning_says_its_steps_its_remaining_time_and_its_loss(monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress, "EVERY", 1e-9)
    shown, state = Progress("small", 24), SimpleNamespace(max_steps=6, global_step=2)  # it resumes after the second
    shown.on_train_begin(None, state, None)
    shown.on_log(None, state, None, {"loss": 4.25})
    shown.on_step_end(None, state, None)
    shown.close()
    assert caplog.messages[0] == "fine-tuning small on 24 samples: 6 steps"
    assert re.fullmatch(
        r"fine-tuning small: 3 of 6 steps, 00:00 gone, \d\d:\d\d to go, loss 4\.250", caplog.messages[1]
    )


def test_a_terminal_shows_no_bar_without_a_name_and_no_dictionary(run, monkeypatch, capsys):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    run("method=random")
    shown = terminal.getvalue()
    bars = {bar.strip("\x1b[A\n ") for bar in re.split(r"[\r\n]", shown) if "%|" in bar}
    names = {bar.split(":")[0] for bar in bars}
    assert names == {
        "tokenise",
        "checking target",
        "checking small",
        "loading target",
        "fine-tuning target",
        "answers",
        "nll",
    }
    assert any(re.search(r"fine-tuning target.* 1/1 \[\d\d:\d\d<\d\d:\d\d", bar) for bar in bars), "the time to go"
    assert "{'loss'" not in shown + capsys.readouterr().out


def test_libraries_draw_no_bar_into_a_file(monkeypatch):
    """They read these variables when they are imported, for which a command waits."""
    bars = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
    for terminal in (False, True):
        monkeypatch.setattr(sys, "stderr", io.StringIO())
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)  # noqa: B023 - called in this round
        with patch.dict(os.environ), warnings.catch_warnings():
            for name in bars:
                os.environ.pop(name, None)
            experiments.quiet()
            assert [os.environ.get(name) for name in bars] == [None if terminal else "1"] * 2


def test_a_log_line_is_written_above_a_bar(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    handler = progress.LogHandler(terminal)
    with progress.tqdm(total=2, desc="work", file=terminal, leave=False) as bar:
        bar.update(1)
        handler.emit(logging.makeLogRecord({"msg": "a line"}))
    before, _, after = terminal.getvalue().partition("a line\n")
    assert before.endswith("\r") and "work:" in before and "work:" in after, "cleared, and drawn again"


@pytest.mark.parametrize(
    "command", ["run --help", "store list --store results/slice", "compare results/slice results/slice"]
)
def test_a_reader_that_has_had_enough_is_no_error(command: str):
    piped = f"{sys.executable} -m experiments.{command} | true"
    assert subprocess.run(piped, shell=True, cwd=ROOT, capture_output=True, text=True).stderr == ""


# ---------------------------------------------------------------- threads


SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"].values()
COMMANDS = [*sorted(script.partition(":")[0] for script in SCRIPTS), "experiments.benchmarks.scoring"]
OURS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "OMP_NUM_THREADS")


def without_ours(**settings: str) -> dict[str, str]:
    return {**{k: v for k, v in os.environ.items() if k not in OURS}, "PYTHONPATH": str(ROOT), **settings}


def python(code: str, *arguments: str, **settings: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=without_ours(**settings), capture_output=True, text=True, check=True
    )


def test_every_command_says_how_threads_wait_before_torch_is_loaded():
    """The import of torch is where it is looked at: by then OpenMP's setting must stand. Each command is imported
    in a fork of a process that has imported much of what it needs, but not torch."""
    code = """
import os, sys
import hydra, pandas, scipy.stats

class Look:
    def __init__(self, command):
        self.command = command

    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(self.command, os.environ.get("OMP_WAIT_POLICY"), flush=True)
            os._exit(0)

assert "torch" not in sys.modules
for command in sys.argv[1:]:
    if os.fork() == 0:
        sys.meta_path.insert(0, Look(command))
        __import__(command)
        import torch
    os.wait()
"""
    assert python(code, *COMMANDS).stdout.splitlines() == [f"{command} passive" for command in COMMANDS]


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
    experiments.wait_passively()
    assert {each: os.environ[each] for each in OURS if each in os.environ} == {name: "7"}


def test_the_library_leaves_the_environment_alone():
    code = "import os, staff.training.trainer, staff.dataset, staff.pool; print(*os.environ)"
    assert not {*python(code).stdout.split()} & {*OURS}


@pytest.mark.parametrize(("workers", "each"), [(1, "8"), (2, "4"), (3, "2"), (8, "1"), (20, "1")])
def test_each_worker_has_its_share_of_the_cores_unless_the_user_has_set_threads(
    workers: int, each: str, monkeypatch: pytest.MonkeyPatch
):
    """What a worker of the launcher then finds in its environment: test_launcher.py."""
    monkeypatch.setattr(machine, "cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert machine.worker_threads(workers) == {"OMP_NUM_THREADS": each}
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert machine.worker_threads(workers) == {}


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
    monkeypatch.setattr(machine, "CGROUPS", tmp_path)
    monkeypatch.setattr(machine, "OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8), raising=False)
    assert machine.cores() == expected


@pytest.fixture
def torch_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    machine.settle_threads.cache_clear()
    yield
    torch.set_num_threads(before)
    machine.settle_threads.cache_clear()


@pytest.mark.parametrize("load", [0.0, 2.0, 64.0])
def test_threads_are_those_of_the_machine_whatever_else_it_does_and_the_log_says_both(
    load: float, torch_threads: None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(machine, "cores", lambda: 3)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    said = machine.settle_threads()
    assert torch.get_num_threads() == 3 and said.startswith("computing with 3 threads on 3 cores")
    assert (f"beside other work ({load} processes" in said) == (load > 0)


def test_the_users_number_of_threads_stands(torch_threads: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine, "cores", lambda: 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert machine.settle_threads().startswith("computing with 4 threads on 2 cores")
    assert torch.get_num_threads() == 4


# ---------------------------------------------------------------- the record and the environment


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
