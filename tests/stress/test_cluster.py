"""Jobs of a cluster, as submitit starts them on one machine."""

import json
import subprocess
import sys
from pathlib import Path

from support.sweeps import ROOT, SHRUNK

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
