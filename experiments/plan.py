"""Estimate the cost of a sweep before it runs: `staff-plan OVERRIDES --gpu h100`.

The overrides are those of the sweep. Every stage is estimated from the models' shapes: no weights are loaded, and a
stage that runs share is counted once. Without --gpu or --calibrate, the plan has FLOPs but no hours.

Seconds come from the GPU's peak and the fraction of it that was measured for this kind of stage and size of model
(experiments/speeds.json), or, with --calibrate, from a few samples on this machine. Stages that were not measured
are listed after `assumed:`.

`~` marks rough estimates. Scores are not known in advance, so STAFF's verification is counted at its maximum, K b_v
samples, and a coreset chosen by scores as one of average samples. Answers are counted at full length. The time of
the selection itself, such as the neighbours of D2, is not included.
"""

from __future__ import annotations

import argparse
import logging
import re
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments import command
from experiments.configuration import with_home, within_groups
from experiments.dry_run import DryRun, DryRunStore, PlannedStage, dry_run, estimate, jobs_of, speed_of
from experiments.report.seeds import checked_effect, sentences
from experiments.schedule import wall_seconds
from experiments.single import Run
from experiments.sizes import ASSUMED, GPUS, line, speed_on
from staff.errors import UserError
from staff.runtime.files import local_path
from staff.store.cost import Cost
from staff.store.manifest import Artifact
from staff.store.stage import Stage
from staff.store.store import Store

FEW = (16, 48)
"""Samples of the pool that stages are calibrated on."""


def seconds_of(stage: PlannedStage, gpu: str | None, speeds: dict[str, tuple[float, float]]) -> float:
    """Seconds of a stage on a GPU, or as calibrated; NaN if neither is known."""
    if stage.speed in speeds:
        constant, slope = speeds[stage.speed]
        return constant + slope * stage.cost.flops
    if gpu is None:
        return float("nan")
    speed = speed_on(gpu, stage.stage, stage.precision, stage.parameters)
    return speed.seconds(stage.cost.flops, GPUS[gpu].peak(stage.precision), stage.constants)


