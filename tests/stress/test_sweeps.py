"""Sweeps that are killed at random, as jobs of a cluster on one machine, and their time in busy workers."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from support.processes import PARALLEL, SHRUNK, check_left_behind, check_store, finish, kill, records, stages, start

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
    """Under the other launchers: tests/test_honest_failure.py."""
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
