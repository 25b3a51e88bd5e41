"""Sweeps share their work, go on where they were killed, run in parallel, and end with the same records."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

SHRUNK = (
    "task.train_limit=16",
    "task.test_limit=2",
    "task.max_new_tokens=2",
    "finetune.epochs=1",
    "finetune.small_epochs=1",
    "tracking=none",
)
GRID = ("method=full,staff,ccs", "pruning_rate=0.5,0.75")
PARALLEL = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")


def start(results: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "experiments.run", "-m", *SHRUNK, f"results_dir={results}", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def finish(sweep: subprocess.Popen) -> str:
    out, err = sweep.communicate(timeout=300)
    assert sweep.returncode == 0, out + err
    return out + err


def records(results: Path) -> dict[str, dict]:
    """What must be equal however a sweep went: all but times and where they were measured."""
    kept = {}
    for file in results.glob("runs/*/metrics.json"):
        record = json.loads(file.read_text())
        cost = {k: record["overhead"][k] for k in ("flops", "tokens_forward", "tokens_backward")}
        kept[file.parent.name] = {k: record[k] for k in ("metrics", "counts", "coreset", "identity")} | cost
    return kept


def computed(log: str) -> Counter:
    """How often each artefact was computed, by what a sweep says of itself."""
    return Counter(re.findall(r"\((\w+ [0-9a-f]{8})\): computed in", log))


def stages(results: Path) -> Counter:
    """The artefacts there are, by label."""
    return Counter(json.loads(file.read_text())["label"] for file in results.glob("artifacts/*/*/manifest.json"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Path:
    results = tmp_path_factory.mktemp("undisturbed")
    (results / "log.txt").write_text(finish(start(results, *GRID)))
    return results


def test_a_grid_carries_out_every_stage_once(undisturbed: Path):
    assert len(records(undisturbed)) == 5, "full ignores the pruning rate"
    carried_out = computed((undisturbed / "log.txt").read_text())
    done = stages(undisturbed)
    assert carried_out.total() == done.total() and set(carried_out.values()) == {1}
    assert done["fine-tune small on 16 samples"] == 1
    assert done["fine-tune target on 16 samples"] == 1, "for the scores of CCS, and as the full fine-tuning"
    assert done["effort of 16 samples, small model"] == 1
    assert done["el2n of 16 samples, target_tuned model"] == 1
    assert sum(count for label, count in done.items() if label.startswith("answer")) == 5


def test_the_same_command_again_does_nothing_and_says_so(undisturbed: Path):
    before = {file: file.stat().st_mtime_ns for file in undisturbed.glob("runs/*/*")}
    said = finish(start(undisturbed, *GRID))
    assert said.count("recorded already") == 6 and "computed in" not in said
    assert {file: file.stat().st_mtime_ns for file in undisturbed.glob("runs/*/*")} == before


def test_a_sweep_killed_at_several_moments_ends_with_the_same_records(undisturbed: Path, tmp_path: Path):
    for artefacts in (2, 8):
        sweep = start(tmp_path, *GRID)
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("artifacts/*/*/manifest.json"))) < artefacts and time.monotonic() < deadline:
            assert sweep.poll() is None, sweep.communicate()
            time.sleep(0.02)
        os.killpg(sweep.pid, signal.SIGKILL)
        sweep.communicate()
    said = finish(start(tmp_path, *GRID, *PARALLEL))
    assert "failed" not in said
    assert records(tmp_path) == records(undisturbed)
    assert stages(tmp_path) == stages(undisturbed)
    assert set(computed(said).values()) == {1}, "two workers compute what both need once"


def test_the_report_averages_over_seeds_alone_and_tells_what_is_missing(undisturbed: Path, tmp_path: Path):
    def report(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "experiments.report", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    said = report("--results", str(undisturbed))
    assert said.returncode == 0, said.stderr
    assert "told apart by method, pruning_rate" in said.stdout
    assert (undisturbed / "metrics.csv").read_text().count("\n") == 6
    assert report("--results", str(tmp_path)).stderr.startswith(f"{tmp_path}/runs holds no record")

    for record in undisturbed.glob("runs/*ccs*0.75*/metrics.json"):
        record.unlink()
    said = report("--results", str(undisturbed))
    (missing,) = [line for line in said.stdout.splitlines() if line.startswith("missing:")]
    assert said.returncode == 1 and missing.endswith("method=ccs pruning_rate=0.75")
    assert report("--results", str(undisturbed), "--allow-missing").returncode == 0


@pytest.mark.parametrize("preset", sorted(file.stem for file in (ROOT / "conf/experiment").glob("*.yaml")))
def test_every_preset_composes_with_every_one_of_its_methods(preset: str):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("config", overrides=[f"experiment={preset}"], return_hydra_config=True)
        methods = str(cfg.hydra.sweeper.params.get("method", "staff")).split(",")
        for method in methods:
            composed = compose("config", overrides=[f"experiment={preset}", f"method={method}"])
            assert callable(instantiate(composed.method, _convert_="all").select)
            instantiate(composed.finetune, _convert_="all")
