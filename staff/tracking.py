"""The record of a run: metrics.json, mirrored to Weights & Biases."""

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
    """Write `record` to `folder`/metrics.json, whole or not at all, and return the path."""
    path = folder / "metrics.json"
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".metrics.{os.getpid()}.json"
    temporary.write_text(as_json(record), encoding="utf-8")
    os.replace(temporary, path)
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
    is not a checkout. GPUs are named only if torch is already imported.
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


def log_to_wandb(folder: Path, mode: str, fall_back: bool = True) -> bool:
    """Mirror the record in `folder` to Weights & Biases. Errors become warnings and never end a run.

    The summary of the W&B run is metrics.json without the configuration. Each score in samples.parquet becomes a
    histogram `scores/NAME` of its finite values, training.csv becomes curves `LABEL/loss` over `LABEL/step`, and
    coreset.csv, predictions.parquet and the stages of the overhead become tables. Files that are missing are
    skipped.

    The group is the experiment, the job type is the method. The id is from the run's fingerprint, so that a
    repeated run resumes its W&B run.

    Args:
        folder: the run's folder; W&B's files go to `folder`/wandb.
        mode: one of `MODES`. "auto" is WANDB_MODE; if that is not set, online if the user is logged in, otherwise
            offline. If the server does not answer within 10 s (WANDB_INIT_TIMEOUT), the run is logged offline and
            can be uploaded with `wandb sync`.
        fall_back: whether to log offline if the server does not answer.

    Returns:
        Whether the record is on the server, or in a file that `wandb sync` uploads.
    """
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE", "auto")
    if mode == "disabled":
        return False
    record = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    config, about = record["config"], record["run"]
    run = None
    try:
        run = _start(
            mode,
            fall_back,
            dir=folder,
            project=config["tracking"].get("project"),
            entity=config["tracking"].get("entity"),
            group=about["experiment"] or "single",
            job_type=about["method"] or "custom",
            id=about["fingerprint"][:16],
            name=about["name"],
            config=config,
        )
        _log_training(run, folder / "training.csv")
        run.log(_media(folder, record["overhead"]))
        run.summary.update({key: value for key, value in record.items() if key != "config"})
        return True
    except Exception as error:
        log.warning("Weights & Biases: %s; the record is still in %s", _sentence(error), folder)
        return False
    finally:
        # The runs of a sweep share a process: an unfinished W&B run would log the values of the next run.
        if run is not None:
            _finish(run)


def _start(mode: Any, fall_back: bool, **identity: Any) -> Any:
    """A W&B run. If the server does not answer, it is offline, or without `fall_back` the error is raised."""
    # Without a network, W&B's reports of its own errors delay the exit of a process by up to half a minute.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    settings = wandb.Settings(
        silent=True,
        quiet=True,
        console="off",
        init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", 10)),
        finish_timeout=60,
        # metrics.json has the provenance already, and the work is done, so there is nothing to monitor.
        disable_git=True,
        disable_code=True,
        x_disable_stats=True,
        x_disable_viewer=True,
        x_save_requirements=False,
    )
    wandb.setup(settings)  # without it, logging in prints before the settings of the run are read
    start = {"settings": settings, "resume": "allow", "reinit": "create_new", **identity}
    if mode != "offline":
        try:
            if mode != "auto":
                return wandb.init(mode=mode, **start)
            if _logged_in():
                return wandb.init(mode="online", **start)
        except Exception as error:
            if not fall_back:
                wandb.teardown()
                raise
            log.warning("Weights & Biases: %s; logging offline, upload later with `wandb sync`", _sentence(error))
            wandb.teardown()  # the failed run keeps its id until its service ends
            wandb.setup(settings)
    return wandb.init(mode="offline", **start)


def _finish(run: Any) -> None:
    try:
        run.finish()
    except Exception as error:
        log.warning("Weights & Biases did not finish: %s", _sentence(error))


def _logged_in() -> bool:
    """Whether W&B finds credentials in the environment, ~/.netrc or its settings file."""
    import wandb
    from wandb.sdk.lib import wbauth

    host = wandb.setup().settings.base_url
    return wbauth.authenticate_session(host=host, source="staff", prompt=False, update_session=False) is not None


def _log_training(run: Any, file: Path) -> None:
    """Log the curves of every training, over its own steps."""
    if not file.is_file():
        return
    for label, curve in pd.read_csv(file).groupby("training", sort=False):
        run.define_metric(f"{label}/*", step_metric=f"{label}/step")
        for point in curve.drop(columns="training").to_dict("records"):
            run.log({f"{label}/{name}": value for name, value in point.items()})


def _media(folder: Path, overhead: Mapping[str, Any]) -> dict[str, Any]:
    """Histograms and tables from the files in a run's folder."""
    import wandb

    wandb.Table.MAX_ROWS = wandb.Table.MAX_ARTIFACT_ROWS  # type: ignore # rows beyond 10,000 are dropped otherwise
    media: dict[str, Any] = {}
    if (folder / "samples.parquet").is_file():
        scores = pd.read_parquet(folder / "samples.parquet").drop(columns=["id", "selected"])
        finite = {name: values[np.isfinite(values)].tolist() for name, values in scores.items()}
        media |= {f"scores/{name}": wandb.Histogram(v) for name, v in finite.items() if v}
    if (folder / "coreset.csv").is_file():
        # Ids such as 007 or NA are text; an empty field is a score that was not computed.
        coreset = pd.read_csv(folder / "coreset.csv", dtype={"id": str}, keep_default_na=False, na_values=[""])
        media["coreset"] = wandb.Table(dataframe=coreset)
    if (folder / "predictions.parquet").is_file():
        predictions = pd.read_parquet(folder / "predictions.parquet")
        lists = ["references", "choices", "log_likelihoods"]
        predictions = predictions.drop(columns=lists, errors="ignore")
        media["predictions"] = wandb.Table(dataframe=predictions)
    if overhead["stages"]:
        media["overhead_stages"] = wandb.Table(dataframe=pd.DataFrame(overhead["stages"]))
    return media


def _sentence(error: Exception) -> str:
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
