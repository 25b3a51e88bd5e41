"""The record of a run: metrics.json always, Weights & Biases as its mirror."""

from __future__ import annotations

import json
import logging
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
import pandas as pd

from staff.errors import UserError

log = logging.getLogger(__name__)

MODES = ("auto", "online", "offline", "disabled")
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
    """Write `record` to `folder`/metrics.json, whole or not at all, and return the path.

    The file is strict JSON: what is not finite becomes null, NumPy values become plain ones, paths text. Any
    other type is a TypeError.
    """
    path = folder / "metrics.json"
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_plain(record), indent=2, ensure_ascii=False, allow_nan=False)
    temporary = folder / f".metrics.{os.getpid()}.json"
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return path


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
    """What a run ran on: the git commit of the checkout at `root` and whether it held uncommitted changes (None
    where `root` is no checkout), versions of Python and of the packages that decide results, and the hardware.

    Imports nothing: GPUs are named only where torch is already loaded.
    """
    from staff.cost import processor_name

    top = _git(root, "rev-parse", "--show-toplevel")
    ours = top is not None and Path(top).resolve() == root.resolve()  # not of a project that we are installed in
    status = _git(root, "status", "--porcelain") if ours else None
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
        "gpus": [torch.cuda.get_device_name(gpu) for gpu in gpus] if torch else [],
    }


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check_mode(mode: str) -> None:
    """Refuse a tracking mode that `log_to_wandb` does not know."""
    if mode not in MODES:
        raise UserError(f"tracking.mode={mode!r} is unknown: choose from {', '.join(MODES)}.")


def log_to_wandb(
    record: Mapping[str, Any],
    *,
    folder: Path,
    project: str,
    entity: str | None,
    mode: str,
    group: str,
    job_type: str,
    run_id: str,
    name: str,
    config: Mapping[str, Any],
    scores: Mapping[str, np.ndarray] | None = None,
    coreset_csv: Path | None = None,
    predictions: pd.DataFrame | None = None,
) -> None:
    """Mirror a record to W&B; whatever goes wrong there is one line of warning, never the end of a run.

    The run's summary is the record without its configuration, nested as it is; every score vector becomes a
    histogram `scores/NAME` (finite values), coreset.csv and the predictions become tables.

    Args:
        folder: W&B's files go to `folder`/wandb.
        mode: "auto" follows WANDB_MODE, and without it goes online where the user is logged in and offline
            elsewhere. A server that does not answer within 10 s (WANDB_INIT_TIMEOUT) leaves an offline run, to
            be uploaded with `wandb sync`.
        group, job_type: the experiment and the method.
        run_id: from the run's fingerprint, so that a repeated run resumes its own page.
        config: the resolved configuration, plain dictionaries and lists.
        scores: name to values, shape (pool size,).
        coreset_csv: selected samples and their scores, with a column `id`.
        predictions: a row per test sample.
    """
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE", "auto")
    if mode == "disabled":
        return
    run = None
    try:
        run = _start(
            mode,
            dir=folder,
            project=project,
            entity=entity,
            group=group,
            job_type=job_type,
            id=run_id,
            name=name,
            config=_plain(config),
        )
        run.log(_media(scores or {}, coreset_csv, predictions))
        run.summary.update(_plain({key: value for key, value in record.items() if key != "config"}))
    except Exception as error:
        log.warning("Weights & Biases: %s; the record is in %s all the same", _sentence(error), folder)
    finally:
        # The runs of a sweep share a process: an unfinished one would take in the next one's values.
        if run is not None:
            _finish(run)


def _start(mode: Any, **identity: Any) -> Any:
    """A W&B run, offline where online does not answer."""
    # W&B's reports of its own errors keep a process up to half a minute at its end where no server answers.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    settings = wandb.Settings(
        silent=True,
        quiet=True,
        console="off",
        init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", 10)),
        finish_timeout=60,
        # metrics.json holds the provenance already, and the work is done: there is no system to watch.
        disable_git=True,
        disable_code=True,
        x_disable_stats=True,
        x_disable_viewer=True,
        x_save_requirements=False,
    )
    wandb.setup(settings)  # without it, logging in speaks before the settings of the run are read
    start = {"settings": settings, "resume": "allow", "reinit": "create_new", **identity}
    if mode != "offline":
        try:
            if mode != "auto":
                return wandb.init(mode=mode, **start)
            if _logged_in():
                return wandb.init(mode="online", **start)
        except Exception as error:
            log.warning("Weights & Biases: %s; logging offline, upload later with `wandb sync`", _sentence(error))
            wandb.teardown()  # the failed run holds its id until its service ends
            wandb.setup(settings)
    return wandb.init(mode="offline", **start)


def _finish(run: Any) -> None:
    try:
        run.finish()
    except Exception as error:
        log.warning("Weights & Biases did not finish: %s", _sentence(error))


def _logged_in() -> bool:
    """Whether W&B finds credentials without asking: in the environment, ~/.netrc or its settings file."""
    import wandb
    from wandb.sdk.lib import wbauth

    host = wandb.setup().settings.base_url
    return wbauth.authenticate_session(host=host, source="staff", prompt=False, update_session=False) is not None


def _media(
    scores: Mapping[str, np.ndarray], coreset_csv: Path | None, predictions: pd.DataFrame | None
) -> dict[str, Any]:
    import wandb

    wandb.Table.MAX_ROWS = wandb.Table.MAX_ARTIFACT_ROWS  # type: ignore # rows beyond 10,000 are dropped otherwise
    finite = {name: values[np.isfinite(values)].tolist() for name, values in scores.items()}
    media: dict[str, Any] = {f"scores/{name}": wandb.Histogram(v) for name, v in finite.items() if v}
    if coreset_csv is not None:
        # An id such as 007 or NA is text; a score that was not computed is an empty field.
        coreset = pd.read_csv(coreset_csv, dtype={"id": str}, keep_default_na=False, na_values=[""])
        media["coreset"] = wandb.Table(dataframe=coreset)
    if predictions is not None:
        media["predictions"] = wandb.Table(dataframe=predictions)
    return media


def _sentence(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
