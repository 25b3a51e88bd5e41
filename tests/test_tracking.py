from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from staff.errors import UserError
from staff.tracking import check_mode, environment, log_to_wandb, write_record

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
WHICH_RUN = ("entity", "project", "run_id", "run_group", "job_type", "display_name")
SCORES = np.array([0.1, 0.5, np.nan, 2.0, 0.5])


@pytest.fixture(autouse=True)
def a_user_who_is_not_logged_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    wandb.teardown()  # W&B reads its environment once a session
    yield
    wandb.teardown()


def log_run(folder: Path, record: dict[str, Any] = RECORD, mode: str = "auto") -> bool:
    """Log a run's folder that holds `record`, and a score of every sample of the pool."""
    write_record(folder, record)
    scores = {"id": [f"s{i}" for i in range(5)], "selected": False, "effort": SCORES}
    pd.DataFrame(scores).to_parquet(folder / "samples.parquet")
    return log_to_wandb(folder, mode)


def another_run(fingerprint: str, **changes: Any) -> dict[str, Any]:
    return {**RECORD, "run": {**RECORD["run"], "fingerprint": fingerprint * 16}, **changes}


def read_offline_run(folder: Path) -> dict[str, Any]:
    """What the only .wandb file under `folder` holds: a LevelDB log (blocks of 32 KiB, records cut at their borders
    into pieces with a header of checksum, length and type) of protocol buffers."""
    wandb.teardown()  # waits until the service has written all
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    data, at, message = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    run: dict[str, Any] = {"config": {}, "summary": {}, "history": {}, "curves": {}, "metrics": {}}
    run["folder"] = path.parent
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # no header fits into the rest of a block
            at += 32768 - at % 32768
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, at)
        piece = data[at + 7 : at + 7 + length]
        assert checksum == zlib.crc32(bytes([kind]) + piece)
        message, at = message + piece, at + 7 + length
        if kind in (1, 4):  # whole, or the last piece
            _take_in(wandb_internal_pb2.Record.FromString(message), run)
            message = b""
    return run


def _take_in(record: Any, run: dict[str, Any]) -> None:
    if record.HasField("run"):
        run |= {name: getattr(record.run, name) for name in WHICH_RUN}
        run["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
    if record.HasField("metric"):
        run["metrics"][record.metric.name or record.metric.glob_name] = record.metric.step_metric
    for item in record.history.item:
        name = "/".join(item.nested_key) if item.nested_key else item.key
        run["curves"].setdefault(name, []).append(json.loads(item.value_json))
    for name, items in (("summary", record.summary.update), ("history", record.history.item)):
        for item in items:
            *folders, leaf = item.nested_key or [item.key]
            branch = run[name]
            for key in folders:
                branch = branch.setdefault(key, {})
            branch[leaf] = json.loads(item.value_json)


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name.startswith("staff")]


def test_an_offline_run_read_back_from_its_file_equals_metrics_json(tmp_path):
    coreset = pd.DataFrame({"id": ["007", "NA"], "effort": [0.5, 2.0], "verified": [np.nan, 1.5]})
    coreset.to_csv(tmp_path / "coreset.csv", index=False)
    predictions = pd.DataFrame({"id": ["t1"], "prediction": ["Grüße, \n a line"], "rougeL": [33.0]})
    predictions.assign(references=[["Grüße", "a line"]]).to_parquet(tmp_path / "predictions.parquet")
    assert log_run(tmp_path)

    written = json.loads((tmp_path / "metrics.json").read_text())
    run = read_offline_run(tmp_path)
    assert {key: value for key, value in run["config"].items() if key != "_wandb"} == written["config"]
    assert {key: run["summary"][key] for key in written if key not in ("config", "overhead")} == {
        key: value for key, value in written.items() if key not in ("config", "overhead")
    }
    assert run["summary"]["overhead"]["seconds"] == 15.5
    assert (run["run_id"], run["run_group"], run["job_type"]) == ("0123abcd0123abcd", "table1", "staff")
    assert run["display_name"] == "staff-0.9-0"
    histogram = run["history"]["scores/effort"]
    assert histogram["_type"] == "histogram" and sum(histogram["values"]) == np.isfinite(SCORES).sum()
    tables = {
        name: json.loads((run["folder"] / "files" / run["history"][name]["path"]).read_text())
        for name in ("coreset", "predictions", "overhead_stages")
    }
    assert tables["coreset"]["columns"] == ["id", "effort", "verified"]
    assert [row[:2] for row in tables["coreset"]["data"]] == [["007", 0.5], ["NA", 2.0]]
    assert tables["predictions"]["data"] == predictions.to_numpy().tolist()
    assert [row[1:3] for row in tables["overhead_stages"]["data"]] == [
        ["fine-tune small on 4 samples", 12.5],
        ["effort of 4 samples", 3.0],
    ]


def test_entity_and_project_are_those_of_the_configuration(tmp_path):
    tracking = {"mode": "auto", "project": "coresets", "entity": "team"}
    log_run(tmp_path, another_run("beef", config={**RECORD["config"], "tracking": tracking}))
    run = read_offline_run(tmp_path)
    assert (run["entity"], run["project"]) == ("team", "coresets")


def test_every_training_has_a_curve_over_its_own_steps(tmp_path):
    curves = [("fine-tune small", 1, 3.5), ("fine-tune small", 2, 3.0), ("fine-tune target", 1, 2.5)]
    pd.DataFrame(curves, columns=["training", "step", "loss"]).to_csv(tmp_path / "training.csv", index=False)
    log_run(tmp_path)
    run = read_offline_run(tmp_path)
    assert run["curves"]["fine-tune small/loss"] == [3.5, 3.0]
    assert run["curves"]["fine-tune target/loss"] == [2.5]
    assert run["metrics"] == {
        "fine-tune small/*": "fine-tune small/step",
        "fine-tune target/*": "fine-tune target/step",
    }


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
        check_mode("of")
    check_mode("auto")


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
