"""What takes minutes: fuzzing, `make gpu`, large reports, plans against the clock, a thousand runs in a process."""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import threading
import time
from itertools import count
from pathlib import Path

import pytest
from conftest import ROOT, run_shrunk
from support.fuzzing_files import PROPERTIES, fuzz
from support.records import grid, write_runs

from experiments.benchmarks.gpu import PIECES
from experiments.dry_run import dry_run
from experiments.plan import calibrated, seconds_of
from experiments.report.__main__ import write
from experiments.report.records import collect
from experiments.sizes import ASSUMED, SPEEDS

# ---------------------------------------------------------------- fuzzing, for MINUTES


MINUTES = float(os.environ.get("MINUTES", "3"))
EXAMPLES = 500


@pytest.mark.parametrize("name", PROPERTIES)
def test_whatever_comes_in_for_minutes(name: str, tmp_path: Path):
    began, first = time.monotonic(), random.randrange(2**32)
    for turn in count():
        fuzz(name, tmp_path, EXAMPLES, start=first + turn)
        if time.monotonic() - began > 60 * MINUTES:
            print(f"{name}: {(turn + 1) * EXAMPLES} examples from seed {first}")
            return


# ---------------------------------------------------------------- make gpu, on a processor with shrunk shapes


def test_every_piece_runs_to_its_end_on_a_processor(tmp_path: Path):
    before = SPEEDS.read_text()
    command = [sys.executable, "-m", "experiments.benchmarks.gpu", "--tiny"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in PIECES:
        told = json.loads((tmp_path / f"results/benchmarks/tiny/{name}.json").read_text())
        assert told["rows"] and told["tiny"] and "torch" in told["machine"], name
        assert not any(row.get("result") in ("failed", "does not fit", "no time left") for row in told["rows"]), (
            name
        )
    assert SPEEDS.read_text() == before, "shrunk shapes are no measurement"


# ---------------------------------------------------------------- ten thousand runs on a page


METHODS = {"raw": -5.0, "full": 0.0, "random": 0.0, "staff": 1.0, **{f"own{i}": 0.1 * i for i in range(8)}}


def test_ten_thousand_runs_are_reported_in_a_minute_on_less_than_five_megabytes(tmp_path: Path):
    tasks, rates = ("dialogsum", "gsm8k", "bioinstruct", "wmt"), (0.2, 0.5, 0.7, 0.8, 0.9)
    write_runs(tmp_path, METHODS, ("small", "large"), tasks, rates, seeds=25, samples=100, pool=500)
    started = time.process_time()
    table = collect(tmp_path)
    assert len(table) > 10_000
    page = write(tmp_path, table)
    taken = time.process_time() - started
    print(f"{len(table):,} runs: {taken:.1f} s of processor time, {page.stat().st_size:,} bytes")
    assert taken < 60, f"{taken:.1f} s of processor time"
    assert page.stat().st_size < 5e6


# ---------------------------------------------------------------- seconds of a plan against those of its sweep


SWEEP = ("task.train_limit=200", "task.test_limit=16", "task.max_new_tokens=16", "finetune.epochs=1")
WORDS = {"finetune": "fine-tune", "scores": "score", "evaluation": "answer"}


@pytest.mark.parametrize("how", ["calibrated", "measured before"])
def test_seconds_are_right_within_a_factor_of_one_and_a_half(run, tmp_path: Path, how: str, monkeypatch):
    """Calibrated on the machine; and by the speeds of one core in experiments/speeds.json, in seconds of the
    processor, which other work disturbs little."""
    if how == "measured before":
        monkeypatch.setattr("staff.store.cost._clock", time.process_time)
    results = tmp_path / "results"
    overrides = [*SWEEP, "finetune.small_epochs=1", f"results_dir={results}", "tracking=none"]
    planned = dry_run([*overrides, "method=random,staff,el2n", "pruning_rate=0.5,0.9"])
    speeds = calibrated(planned) if how == "calibrated" else {}
    stages = planned.stages.values()
    seconds = [seconds_of(stage, "cpu", speeds) for stage in stages]
    for method in ("random", "staff", "el2n"):
        for rate in (0.5, 0.9):
            run(*overrides, f"method={method}", f"pruning_rate={rate}")
    costs = [json.loads(file.read_text()) for file in results.glob("artifacts/*/*/manifest.json")]
    for stage in ASSUMED:
        took = sum(m["cost"]["seconds"] for m in costs if m["stage"] == stage)
        told = sum(time for s, time in zip(stages, seconds, strict=True) if s.stage == stage)
        print(f"{how}, {WORDS[stage]}: planned {told:.1f} s, took {took:.1f} s")
        assert how == "calibrated" or took / 1.5 < told < 1.5 * took
    measured = sum(m["cost"]["seconds"] for m in costs if m["stage"] in ASSUMED)
    print(f"{how}, together: planned {sum(seconds):.1f} s, took {measured:.1f} s")
    assert measured / 1.5 < sum(seconds) < 1.5 * measured


# ---------------------------------------------------------------- RUNS runs in one process


RUNS = int(os.environ.get("RUNS", "1000"))
TINY = (
    "task.train_limit=8",
    "task.test_limit=1",
    "task.max_new_tokens=2",
    "pruning_rate=0.5",
    "task.metrics=[rougeL]",
)


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def test_a_thousand_runs_in_one_process_leave_nothing_behind(tmp_path: Path):
    memory, seconds, handles, threads = [], [], [], []
    before = children()
    for seed in range(RUNS):
        began = time.monotonic()
        tracked = "wandb" if seed % 10 == 0 else "none"  # offline: a service and its files
        run_shrunk(tmp_path, f"tracking={tracked}", "method=random", f"seed={seed}", *TINY)
        seconds.append(time.monotonic() - began)
        memory.append(resident())
        handles.append(len(os.listdir("/proc/self/fd")))
        threads.append(threading.active_count())
        if seed % max(1, RUNS // 20) == 0:
            left = f"{handles[-1]} files, {threads[-1]} threads"
            print(f"{seed}: {memory[-1] / 1e6:.0f} MB, {seconds[-1]:.2f} s, {left}", flush=True)
    hundred = RUNS // 10
    first, last = slice(hundred // 2, hundred), slice(-hundred, None)
    grown = statistics.median(memory[last]) / statistics.median(memory[first])
    slower = statistics.median(seconds[last]) / statistics.median(seconds[first])
    print(
        f"{RUNS} runs: memory times {grown:.3f}, time times {slower:.2f}; "
        f"files {handles[hundred]} to {handles[-1]}, threads {threads[hundred]} to {threads[-1]}"
    )
    assert grown < 1.1 and slower < 1.5
    assert max(handles[last]) <= max(handles[first]) and max(threads[last]) <= max(threads[first])
    assert len(children() - before) <= 1, "W&B's service, one for the process"


def test_a_thousand_records_are_reported_in_seconds(real: Path, tmp_path: Path):
    effects = {"full": 0.0, **{f"own{i}": 0.1 * i for i in range(5)}, "random": 0.0, "staff": 1.0}
    grid(real, tmp_path, effects, seeds=28, rates=(0.2, 0.5, 0.7, 0.8, 0.9))
    assert len(list(tmp_path.glob("runs/*"))) == 28 * (1 + 7 * 5)
    started = time.process_time()
    write(tmp_path, collect(tmp_path))
    taken = time.process_time() - started
    assert taken < 20, f"{taken:.1f} s of processor time"  # 10 on an idle machine
