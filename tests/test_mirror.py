"""A run's page on Weights & Biases, from the start to whatever end the run has; no error of W&B ends a run.

Offline files are read back, since they hold what a server would be sent."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import wandb
from conftest import ROOT
from support.records import pages, stages_of, table_of

from experiments.run import Mirror
from staff.errors import UserError
from staff.runtime import processes
from staff.store.stage import TrainingLogged
from staff.tracking import write_record
from staff.tracking.mirror import About, check, log_to_wandb
from staff.tracking.pages import last_step

RECORD = {
    "run": {
        "name": "staff-0.9-0",
        "fingerprint": "0123abcd" * 8,
        "experiment": "table1",
        "method": "staff",
        "pruning_rate": 0.9,
        "counts": {"pool": 4, "coreset": 2},
    },
    "config": {
        "seed": 0,
        "tracking": {"mode": "auto", "project": "staff", "entity": None},
        "method": {"num_regions": 50, "drop_hardest": None},
        "task": {"metrics": ["rougeL", "bleu"]},
    },
    "metrics": {"rougeL": 21.5, "bleu": 3.25},
    "overhead": {
        "seconds": 15.5,
        "stages": [
            {"stage": "finetune", "label": "fine-tune small on 4 samples", "seconds": 12.5, "computed": True},
            {"stage": "scores", "label": "effort of 4 samples", "seconds": 3.0, "computed": False},
        ],
    },
    "coreset": {"fingerprint": "c0ffee", "filled": 0, "notes": ["none"]},
    "provenance": {"git_commit": None, "cpu_count": 2},
}
KEY = "0" * 40
SCORES = np.array([0.1, 0.5, np.nan, 2.0, 0.5])


pytestmark = pytest.mark.usefixtures("a_user_who_is_not_logged_in")


def log_run(folder: Path, record: dict[str, Any] = RECORD, mode: str = "auto") -> bool:
    """Log a run's folder that holds `record`, and a score of every sample of the pool."""
    write_record(folder, record)
    scores = {"id": [f"s{i}" for i in range(5)], "selected": False, "effort": SCORES}
    pd.DataFrame(scores).to_parquet(folder / "samples.parquet")
    return log_to_wandb(folder, mode)


def another_run(fingerprint: str, **changes: Any) -> dict[str, Any]:
    return {**RECORD, "run": {**RECORD["run"], "fingerprint": fingerprint * 16}, **changes}


def read_offline_run(folder: Path) -> dict[str, Any]:
    """What the only page under `folder` holds."""
    (page,) = pages(folder)
    return page


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("staff")]


# ---------------------------------------------------------------- a run that is killed

