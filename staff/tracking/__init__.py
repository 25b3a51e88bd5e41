"""The record of a run: metrics.json. `staff.tracking.mirror` shows it on Weights & Biases."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "datasets",
    "accelerate",
    "hydra-core",
    "wandb",
    "pandas",
    "numpy",
)


def write_record(folder: Path, record: Mapping[str, Any]) -> Path:
    """Write `record` to `folder`/metrics.json, whole or not at all, and return the path."""
    path = folder / "metrics.json"
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".metrics.{os.getpid()}.json"
    try:
        temporary.write_text(as_json(record), encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    return path


def as_json(record: Mapping[str, Any]) -> str:
    """A record as strict JSON: values that are not finite become null, NumPy values plain ones, paths text.

    Raises:
        TypeError: any other type.
    """
    return json.dumps(_plain(record), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, Path):
        return str(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def environment(root: Path) -> dict[str, Any]:
    """The environment of a run: the git commit, the versions of Python and of packages, and the hardware.

    "git_dirty" is whether the checkout at `root` has uncommitted changes outside of results/; it is None if `root`
    is not a checkout. GPUs and the number of threads are given only if torch is already imported.
    """
    from staff.runtime.machine import processor_name

    top = _git(root, "rev-parse", "--show-toplevel")
    ours = top is not None and Path(top).resolve() == root.resolve()  # not another project's with an environment
    status = _git(root, "status", "--porcelain", "--", ":/", ":(exclude)results") if ours else None
    torch = sys.modules.get("torch")
    gpus = range(torch.cuda.device_count()) if torch else ()
    return {
        "git_commit": _git(root, "rev-parse", "--verify", "HEAD") if ours else None,
        "git_dirty": None if status is None else bool(status),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpu": processor_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads() if torch else None,
        "gpus": [torch.cuda.get_device_name(gpu) for gpu in gpus] if torch else [],
    }


def _git(root: Path, *arguments: str) -> str | None:
    # Git refuses a checkout of another user, whose configuration could name programs: those are switched off.
    trusted = ("-c", f"safe.directory={root}", "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null")
    command = ["git", *trusted, "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
