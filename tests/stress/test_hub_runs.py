"""Whole runs against a hub: how often they ask it, what they log, and how they start without it."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, SMALL
from support.hub_server import ROWS, Fault, Hub, serving

from staff.runtime.hub import IMPATIENCE

FAMILY = ("family.target.path=somebody/target", "family.small.path=somebody/small", "task.data_dir=null")


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving() as served:
        for name in ("target", "small"):
            served.add(f"models/somebody/{name}", ROOT / "staff/assets/tiny" / name)
        rows = [json.dumps(ROWS["dialogsum"](i)) for i in range(40)]
        splits = {"train": rows[:30], "test": rows[30:]}
        lines = {f"{split}.jsonl": "\n".join(part).encode() for split, part in splits.items()}
        served.repositories["datasets/knkarthick/dialogsum"] = lines
        yield served


def staff(hub: Hub, folder: Path, *overrides: str, **variables: str) -> tuple[int, str, float]:
    """Exit status and output of `staff` in a process of its own, and its seconds."""
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "experiments.run", *SMALL, *FAMILY, "tracking=none", *overrides]
    started = time.monotonic()
    done = subprocess.run(
        [*command, f"results_dir={folder / 'results'}"],
        cwd=ROOT,
        env={**environment, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
    )
    assert not re.search(r"HTTP Request|httpx|urllib3|Retrying|Retry |it/s", done.stdout), done.stdout
    return done.returncode, done.stdout, time.monotonic() - started


def test_a_run_asks_the_hub_for_each_file_once_and_later_runs_for_the_commits_alone(hub: Hub, tmp_path: Path):
    assert staff(hub, tmp_path)[0] == 0
    read = [request for request in hub.requests if request.startswith("GET") and "/resolve/" in request]
    assert len(read) == len(set(read)) == 12, "two files of the data set, five of each model"
    assert len(hub.requests) == 30, "a name's commit and listing, and of each file its size and its content"
    hub.requests.clear()
    assert staff(hub, tmp_path, "seed=1")[0] == 0
    assert len(hub.requests) == 3 and all("/revision/main" in request for request in hub.requests)


def test_without_a_hub_a_run_starts_from_the_cache_within_seconds_and_says_so(hub: Hub, tmp_path: Path):
    """It is asked once, for no longer than `IMPATIENCE`: wall time would tell more of the machine."""
    light = ("method=random", "evaluation=none")
    assert staff(hub, tmp_path, *light)[0] == 0
    hub.faults = [Fault("", delay=600)]
    ways = ({}, {"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"})
    for seed, (variables, asked) in enumerate(zip(ways, (1, 0, 0), strict=True), start=1):
        hub.requests.clear()
        status, said, _ = staff(hub, tmp_path, *light, f"seed={seed}", **variables)
        assert status == 0 and len(hub.requests) == asked and IMPATIENCE < 5
        told = re.findall(r"the hub did not answer: using the cached snapshot \w{40} of (\S+)", said)
        names = ["knkarthick/dialogsum", "somebody/target", "somebody/small"]
        assert told == ([] if "HF_HUB_OFFLINE" in variables else names)


@pytest.mark.parametrize("fault", [Fault("", delay=600), Fault("", status=503)], ids=["silent", "broken"])
def test_without_a_hub_or_a_cache_a_run_ends_in_a_sentence_within_half_a_minute(hub, tmp_path, fault):
    hub.faults = [fault]
    status, said, seconds = staff(hub, tmp_path)
    assert status == 1 and seconds < 30 and "waiting for knkarthick/dialogsum of the hub" in said
    assert said.splitlines()[-1].startswith("staff: the data set 'knkarthick/dialogsum' cannot be had from")


def test_a_hub_that_goes_away_between_two_stages_keeps_what_was_done(hub: Hub, tmp_path: Path):
    hub.faults = [Fault("somebody/target/resolve/.*safetensors", status=503)]
    status, said, _ = staff(hub, tmp_path)
    assert status == 1 and "fine-tune small on 24 samples" in said
    assert "the model 'somebody/target' cannot be had from the Hugging Face hub (the hub answers HTTP 503)" in said
    hub.faults.clear()
    status, said, _ = staff(hub, tmp_path)
    assert status == 0 and "fine-tuning target" in said and "fine-tuning small" not in said
