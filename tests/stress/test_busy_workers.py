"""The time of a grid in worker processes, by stages that sleep: six methods, five rates, three seeds."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

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
