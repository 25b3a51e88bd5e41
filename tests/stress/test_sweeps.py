"""Sweeps that are killed at random, jobs of a cluster, the time in busy workers, and runs against a hub."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, SMALL
from support.processes import PARALLEL, SHRUNK, check_left_behind, check_store, finish, kill, records, stages, start
from support.servers import ROWS, Fault, Hub, serving

from staff.runtime.hub import IMPATIENCE

# ---------------------------------------------------------------- killed


GRID = ("method=random,ccs,d2,staff", "pruning_rate=0.5,0.75", "seed=0,1", *PARALLEL)
KILLS = int(os.environ.get("KILLS", "30"))


def test_a_sweep_killed_at_random_moments_ends_with_the_records_of_an_undisturbed_one(tmp_path: Path):
    began = time.monotonic()
    finish(start(tmp_path / "undisturbed", *GRID))
    whole = time.monotonic() - began
    results, late = tmp_path / "killed", 0
    seed = random.randrange(2**32)
    print(f"undisturbed: {whole:.0f} s; seed {seed}")
    draw = random.Random(seed)
    for turn in range(KILLS):
        how, everyone = draw.choice([signal.SIGKILL, signal.SIGTERM]), draw.random() < 0.7
        late += not kill(start(results, *GRID), how, draw.uniform(2, whole / 2), everyone)
        check_store(results)
        print(
            f"{turn + 1}: {how.name}, {'all' if everyone else 'the parent alone'}, {len(records(results))} records"
        )
        if len(records(results)) == 16:  # begin anew, so that there is something to kill
            assert records(results) == records(tmp_path / "undisturbed")
            results = tmp_path / f"killed {turn}"
    said = finish(start(results, *GRID))
    assert "failed" not in said and records(results) == records(tmp_path / "undisturbed")
    assert stages(results) == stages(tmp_path / "undisturbed")
    check_left_behind(results)
    print(f"{late} kills came too late")


# ---------------------------------------------------------------- jobs of a cluster on one machine


SUBMITIT = ("hydra/launcher=submitit_local",)


def sweep(results: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "experiments.run", "-m", "method=random", f"results_dir={results}", *SHRUNK]
    return subprocess.run([*command, *SUBMITIT, *arguments], cwd=ROOT, capture_output=True, text=True)


def test_the_tasks_of_a_cluster_job_carry_out_its_run_together_and_one_records_it(tmp_path: Path):
    ended = sweep(tmp_path, "hydra.launcher.tasks_per_node=2")
    assert ended.returncode == 0, ended.stderr
    (record,) = (json.loads(file.read_text()) for file in tmp_path.glob("runs/*/metrics.json"))
    assert record["provenance"]["processes"] == 2
    manifests = [json.loads(file.read_text()) for file in tmp_path.glob("artifacts/finetune/*/manifest.json")]
    assert [manifest["processes"] for manifest in manifests] == [2]
    assert len(list(tmp_path.glob("sweeps/*/*.json"))) == 2, "what the sweep expects, and one report"


def test_a_cluster_goes_on_past_a_failing_job_which_is_named_and_the_exit_status_is_an_error(tmp_path: Path):
    """Under the other launchers: tests/test_sweep.py."""
    ended = sweep(tmp_path, "pruning_rate=2,0.5")
    assert ended.returncode == 1
    assert "pruning_rate=2 is outside [0, 1)" in ended.stdout and "1 of 2 jobs failed" in ended.stdout
    (record,) = tmp_path.glob("runs/*/metrics.json")
    assert json.loads(record.read_text())["run"]["pruning_rate"] == 0.5
    (traceback,) = tmp_path.glob("sweeps/*/*.traceback.txt")
    assert "UserError" in traceback.read_text()


# ---------------------------------------------------------------- busy workers


APPLICATION = """
import json, time
from dataclasses import dataclass
from pathlib import Path
import hydra
from hydra.core.hydra_config import HydraConfig
from staff.store.stage import Stage
from staff.store.store import Store

