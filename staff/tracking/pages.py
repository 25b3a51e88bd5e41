"""W&B runs: started, ended, and what a run's folder holds for them. Used by `staff.tracking.mirror`."""

from __future__ import annotations

import html
import logging
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from staff.runtime import processes

log = logging.getLogger(__name__)

STEPS = "steps.txt"
"""In the local folder of an attempt: a line for every point of a curve, with its time, step and name."""
LONGEST = 200
"""Characters of what an error of W&B says."""


def start(mode: Any, fall_back: bool, **identity: Any) -> Any:
    """A W&B run. If the server does not answer, it is offline, or without `fall_back` the error is raised."""
    # Without a network, W&B's reports of its own errors delay the exit of a process by up to half a minute.
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    # By default a killed run loses its last 15 seconds. A variable, since other versions lack the setting.
    os.environ.setdefault("WANDB__TRANSACTION_LOG_FLUSH_INTERVAL", "2")
    import wandb

    settings = wandb.Settings(
        silent=True,
        quiet=True,
        console="off",  # `staff.tracking.mirror` sends the log without bars
        init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", 10)),
        finish_timeout=60,
        finish_timeout_raises=True,
        # metrics.json has the provenance already.
        disable_git=True,
        disable_code=True,
        # Experimental names: W&B refuses one that it does not know, as every test of a page would show.
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
            log.warning("Weights & Biases: %s; logging offline, upload later with `wandb sync`", sentence(error))
            wandb.teardown()  # the failed run keeps its id until its service ends
            wandb.setup(settings)
    return wandb.init(mode="offline", **start)


def finish(page: Any, code: int) -> None:
    """End a W&B run.

    In a run of several processes one that failed hardly waits for the upload, since the others wait for it.
    """

    def quietly() -> None:
        with suppress(Exception):
            page.finish(code)

    if code == 0 or processes.world_size() == 1:
        page.finish(code)
    else:
        thread = threading.Thread(target=quietly, daemon=True)
        thread.start()
        thread.join(processes.GRACE / 2)


def _logged_in() -> bool:
    """Whether W&B finds credentials in the environment, ~/.netrc or its settings file."""
    import wandb
    from wandb.sdk.lib import wbauth  # private: `wandb.login` asks on the terminal; tests/test_promises.py

    host = wandb.setup().settings.base_url
    return wbauth.authenticate_session(host=host, source="staff", prompt=False, update_session=False) is not None


def note_step(page: Any, curve: str, step: int) -> None:
    """Note, beside what W&B writes on this machine, that a page shows a curve up to this step."""
    with open(Path(page.sync_dir) / STEPS, "a", encoding="utf-8") as noted:
        noted.write(f"{time.time():.3f} {step} {curve}\n")


def last_step(page: Any, curve: str) -> int:
    """The last step of a curve that earlier attempts of the run have shown; 0: none.

    A page that goes on online has a summary with it. One offline has only the notes of earlier attempts. A killed
    attempt may have lost what it noted after W&B last wrote its file.
    """
    if not page.offline:
        return page.summary.get(f"{curve}/step", 0)
    last = 0
    for notes in Path(page.sync_dir).parent.glob(f"*run-*-{page.id}*/{STEPS}"):
        written = max((file.stat().st_mtime for file in notes.parent.glob("*.wandb")), default=0.0)
        for noted, step, of in (line.split(" ", 2) for line in notes.read_text(encoding="utf-8").splitlines()):
            if of == curve and float(noted) < written + 0.01:  # the times of files are that coarse
                last = max(last, int(step))
    return last


def curves(training: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    """The curves of a training.csv by name; one without names is of an earlier version."""
    if "curve" not in training:
        names = training["training"].str.extract(r"fine-tune (.+?)(?: on \d+ samples.*)?$")[0]
        training = training.assign(curve="finetune/" + names.fillna("model"))
    for curve, points in training.groupby("curve", sort=False):
        yield str(curve), points.drop(columns=["curve", "training"])


def media(folder: Path, overhead: Mapping[str, Any], tables: Mapping[str, pd.DataFrame]) -> dict[str, Any]:
    """Histograms and tables of a run's folder; `tables` are shown in place of those of the same name."""
    import wandb

    wandb.Table.MAX_ROWS = wandb.Table.MAX_ARTIFACT_ROWS  # type: ignore # rows beyond 10,000 are dropped otherwise
    shown: dict[str, Any] = {}
    if (folder / "samples.parquet").is_file():
        scores = pd.read_parquet(folder / "samples.parquet").drop(columns=["id", "selected"])
        finite = {name: values[np.isfinite(values)].tolist() for name, values in scores.items()}
        shown |= {f"scores/{name}": wandb.Histogram(v) for name, v in finite.items() if v}
    named = {**_tables(folder), **tables}
    if overhead["stages"]:
        named["overhead_stages"] = pd.DataFrame(overhead["stages"])
    return shown | {name: wandb.Table(dataframe=table) for name, table in named.items()}


def _tables(folder: Path) -> dict[str, pd.DataFrame]:
    """The coreset and the answers as a run's folder has them, without texts of samples."""
    found = {}
    if (folder / "coreset.csv").is_file():
        # Ids such as 007 or NA are text; an empty field is a score that was not computed.
        how: dict[str, Any] = {"dtype": {"id": str}, "keep_default_na": False, "na_values": [""]}
        found["coreset"] = pd.read_csv(folder / "coreset.csv", **how)
    if (folder / "predictions.parquet").is_file():
        answers = pd.read_parquet(folder / "predictions.parquet")
        found["predictions"] = answers.drop(columns=["references", "choices", "log_likelihoods"], errors="ignore")
    return found


def sentence(error: Exception) -> str:
    """What an error is and says, in one line; of a page of HTML, from a proxy or a server, its title."""
    said = str(error).replace(r"\u003c", "<").replace(r"\u003e", ">")
    if page := re.search(r"<(!doctype|html|head|body)\b", said, re.I):
        title = re.search(r"<title[^>]*>(.*?)</title", said, re.I | re.S)
        said = f"{said[: page.start()]}{html.unescape(title[1]) if title else 'a page of HTML'}"
        said = " ".join(said.split())
    lines = said.strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:LONGEST]}" if lines else type(error).__name__
