"""Stages of little work, and real processes that run them on one store."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from staff.store.cost import Meter
from staff.store.manifest import Artifact
from staff.store.stage import Stage

ROOT = Path(__file__).resolve().parents[2]


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
from support.stores import Job, write_scores
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


def wait_for(file: Path, seconds: float = 30) -> None:
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
