"""Seconds of a plan that is calibrated on the machine that then carries the sweep out: some minutes."""

import json
from pathlib import Path

from experiments.dry_run import calibrated, dry_run
from experiments.plan import seconds_of
from experiments.speeds import ASSUMED

SWEEP = ("task.train_limit=200", "task.test_limit=16", "task.max_new_tokens=16", "finetune.epochs=1")


def test_calibrated_seconds_are_right_within_a_factor_of_one_and_a_half(run, tmp_path: Path):
    results = tmp_path / "results"
    overrides = [*SWEEP, "finetune.small_epochs=1", f"results_dir={results}", "tracking=none"]
    planned = dry_run([*overrides, "method=random,staff,el2n", "pruning_rate=0.5,0.9"])
    speeds, stages = calibrated(planned), planned.stages.values()
    seconds = [seconds_of(stage, None, speeds) for stage in stages]
    for method in ("random", "staff", "el2n"):
        for rate in (0.5, 0.9):
            run(*overrides, f"method={method}", f"pruning_rate={rate}")
    costs = [json.loads(file.read_text()) for file in results.glob("artifacts/*/*/manifest.json")]
    took = {
        stage: sum(m["cost"]["seconds"] for m in costs if m["stage"] == stage) for stage in ("finetune", "scores")
    }
    for stage, measured in took.items():
        told = sum(time for s, time in zip(stages, seconds, strict=True) if s.stage == stage)
        print(f"{stage}: planned {told:.1f} s, took {measured:.1f} s")
    measured = sum(m["cost"]["seconds"] for m in costs if m["stage"] in ASSUMED)
    print(f"together: planned {sum(seconds):.1f} s, took {measured:.1f} s")
    assert measured / 1.5 < sum(seconds) < 1.5 * measured
