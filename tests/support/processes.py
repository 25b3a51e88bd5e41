"""Sweeps and stages of little work in processes of their own, and what must be equal however they went."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from hydra.core.singleton import Singleton
from safetensors.numpy import save_file

from experiments.configuration import register_resolvers
from staff.runtime import preemption
from staff.store.cost import Meter
from staff.store.manifest import Artifact, check_contents, check_sizes, read_manifest
from staff.store.stage import Stage
from staff.store.store import RESERVED, Store

# ---------------------------------------------------------------- sweeps of small runs


ROOT = Path(__file__).resolve().parents[2]
SHRUNK = (
    "task.train_limit=16",
    "task.test_limit=2",
    "task.max_new_tokens=2",
    "finetune.epochs=1",
    "finetune.small_epochs=1",
    "tracking=none",
)
PARALLEL = ("hydra/launcher=local", "hydra.launcher.workers=2")


def start(results: Path, *arguments: str) -> subprocess.Popen:
    """A sweep, at the head of a process group that its workers belong to."""
    command = [sys.executable, "-m", "experiments.run", "-m", *SHRUNK, f"results_dir={results}", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def finish(sweep: subprocess.Popen) -> str:
    """Wait for a sweep that has to succeed, and return all that it printed."""
    out, err = sweep.communicate(timeout=300)
    assert sweep.returncode == 0, out + err
    return out + err


def here(main: Callable[[], None], *arguments: object) -> subprocess.CompletedProcess[str]:
    """A command in this process, which has imported everything, with what it prints and its exit status.

    What it changes for its whole process (environment, signals, log, warnings and Hydra's state) is put back.
    """
    register_resolvers()
    hydra, signals = Singleton.get_state(), {each: signal.getsignal(each) for each in preemption.SIGNALS}
    root = logging.getLogger()
    loggers = [root, *(each for each in root.manager.loggerDict.values() if isinstance(each, logging.Logger))]
    log = [(each, each.handlers[:], each.level, each.propagate, each.disabled) for each in loggers]
    out, err, status = StringIO(), StringIO(), None
    words = ["staff", *map(str, arguments)]
    # Hydra's configuration of the log closes every handler on this list, and absl's handler closes its stream.
    open_handlers = patch.object(logging, "_handlerList", [])
    with open_handlers, patch.object(sys, "argv", words), patch.dict(os.environ), warnings.catch_warnings():
        try:
            with redirect_stdout(out), redirect_stderr(err):
                main()
        except SystemExit as end:
            status = end.code
        finally:
            Singleton.set_state(hydra)
            for each, handlers, level, propagate, disabled in log:
                each.handlers[:], each.propagate, each.disabled = handlers, propagate, disabled
                each.setLevel(level)
            for number, handler in signals.items():
                signal.signal(number, handler)
    if isinstance(status, str):
        err.write(f"{status}\n")
    code = int(isinstance(status, str) or status or 0)
    return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def kill(sweep: subprocess.Popen, how: signal.Signals, seconds: float, whole: bool) -> bool:
    """Send a signal after so many seconds, to the sweep with its workers (`whole`) or to it alone.

    Returns whether it was still running.
    """
    with suppress(subprocess.TimeoutExpired):
        sweep.communicate(timeout=seconds)
        return False
    os.killpg(sweep.pid, how) if whole else sweep.send_signal(how)
    sweep.communicate(timeout=300)  # returns once its workers have ended too
    return True


# Times and what rests on them, memory, where it ran, and which of several runs came first.
DIFFERS = {
    *("started", "finished", "seconds", "str", "str_basis", "full_finetuning_seconds", "peak_memory_bytes"),
    *("computed", "provenance", "results_dir", "store_dir", "workers", "processes", "sweep"),
}


def records(results: Path) -> dict[str, dict]:
    """By run, what must be equal however a sweep went: the whole record but `DIFFERS`."""
    return {file.parent.name: lasting(json.loads(file.read_text())) for file in results.glob("runs/*/metrics.json")}


def lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: lasting(entry) for name, entry in value.items() if name not in DIFFERS}
    return [lasting(entry) for entry in value] if isinstance(value, list) else value


def manifests(results: Path) -> list[Path]:
    return [*results.glob("artifacts/*/*/manifest.json")]


def stages(results: Path) -> Counter[str]:
    """How many artefacts there are of each label."""
    return Counter(json.loads(file.read_text())["label"] for file in manifests(results))


def computed(log: str) -> Counter[str]:
    """How often each artefact was computed, by the log of a sweep."""
    return Counter(re.findall(r"\((\w+ [0-9a-f]{8})\): computed in", log))


def check_store(results: Path) -> None:
    """Every artefact in the store is whole, whatever has just been killed."""
    for folder in results.glob("artifacts/*/????????????????????????????????"):
        if folder.parent.name not in RESERVED:
            manifest, _ = read_manifest(folder)
            check_sizes(folder, manifest)
            check_contents(folder, manifest)


def check_left_behind(results: Path) -> None:
    """A finished sweep leaves no draft, attempt or checkpoint of processes that were killed before it."""
    for folder in ("tmp", "attempts", "checkpoints"):
        assert not list((results / "artifacts" / folder).glob("*"))
    assert not Store(results / "artifacts").held_locks()


# ---------------------------------------------------------------- stages of little work


def save(folder: Path, meter: Meter) -> None:
    save_file({"score": np.zeros(3)}, folder / "scores.safetensors")


def write_scores(folder: Path, meter: Meter) -> None:
    (folder / "scores.json").write_text("[1, 2]")
    meter.add(flops=3.5e9, tokens_forward=20, tokens_backward=10)


@dataclass(frozen=True)
class Job(Stage):
    """A stage of any key, whose work is a function of its folder and meter."""

    settings: dict[str, Any]
    work: Callable[[Path, Meter], Any] = write_scores
    kind: str = "scores"
    version: int = 1
    label: str = "effort"
    inputs: tuple[Stage, ...] = ()

    def key(self) -> dict[str, Any]:
        return self.settings

    def run(self, folder: Path, meter: Meter, *inputs: Artifact) -> None:
        self.work(folder, meter)


def never(folder: Path, meter: Meter) -> None:
    raise AssertionError("run a second time")


class Clock:
    """Stands for the module `time` where seconds are measured: they pass only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


# Processes

PRELUDE = """
import os, sys, time
from pathlib import Path
from staff.store.store import Store
from support.processes import Job, write_scores
store, side = Store(sys.argv[1]), Path(sys.argv[2])
"""
KILLED_WHILE_WRITING = """
def work(folder, meter):
    (folder / "scores.json").write_text("[1")
    side.touch()
    time.sleep(60)
store.get(Job({"seed": 0}, work))
"""


def run(script: str, *arguments: object) -> subprocess.Popen:
    """A process that has a store at argv[1] and a side file at argv[2]."""
    command = [sys.executable, "-c", PRELUDE + script, *map(str, arguments)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def wait_for(file: Path, seconds: float = 120) -> None:
    """Until the file is there; fails after so many seconds."""
    deadline = time.monotonic() + seconds
    while not file.exists():
        assert time.monotonic() < deadline, f"{file} did not appear"
        time.sleep(0.01)


def flip_a_bit(file: Path, at: bytes = b"1") -> None:
    """Change the last byte of the first `at` in a file."""
    content = file.read_bytes()
    position = content.index(at) + len(at) - 1
    file.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
