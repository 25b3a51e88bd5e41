"""Sweeps of small runs in processes of their own, and what must be equal however they went."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from staff.store.manifest import check_contents, check_sizes, read_manifest
from staff.store.store import RESERVED, Store

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
