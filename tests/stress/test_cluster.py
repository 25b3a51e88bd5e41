"""The tasks of a cluster's job, as submitit starts them on one machine."""

import json
import subprocess
import sys

from conftest import ROOT
from test_sweep import SHRUNK


def test_the_tasks_of_a_cluster_job_carry_out_its_run_together_and_one_records_it(tmp_path):
    command = [sys.executable, "-m", "experiments.run", "-m", "method=random", f"results_dir={tmp_path}", *SHRUNK]
    launcher = ["hydra/launcher=submitit_local", "hydra.launcher.tasks_per_node=2"]
    ended = subprocess.run([*command, *launcher], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    (record,) = (json.loads(file.read_text()) for file in tmp_path.glob("runs/*/metrics.json"))
    assert record["provenance"]["processes"] == 2
    manifests = [json.loads(file.read_text()) for file in tmp_path.glob("artifacts/finetune/*/manifest.json")]
    assert [manifest["processes"] for manifest in manifests] == [2]
    assert len(list(tmp_path.glob("sweeps/*/*.json"))) == 2, "what the sweep expects, and one report"
