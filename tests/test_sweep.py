"""Sweeps share their work, go on where they were killed, run in parallel, and end with the same records."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from experiments.sweep import FOLDER, end
from staff.artifacts import Store
from staff.manifest import check_contents, check_sizes, read_manifest

SHRUNK = (
    "task.train_limit=16",
    "task.test_limit=2",
    "task.max_new_tokens=2",
    "finetune.epochs=1",
    "finetune.small_epochs=1",
    "tracking=none",
)
GRID = ("method=full,staff,ccs", "pruning_rate=0.5,0.75")
PARALLEL = ("hydra/launcher=local", "hydra.launcher.workers=2")


def start(results: Path, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "experiments.run", "-m", *SHRUNK, f"results_dir={results}", *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def finish(sweep: subprocess.Popen) -> str:
    out, err = sweep.communicate(timeout=300)
    assert sweep.returncode == 0, out + err
    return out + err


# Times and what rests on them, memory, where it ran, and who of several was first.
DIFFERS = {
    *("started", "finished", "seconds", "str", "str_basis", "full_finetuning_seconds", "peak_memory_bytes"),
    *("computed", "provenance", "results_dir", "store_dir", "workers", "processes"),
}


def records(results: Path) -> dict[str, dict]:
    """What must be equal however a sweep went: all of every record but `DIFFERS`."""
    return {file.parent.name: lasting(json.loads(file.read_text())) for file in results.glob("runs/*/metrics.json")}


def lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: lasting(entry) for name, entry in value.items() if name not in DIFFERS}
    return [lasting(entry) for entry in value] if isinstance(value, list) else value


def kill(sweep: subprocess.Popen, how: signal.Signals, seconds: float, whole: bool) -> bool:
    """Send `how` after so many seconds, to the sweep with its workers or to it alone; whether it came in time."""
    with suppress(subprocess.TimeoutExpired):
        sweep.communicate(timeout=seconds)
        return False
    os.killpg(sweep.pid, how) if whole else sweep.send_signal(how)
    sweep.communicate(timeout=300)  # which its workers end as well
    return True


def check_store(results: Path) -> None:
    """Nothing in the store is half-written, whatever has just been killed."""
    for folder in results.glob("artifacts/*/????????????????????????????????"):
        if folder.parent.name == "checkpoints":  # of what is not finished: no artefact
            continue
        manifest, _ = read_manifest(folder)
        check_sizes(folder, manifest)
        check_contents(folder, manifest)


def check_left_behind(results: Path) -> None:
    """A finished sweep leaves no draft and no lost attempt of those that were killed before it."""
    for folder in ("tmp", "attempts", "checkpoints"):
        assert not list((results / "artifacts" / folder).glob("*"))
    assert not Store(results / "artifacts").at_work()


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


def test_a_sweep_that_is_killed_alone_and_with_its_workers_ends_with_the_same_records(
    undisturbed: Path, tmp_path: Path
):
    """At moments of its middle; tests/stress has thirty at random."""
    for whole, made in ((False, 1), (True, 5)):
        sweep = start(tmp_path, *GRID, *PARALLEL)
        deadline = time.monotonic() + 120
        while len(list(tmp_path.glob("artifacts/*/*/manifest.json"))) < made and time.monotonic() < deadline:
            assert sweep.poll() is None, sweep.communicate()
            time.sleep(0.02)
        kill(sweep, random.choice((signal.SIGKILL, signal.SIGTERM)), random.uniform(0, 1), whole)
        check_store(tmp_path)
    said = finish(start(tmp_path, *GRID, *PARALLEL))
    assert "failed" not in said
    check_left_behind(tmp_path)
    assert records(tmp_path) == records(undisturbed)
    assert stages(tmp_path) == stages(undisturbed)
    assert set(computed(said).values()) == {1}, "two workers compute what both need once"


FAILS = """
import os, signal
from baselines.random import Random

class Dies(Random):
    def select(self, pool, budget, rng):
        if os.environ["FAILS"] == "yes":
            os.kill(os.getpid(), signal.SIGKILL)
        return super().select(pool, budget, rng)

class Raises(Random):
    def select(self, pool, budget, rng):
        if os.environ["FAILS"] == "yes":
            raise RuntimeError("a defect")
        return super().select(pool, budget, rng)
"""


def test_a_job_that_is_killed_or_raises_fails_alone_and_the_same_command_resumes(tmp_path, monkeypatch):
    (tmp_path / "fails.py").write_text(FAILS)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    monkeypatch.setenv("FAILS", "yes")
    methods = "method._target_=fails.Dies,fails.Raises,baselines.random.Random"
    jobs = ("method=random", "pruning_rate=0.5", methods)
    out, err = (sweep := start(tmp_path, *jobs, *PARALLEL)).communicate(timeout=300)
    assert sweep.returncode == 1 and "2 of 3 jobs failed; the same command runs what is missing" in out
    assert "Traceback" not in out + err and "Error executing job" not in err, "each is told once"
    failed = [line for line in out.splitlines() if line.startswith("failed: ")]
    reasons = ("Dies: its worker process was killed by SIGKILL", "Raises: RuntimeError: a defect")
    for line, said in zip(failed, reasons, strict=True):
        assert f"method._target_=fails.{said}" in line
        assert Path(line.split("traceback: ")[1].rstrip(")")).is_file()
    (record,) = tmp_path.glob("runs/*/metrics.json")
    assert json.loads(record.read_text())["provenance"]["concurrent_workers"] == 2
    monkeypatch.setenv("FAILS", "no")
    said = finish(start(tmp_path, *jobs))
    assert len(records(tmp_path)) == 3 and said.count("recorded already") == 1


def test_a_job_that_left_no_report_is_named_as_failed(tmp_path: Path, monkeypatch, capsys):
    """Where a cluster ends a job, or the launcher itself fails."""
    (tmp_path / "jobs.json").write_text('["seed=0", "seed=1"]')
    (tmp_path / "00001.json").write_text('{"job": "seed=1", "failure": "a defect", "traceback": "file"}')
    monkeypatch.setenv(FOLDER, str(tmp_path))
    assert end() == 2
    assert capsys.readouterr().out.splitlines() == [
        "failed: seed=0: it left no report",
        "failed: seed=1: a defect (traceback: file)",
        "2 of 2 jobs failed; the same command runs what is missing.",
    ]
    assert end() == 0, "the sweep is over"


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