class TimedStore(Store):
    """A store that also lists FLOPs and seconds of what it made, by what determines the speed."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.times: list[tuple[str, Cost]] = []

    def get(self, stage: Stage) -> Artifact:
        artifact = super().get(stage)
        if stage.kind in ASSUMED and artifact.computed:
            self.times.append((speed_of(stage), artifact.cost))
        return artifact


def calibrated(planned: DryRun, config_dir: str | None = None) -> dict[str, tuple[float, float]]:
    """Seconds of a stage as (constant, per FLOP) by its `speed`: measured on a few samples with the real models."""
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for few in FEW:
        with tempfile.TemporaryDirectory() as folder:
            short = [f"task.train_limit={few}", f"task.test_limit={few // 4}", f"results_dir={folder}"]
            real, dry = TimedStore(Path(folder) / "real"), DryRunStore(Path(folder) / "plan", Store(folder))
            for overrides in planned.distinct:
                for job, setup, _ in jobs_of([*overrides, *short, "tracking=none"], config_dir, dry.root):
                    estimate(job, setup, dry)
                    Run(setup, real).carry_out()
            stages = dry.planned.stages.values()
            at_full_length = {stage.speed: stage.cost.flops for stage in stages if stage.stage == "evaluation"}
            for speed, cost in real.times:
                points[speed].append((at_full_length.get(speed, cost.flops), cost.seconds))
    return {speed: line(measured) for speed, measured in points.items()}


def assumed(stages: Sequence[PlannedStage], gpu: str, speeds: dict[str, tuple[float, float]]) -> list[str]:
    """What was not measured on this GPU, in words."""
    words = {"finetune": "fine-tuning", "scores": "scoring with", "evaluation": "answers of"}
    unknown = {
        f"{words[stage.stage]} {stage.parameters / 1e6:,.3g} M parameters in {stage.precision}": None
        for stage in stages
        if stage.speed not in speeds and not speed_on(gpu, stage.stage, stage.precision, stage.parameters).measured
    }
    return list(unknown)


def table(stages: Sequence[PlannedStage], seconds: Sequence[float]) -> pd.DataFrame:
    """A row for each kind of stage: how many, how many of them lie in the store, FLOPs and hours of the others."""
    rows = pd.DataFrame(
        {
            "stage": [re.sub(r"\b\d+ (?=samples|test)", "N ", stage.label) for stage in stages],
            "stages": 1,
            "stored": [int(stage.made) for stage in stages],
            "FLOPs": [0.0 if stage.made else stage.cost.flops for stage in stages],
            "hours": [0.0 if stage.made else time / 3600 for stage, time in zip(stages, seconds, strict=True)],
            "exact": [stage.exact for stage in stages],
        }
    )
    known = partial(pd.Series.sum, skipna=False)  # what is unknown makes a sum unknown
    sums: Any = {"stages": "sum", "stored": "sum", "FLOPs": known, "hours": known, "exact": "all"}
    return pd.concat(
        [rows.groupby("stage", sort=False).agg(sums), rows.assign(stage="total").groupby("stage").agg(sums)]
    )


def _told(flops: float, exact: bool) -> str:
    return "unknown" if np.isnan(flops) else f"{'' if exact else '~'}{flops:.3g}"


def duration(seconds: float) -> str:
    """Such as "4 min", or "30 s"."""
    unit, of = next(((unit, of) for unit, of in (("h", 3600), ("min", 60)) if seconds >= 1.5 * of), ("s", 1))
    return f"{seconds / of:.2g} {unit}" if seconds < 99.5 * of else f"{seconds / of:.0f} {unit}"


def report(
    planned: DryRun, seconds: dict[str, float], gpu: str | None, gpus: int, speeds: dict[str, tuple[float, float]]
) -> str:
    """What a plan tells, in lines."""
    sums = table(list(planned.stages.values()), list(seconds.values()))
    shown = sums.drop(columns="exact").assign(
        FLOPs=[_told(flops, exact) for flops, exact in zip(sums["FLOPs"], sums["exact"])],
        hours=["-" if np.isnan(hours) else f"{hours:.3g}" for hours in sums["hours"]],
    )
    lines = [shown.to_string()]
    if any(stage.made for stage in planned.stages.values()):
        lines.append(
            "stored: these stages are in the store already, and not counted in FLOPs and hours; stages that depend "
            "on a coreset chosen by scores are counted even if they are stored"
        )
    lines += [f"sizes: {size}" for size in planned.sizes]
    lines += [f"~ not available here: {replaced}" for replaced in planned.replaced]
    for name, size in planned.memory.items():
        over = "" if gpu is None or size <= GPUS[gpu].memory else f", more than a {gpu} has"
        lines.append(f"memory: fine-tuning {name} takes about {size / 1e9:.3g} GB{over}")
    stored = sum(stage.bytes for stage in planned.stages.values() if not stage.made)
    lines.append(f"storage: about {stored / 1e9:.2g} GB of adapters and scores")
    left = {known: 0.0 if planned.stages[known].made else time for known, time in seconds.items()}
    if not any(np.isnan(time) for time in left.values()):
        wall = duration(wall_seconds(planned.jobs, left, gpus, planned.order))
        chain = duration(max(sum(left[stage] for stage in job) for job in planned.jobs))
        lines.append(
            f"wall time: about {wall} with {gpus} run{'s' * (gpus > 1)} at a time; the longest run takes {chain}"
        )
    elif np.isnan(sums.loc["total", "FLOPs"]):
        lines.append("hours: unknown, since the FLOPs of a model cannot be counted")
    else:
        lines.append("hours: name a GPU (--gpu) or measure this machine (--calibrate)")
    if gpu is not None and (unknown := assumed(list(planned.stages.values()), gpu, speeds)):
        lines.append(f"assumed: the speed of a {gpu} at {', '.join(unknown)}; it was not measured")
    return "\n".join(lines)


@command
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="staff-plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="overrides of the sweep, as for staff")
    parser.add_argument("--gpu", choices=GPUS, help="print hours on this device; cpu: one core")
    parser.add_argument("--gpus", type=int, default=1, help="number of GPUs, with a run on each (default: 1)")
    parser.add_argument("--calibrate", action="store_true", help="print hours on this machine, by a few samples")
    parser.add_argument(
        "--effect", type=float, help="print the number of seeds that detect a difference of this size"
    )
    parser.add_argument(
        "--measured", type=local_path, help="results with variances for --effect (default: results_dir)"
    )
    parser.add_argument("--config-dir", help="folder with your own configuration, as for staff")
    parser.add_argument("-m", "--multirun", action="store_true", help="no effect: allows pasting a sweep's command")
    asked = parser.parse_intermixed_args()
    if asked.gpus < 1:
        raise UserError(f"--gpus={asked.gpus} must be at least 1.")
    effect = None if asked.effect is None else checked_effect(asked.effect)
    logging.getLogger("staff").setLevel(logging.WARNING)
    planned = dry_run(within_groups(with_home(asked.overrides)), asked.config_dir)
    seeds = [] if effect is None else [*sentences([*planned.compared.values()], effect, asked.measured)]
    speeds = calibrated(planned, asked.config_dir) if asked.calibrate else {}
    seconds = {known: seconds_of(stage, asked.gpu, speeds) for known, stage in planned.stages.items()}
    print("\n".join([report(planned, seconds, asked.gpu, asked.gpus, speeds), *seeds]))


if __name__ == "__main__":
    main()
