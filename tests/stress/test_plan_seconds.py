"""Seconds of a plan against those of the sweep that is then carried out: some minutes."""

import json
import time
from pathlib import Path

import pytest

from experiments.dry_run import dry_run
from experiments.plan import calibrated, seconds_of
from experiments.sizes import ASSUMED

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