HERE = Path(__file__).parent
SHARED = {"random": {}, "el2n": {"full": 2.0, "el2n": 0.3}, "grand": {"full": 2.0, "grand": 0.6},
          "ccs": {"full": 2.0, "el2n": 0.3}, "d2": {"full": 2.0, "d2": 0.4}, "staff": {"small": 0.5, "effort": 0.1}}

@dataclass(frozen=True)
class Sleep(Stage):
    name: str
    seconds: float
    kind = "sleep"
    version = 1

    def key(self):
        return {"name": self.name}

    def run(self, folder, meter):
        time.sleep(self.seconds)

def job(cfg):
    began, store = time.time(), Store(HERE / "store")
    stages = [Sleep(f"{name} {cfg.seed}", seconds) for name, seconds in SHARED[cfg.chain].items()]
    own = f"{cfg.chain} {cfg.pruning_rate} {cfg.seed}"
    stages += [Sleep(f"finetune {own}", 2 * (1 - cfg.pruning_rate)), Sleep(f"evaluate {own}", 0.4)]
    slower = max(1, HydraConfig.get().launcher.workers / 4)  # so that processes start in a small part of the time
    stages = [Sleep(stage.name, slower * stage.seconds) for stage in stages]
    for stage in stages:
        store.get(stage)
    told = {"began": began, "ended": time.time(), "stages": {stage.name: stage.seconds for stage in stages}}
    (HERE / f"{HydraConfig.get().job.num}.json").write_text(json.dumps(told))

if __name__ == "__main__":
    hydra.main(config_path=str(HERE), config_name="app", version_base="1.3")(job)()
"""
CONFIGURATION = f"""
chain: random
pruning_rate: 0.5
seed: 0
defaults: [_self_, override hydra/launcher: local]
hydra:
  searchpath: ["file://{ROOT / "conf"}"]
  sweep: {{dir: "sweep", subdir: "."}}
"""


@pytest.mark.parametrize("workers", [2, 4, 8])
def test_workers_take_at_most_1_3_times_what_work_and_longest_chain_allow(workers: int, tmp_path: Path):
    (tmp_path / "app.py").write_text(APPLICATION)
    (tmp_path / "app.yaml").write_text(CONFIGURATION)
    methods, rates = "chain=random,el2n,grand,ccs,d2,staff", "pruning_rate=0.2,0.3,0.5,0.7,0.9"
    overrides = [methods, rates, "seed=0,1,2", f"hydra.launcher.workers={workers}"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    began = time.time()
    subprocess.run([sys.executable, "app.py", "-m", *overrides], cwd=tmp_path, env=environment, check=True)
    jobs = [json.loads(file.read_text()) for file in tmp_path.glob("*.json")]
    assert len(jobs) == 90
    work = sum({name: seconds for job in jobs for name, seconds in job["stages"].items()}.values())
    bound = max(work / workers, max(sum(job["stages"].values()) for job in jobs))
    started, wall = min(job["began"] for job in jobs), max(job["ended"] for job in jobs)
    print(f"{workers} workers: {wall - started:.1f} s, {(wall - started) / bound:.2f} times {bound:.1f} s")
    print(f"with the start of the processes {wall - began:.1f} s")
    assert wall - started < 1.3 * bound


# ---------------------------------------------------------------- runs against a hub


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
    assert said.splitlines()[-1].startswith("staff: the data set 'knkarthick/dialogsum' cannot be read from")


def test_a_hub_that_goes_away_between_two_stages_keeps_what_was_done(hub: Hub, tmp_path: Path):
    hub.faults = [Fault("somebody/target/resolve/.*safetensors", status=503)]
    status, said, _ = staff(hub, tmp_path)
    assert status == 1 and "fine-tune small on 24 samples" in said
    assert "the model 'somebody/target' cannot be read from the Hugging Face hub (the hub answers HTTP 503)" in said
    hub.faults.clear()
    status, said, _ = staff(hub, tmp_path)
    assert status == 0 and "fine-tuning target" in said and "fine-tuning small" not in said