KILLED = """
import json, os, signal, sys, time
from pathlib import Path
from staff.tracking.mirror import About, Mirror
from staff.store.stage import StageStarted, TrainingLogged

class Training:
    label = "fine-tune small on 4 samples"
    fingerprint = "f00"

folder, record = Path(sys.argv[1]), json.loads(sys.argv[2])
page = Mirror()
page(StageStarted(Training()))
page.open(About(folder, record["config"], record["run"], lambda stage: "finetune/small"), "offline")
for step in range(1, 4):
    page(TrainingLogged(step, {"loss": 1.0 / step}))
time.sleep(0.6)  # several flushes
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_keeps_what_it_showed_and_its_page_goes_on(tmp_path):
    environment = {**os.environ, "WANDB__TRANSACTION_LOG_FLUSH_INTERVAL": "0.1"}
    command = [sys.executable, "-c", KILLED, str(tmp_path), json.dumps(RECORD)]
    assert subprocess.run(command, cwd=ROOT, env=environment).returncode == -signal.SIGKILL
    (killed,) = pages(tmp_path)
    assert killed["exit"] is None, "W&B calls a page crashed that nothing ends"
    assert killed["summary"]["status"] == "running" and stages_of(killed) == [("fine-tune", "started")]
    assert killed["curves"]["finetune/small/loss"] == [1.0, 1 / 2, 1 / 3]
    points = [("fine-tune small on 4 samples", "finetune/small", step, 1.0 / step) for step in range(1, 6)]
    points += [("fine-tune target on 2 samples", "finetune/target", 1, 2.0)]
    table = pd.DataFrame(points, columns=["training", "curve", "step", "loss"])
    table.to_csv(tmp_path / "training.csv", index=False)
    assert log_run(tmp_path)
    _, again = pages(tmp_path)
    assert again["run_id"] == killed["run_id"] and again["exit"] == 0
    assert again["curves"]["finetune/small/step"] == [4, 5], "the others are in the first file"
    assert again["curves"]["finetune/target/step"] == [1]


# ---------------------------------------------------------------- errors of W&B


def test_an_error_in_the_middle_costs_one_line_and_nothing_more(tmp_path, caplog):
    page = Mirror()
    page.open(about(tmp_path), "offline")
    page._page.finish()  # behind its back: W&B refuses values of a run that has ended
    for step in range(3):
        page.point("finetune/small", step + 1, {"loss": 1.0})
        logging.getLogger("staff").warning("a line of the run")
    write_record(tmp_path, RECORD)
    assert not page.finish()
    assert len([line for line in messages(caplog) if "Weights & Biases" in line]) == 1
    assert "metrics.json is still the record" in caplog.text


def test_only_the_main_process_has_a_page(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "is_main_process", lambda: False)
    page = Mirror()
    page(TrainingLogged(1, {"loss": 1.0}))
    page.open(about(tmp_path), "offline")
    assert not page.shows and not page.finish() and not list(tmp_path.iterdir())


def test_a_page_that_goes_on_shows_no_point_of_a_curve_twice(tmp_path):
    for steps in ((1, 2), (1, 2, 3, 3, 4), (5,), (4, 5, 6)):
        page = Mirror()
        page.open(about(tmp_path), "offline")
        for step in steps:
            page.point("finetune/small", step, {"loss": float(step)})
        (file,) = Path(page._page.sync_dir).glob("*.wandb")
        page.fail("enough.")
        if steps == (5,):  # as if it had been killed before W&B wrote its points
            wandb.teardown()  # waits until the service has written all
            os.utime(file, (0, 0))
    attempts = [attempt["curves"]["finetune/small/loss"] for attempt in pages(tmp_path)]
    assert sorted(attempts) == [[1.0, 2.0], [3.0, 4.0], [5.0], [5.0, 6.0]], "attempts of one second are in no order"
    online = SimpleNamespace(offline=False, summary={"finetune/small/step": 2})
    assert last_step(online, "finetune/small") == 2 and last_step(online, "finetune/target") == 0


def about(folder: Path) -> About:
    return About(folder, RECORD["config"], RECORD["run"])


@pytest.mark.parametrize(
    ("changes", "group"),
    [
        ({}, "table1"),
        ({"experiment": None, "sweep": "sweep-seed-0a"}, "sweep-seed-0a"),
        ({"experiment": None}, None),
    ],
)
def test_the_group_is_the_experiment_or_the_sweep_unless_it_is_named(tmp_path, changes, group):
    page = About(tmp_path, RECORD["config"], {**RECORD["run"], **changes})
    assert page.identity["group"] == group
    named = {**RECORD["config"], "tracking": {"mode": "auto", "group": "mine"}}
    assert About(tmp_path, named, page.facts).identity["group"] == "mine"


def test_a_long_name_is_a_tag_that_wandb_takes_and_no_tag_stands_twice(tmp_path):
    config = {**RECORD["config"], "tracking": {"tags": ["staff", 7]}}
    page = About(tmp_path, config, {**RECORD["run"], "task": "t" * 100, "seed": 0})
    assert page.tags == ["custom", "t" * 64, "staff", "pruning_rate=0.9", "seed=0", "7"]


def test_a_record_alone_makes_a_page_without_the_texts_of_samples(tmp_path):
    coreset = pd.DataFrame({"id": ["007", "NA"], "effort": [0.5, 2.0], "verified": [np.nan, 1.5]})
    coreset.to_csv(tmp_path / "coreset.csv", index=False)
    predictions = pd.DataFrame({"id": ["t1"], "prediction": ["Grüße, \n a line"], "rougeL": [33.0]})
    predictions.assign(references=[["Grüße", "a line"]]).to_parquet(tmp_path / "predictions.parquet")
    curves = [("fine-tune small on 4 samples", 1, 3.5), ("fine-tune small on 4 samples", 2, 3.0)]
    pd.DataFrame(curves, columns=["training", "step", "loss"]).to_csv(tmp_path / "training.csv", index=False)
    assert log_run(tmp_path)
    page = read_offline_run(tmp_path)
    assert table_of(page, "coreset")["id"].tolist() == ["007", "NA"], "ids are text"
    assert table_of(page, "predictions").to_numpy().tolist() == predictions.to_numpy().tolist()
    assert page["curves"]["finetune/small/loss"] == [3.5, 3.0], "of a version whose curves had no names"
    assert sum(page["history"]["scores/effort"]["values"]) == np.isfinite(SCORES).sum()


def test_entity_and_project_are_those_of_the_configuration(tmp_path):
    tracking = {"mode": "auto", "project": "coresets", "entity": "team"}
    log_run(tmp_path, another_run("beef", config={**RECORD["config"], "tracking": tracking}))
    run = read_offline_run(tmp_path)
    assert (run["entity"], run["project"]) == ("team", "coresets")


def test_two_runs_of_one_process_do_not_mix(tmp_path):
    other = another_run("ffff", config={**RECORD["config"], "method": None}, metrics={"chrf": 40.0})
    log_run(tmp_path / "a")
    write_record(tmp_path / "b", other)
    log_to_wandb(tmp_path / "b", "auto")
    first, second = read_offline_run(tmp_path / "a"), read_offline_run(tmp_path / "b")
    assert (first["run_id"], second["run_id"]) == ("0123abcd0123abcd", "f" * 16)
    assert first["summary"]["metrics"] == RECORD["metrics"] and second["summary"]["metrics"] == {"chrf": 40.0}
    assert first["config"]["method"] and not second["config"]["method"]
    assert "scores/effort" in first["history"] and "scores/effort" not in second["history"]
    assert wandb.run is None


def test_a_large_coreset_is_logged_whole(tmp_path):
    pd.DataFrame({"id": [f"s{i}" for i in range(10_411)], "effort": 1.0}).to_csv(
        tmp_path / "coreset.csv", index=False
    )
    log_run(tmp_path)
    assert read_offline_run(tmp_path)["history"]["coreset"]["nrows"] == 10_411


def test_an_unreachable_server_leaves_an_offline_run_and_one_line(tmp_path, monkeypatch, caplog, capfd):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "2")
    started = time.monotonic()
    log_run(tmp_path)  # mode auto: the user is logged in
    assert time.monotonic() - started < 15
    assert read_offline_run(tmp_path)["summary"]["metrics"] == RECORD["metrics"]
    assert len(messages(caplog)) == 1 and "logging offline" in messages(caplog)[0]
    out, err = capfd.readouterr()
    assert "wandb:" not in out + err


def test_a_folder_where_nothing_can_be_written_never_fails_a_run(tmp_path, caplog):
    (tmp_path / "wandb").write_text("a file where W&B wants a folder")
    assert not log_run(tmp_path)
    assert len(messages(caplog)) == 1 and "Weights & Biases" in messages(caplog)[0]
    assert log_run(tmp_path / "next", another_run("abcd"))
    assert read_offline_run(tmp_path / "next")["run_id"] == "abcd" * 4


def test_what_cannot_be_logged_never_fails_a_run_and_does_not_leave_it_open(tmp_path, caplog):
    (tmp_path / "coreset.csv").write_text("")
    assert not log_run(tmp_path)
    assert len(messages(caplog)) == 1 and "EmptyDataError" in messages(caplog)[0]
    assert wandb.run is None and read_offline_run(tmp_path)["run_id"] == "0123abcd0123abcd"


@pytest.mark.parametrize(
    ("environment_variable", "settings_line", "netrc", "chosen"),
    [
        ({}, "", "", "offline"),
        ({"WANDB_API_KEY": KEY}, "", "", "online"),
        ({}, "", "machine api.wandb.ai login u password " + KEY, "online"),
        ({}, "", "machine elsewhere.org login u password " + KEY, "offline"),
        ({}, "base_url = https://wandb.example.org", "machine wandb.example.org login u password " + KEY, "online"),
        ({}, "base_url = https://wandb.example.org", "machine api.wandb.ai login u password " + KEY, "offline"),
        ({"WANDB_API_KEY": "mistyped"}, "", "", "offline"),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "", "", "offline"),
        ({"WANDB_MODE": "disabled"}, "", "", None),
    ],
)
def test_auto_goes_online_only_for_a_user_who_is_logged_in(
    tmp_path, monkeypatch, environment_variable, settings_line, netrc, chosen
):
    for name, value in environment_variable.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "netrc").write_text(netrc)
    (tmp_path / "netrc").chmod(0o600)
    (tmp_path / "wandb-config").mkdir()
    (tmp_path / "wandb-config" / "settings").write_text(f"[default]\n{settings_line}\n")
    modes, init = [], wandb.init

    def note_the_mode(**arguments: Any) -> Any:
        modes.append(arguments["mode"])
        return init(**{**arguments, "mode": "disabled"})

    monkeypatch.setattr(wandb, "init", note_the_mode)
    log_run(tmp_path / "run")
    assert modes == ([] if chosen is None else [chosen])


def test_disabled_writes_nothing(tmp_path):
    log_run(tmp_path, mode="disabled")
    assert not list(tmp_path.glob("wandb*"))


def test_a_mistyped_mode_is_refused_with_the_choices():
    with pytest.raises(UserError, match=r"tracking\.mode='of'.*auto, online, offline, disabled"):
        check({"mode": "of"})
    check({"mode": "auto"})
    with pytest.raises(UserError, match=r"tracking\.tag is not a setting: choose from mode"):
        check({"mode": "auto", "tag": ["pilot"]})


def test_a_replay_without_a_server_says_what_was_not_sent(real: Path):
    import os

    environment = {**os.environ, "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40}
    environment |= {"WANDB_INIT_TIMEOUT": "2", "WANDB_MODE": "online"}
    command = [sys.executable, "-m", "experiments.replay", str(real)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 1 and "0 of 1 runs are online" in done.stdout
    assert f"not sent: {real.name}" in done.stderr
