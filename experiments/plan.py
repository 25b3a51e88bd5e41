"""What a sweep will take, before it is paid for: `staff-plan OVERRIDES --gpu h100`.

The overrides are those of the sweep. Its runs are carried out as a dry run, on a store in which every stage is
estimated from shapes instead of run. No weights are loaded, and a stage that runs share is counted once.

Scores are placeholders, so two things are not exact, and marked `~`: STAFF's verification is counted at its most,
K b_v samples, and a coreset that scores choose as one of average samples. Answers, marked `~` too, are counted at
full length. Seconds come from a GPU's peak and an assumed utilisation, or, with --calibrate, from the stages
themselves on a few samples on this machine. Ranking (such as the neighbours of D2) is not in them.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
import tempfile
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict

from experiments import sweep
from experiments.configuration import CONF
from experiments.console import pipeable
from experiments.single import Run
from staff.models.spec import ARCHITECTURES
from staff.runtime.progress import progress
from staff.store.cost import Cost, Meter
from staff.store.manifest import Artifact
from staff.store.stage import Stage
from staff.store.store import Store
from staff.training.memory import finetuning_memory


class Gpu(NamedTuple):
    """Dense FLOP/s in bfloat16 and in float32 (plain, as torch computes by default), and bytes of memory, by the
    vendor's data sheet."""

    bfloat16: float
    float32: float
    memory: float


GPUS = {
    "h100": Gpu(989e12, 67e12, 80e9),
    "h200": Gpu(989e12, 67e12, 141e9),
    "a100": Gpu(312e12, 19.5e12, 80e9),
    "l40s": Gpu(362e12, 91.6e12, 48e9),
    "rtx4090": Gpu(165e12, 82.6e12, 24e9),
}
UTILISATION = {"finetune": 0.4, "scores": 0.24, "evaluation": 0.05}
"""Fractions of the peak. Scores: measured with Gemma-7b's shape on an H200, over batches seen before. The others
are assumed; decoding is bound by memory, not by arithmetic. A model too small to fill the GPU reaches less."""
FEW = (16, 48)
"""Samples of the pool that stages are calibrated on."""


@dataclass(frozen=True)
class PlannedStage:
    """A stage of the sweep.

    Attributes:
        speed: what stages with the same speed have in common.
        precision: that it computes in.
        exact: its FLOPs do not depend on scores or answers.
        made: the sweep's own store has it already.
    """

    stage: str
    label: str
    speed: str
    precision: str
    cost: Cost
    exact: bool
    made: bool


class DryRunStore(Store):
    """A store in which stages are estimated, and listed in `stages` by fingerprint.

    Args:
        root: a temporary folder.
        real: the store of the sweep.
    """

    def __init__(self, root: Path, real: Store) -> None:
        super().__init__(root)
        self.real = real
        self.stages: dict[str, PlannedStage] = {}
        self.certain: set[str] = set()
        """Fingerprints of the samples that are known without scores."""
        self._asked = 0

    def carry_out(self, stage: Stage, folder: Path, meter: Meter, inputs: list[Artifact]) -> None:
        stage.estimate(folder, meter, *inputs)

    def get(self, stage: Stage) -> Artifact:
        # What a method asks second may depend on the first answer; what follows the selection does not.
        self._asked = 0 if stage.kind == "coreset" else self._asked + (stage.kind == "scores")
        second = stage.kind == "scores" and self._asked > 1
        artifact = super().get(stage)
        if stage.kind == "coreset":
            self._asked = 0
        if stage.kind in UTILISATION:
            exact = stage.kind != "evaluation" and stage.key()["samples"] in self.certain and not second
            made = self.real.find(stage) is not None
            self.stages[stage.fingerprint] = PlannedStage(
                stage.kind, stage.label, speed_of(stage), precision_of(stage), artifact.cost, exact, made
            )
        return artifact


class TimedStore(Store):
    """A store that also lists FLOPs and seconds of what it made, by what determines the speed."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.times: list[tuple[str, Cost]] = []

    def get(self, stage: Stage) -> Artifact:
        artifact = super().get(stage)
        if stage.kind in UTILISATION and artifact.computed:
            self.times.append((speed_of(stage), artifact.cost))
        return artifact


def speed_of(stage: Stage) -> str:
    """Kind, model and settings, without samples, epochs and seed."""
    settings = {name: value for name, value in stage.key().items() if name not in ("samples", "epochs", "seed")}
    return json.dumps([stage.kind, settings, bool(stage.inputs)], sort_keys=True)


def precision_of(stage: Stage) -> str:
    """The precision of nearly all of a stage's matrix products: frozen weights keep their own."""
    key = stage.key()
    model = key["model"] if "model" in key else key["state"]["model"]
    narrow = model["dtype"] == "bfloat16" or "quantization" in model
    settings = key.get("settings", {"kind": "lora", "precision": "float32"})
    narrow = settings["precision"] == "bfloat16" or (settings["kind"] == "lora" and narrow)
    return "bfloat16" if narrow else "float32"


def jobs(overrides: Sequence[str]) -> Iterator[tuple[list[str], DictConfig, dict[str, Any]]]:
    """Overrides, configuration and choices of every run of the sweep."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    plain = [text for text, override in zip(overrides, parsed, strict=True) if not override.is_sweep_override()]
    with initialize_config_dir(CONF, version_base="1.3"):
        whole = compose("config", overrides=plain, return_hydra_config=True)
        every = sweep.jobs_of(whole, overrides)
        with progress(len(every), "plan", unit="job") as bar:
            for job in every:
                yield job, *composed(job)
                bar.update()


def composed(job: Sequence[str]) -> tuple[DictConfig, dict[str, Any]]:
    cfg = compose("config", overrides=list(job), return_hydra_config=True)
    choices: Any = OmegaConf.to_container(cfg.hydra.runtime.choices)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg, choices


def dry_run(cfg: DictConfig, choices: dict[str, Any], store: DryRunStore) -> Run:
    """Carry out the run on a store that estimates."""
    run = Run(cfg, choices, store)
    tokenized = run.tokenized
    store.certain |= {samples.fingerprint for samples in tokenized.values()}
    chosen, coreset = run.select()
    if all(charge.stage == "coreset" for charge in chosen.charged().values()):
        store.certain.add(tokenized["target"].take(coreset.trained).fingerprint)
    if run.generator is not None:
        answering = run.answering(run.finetuning(coreset))
        store.get(answering)
        if (scored := run.measuring(answering).likelihood) is not None:
            store.certain.add(scored.samples.fingerprint)
            store.get(scored)
    return run


def needed(run: Run) -> dict[str, int]:
    """Bytes that fine-tuning takes, by the model's name; without models of a type that has no estimate."""
    models = (run.selecting.small, run.tokenized["small"]), (run.family.target, run.tokenized["target"])
    models = [(spec, samples) for spec, samples in models if spec.config().model_type in ARCHITECTURES]
    return {
        spec.name: finetuning_memory(spec, run.settings, samples.lengths, samples.answer_lengths).total
        for spec, samples in models
    }


def calibrated(runs: Sequence[list[str]]) -> dict[str, tuple[float, float]]:
    """Seconds of a stage as (constant, per FLOP) by its `speed`: measured on a few samples with the real models."""
    points: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for few in FEW:
        with tempfile.TemporaryDirectory() as folder:
            short = [f"task.train_limit={few}", f"task.test_limit={few // 4}", f"results_dir={folder}"]
            real, dry = TimedStore(Path(folder) / "real"), DryRunStore(Path(folder) / "plan", Store(folder))
            for job in runs:
                cfg, choices = composed([*job, *short, "tracking=none"])
                dry_run(cfg, choices, dry)
                Run(cfg, choices, real).carry_out()
            at_full_length = {s.speed: s.cost.flops for s in dry.stages.values() if s.stage == "evaluation"}
            for speed, cost in real.times:
                points[speed].append((at_full_length.get(speed, cost.flops), cost.seconds))
    return {speed: _line(np.array(measured)) for speed, measured in points.items()}


def _line(points: np.ndarray) -> tuple[float, float]:
    """Constant and slope, neither negative, through (FLOPs, seconds), (n, 2)."""
    flops, seconds = points.T
    slope = float(np.polyfit(flops, seconds, 1)[0]) if np.ptp(flops) > 0 else 0.0
    constant = float((seconds - slope * flops).mean())
    if slope <= 0 or constant < 0:
        return 0.0, float(seconds.sum() / flops.sum())
    return constant, slope


def seconds_of(stage: PlannedStage, gpu: Gpu | None, speeds: dict[str, tuple[float, float]]) -> float:
    if stage.speed in speeds:
        constant, slope = speeds[stage.speed]
        return constant + slope * stage.cost.flops
    if gpu is None:
        return float("nan")
    peak = gpu.bfloat16 if stage.precision == "bfloat16" else gpu.float32
    return stage.cost.flops / (peak * UTILISATION[stage.stage])


def table(stages: Sequence[PlannedStage], seconds: Sequence[float]) -> pd.DataFrame:
    """A row for each kind of stage: how many, how many of them lie in the store, FLOPs and hours of the others."""
    rows = pd.DataFrame(
        {
            "stage": [re.sub(r"\b\d+ (?=samples|test)", "N ", stage.label) for stage in stages],
            "stages": 1,
            "made": [int(stage.made) for stage in stages],
            "FLOPs": [0.0 if stage.made else stage.cost.flops for stage in stages],
            "hours": [0.0 if stage.made else time / 3600 for stage, time in zip(stages, seconds, strict=True)],
            "exact": [stage.exact for stage in stages],
        }
    )
    sums: Any = {
        "stages": "sum",
        "made": "sum",
        "FLOPs": "sum",
        "hours": lambda h: h.sum(skipna=False),
        "exact": "all",
    }
    return pd.concat(
        [rows.groupby("stage", sort=False).agg(sums), rows.assign(stage="together").groupby("stage").agg(sums)]
    )


def plan(
    overrides: Sequence[str], gpu: Gpu | None, calibrate: bool
) -> tuple[list[PlannedStage], list[float], dict[str, int]]:
    """The stages of a sweep, the seconds of each, and the bytes that fine-tuning its models takes."""
    memory: dict[str, int] = {}
    calibrating: list[list[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        store: DryRunStore | None = None
        for job, cfg, choices in jobs(overrides):
            store = store or DryRunStore(Path(folder), Store(sweep.folder_of(cfg, "store_dir")))
            speeds_before = {stage.speed for stage in store.stages.values()}
            run = dry_run(cfg, choices, store)
            if {stage.speed for stage in store.stages.values()} - speeds_before:
                calibrating.append(job)
            memory |= {name: max(size, memory.get(name, 0)) for name, size in needed(run).items()}
        assert store is not None
        stages = list(store.stages.values())
    with initialize_config_dir(CONF, version_base="1.3"):
        speeds = calibrated(calibrating) if calibrate else {}
    return stages, [seconds_of(stage, gpu, speeds) for stage in stages], memory


@pipeable
def main() -> None:
    parser = argparse.ArgumentParser(prog="staff-plan", description=__doc__)
    parser.add_argument("overrides", nargs="*", help="as for the sweep itself")
    parser.add_argument("--gpu", choices=GPUS, help="hours on this GPU, at an assumed utilisation")
    parser.add_argument("--calibrate", action="store_true", help="hours on this machine, measured on a few samples")
    parser.add_argument("-m", "--multirun", action="store_true", help="changes nothing: as in the sweep's command")
    asked = parser.parse_intermixed_args()
    logging.getLogger("staff").setLevel(logging.WARNING)
    warnings.simplefilter("ignore", FutureWarning)
    gpu = GPUS.get(asked.gpu)
    try:
        stages, seconds, memory = plan(asked.overrides, gpu, asked.calibrate)
    except Exception as error:
        if sentence := sweep.sentence_of(error):
            sys.exit(f"plan: {sentence}")
        raise
    sums = table(stages, seconds)
    shown = sums.drop(columns="exact").assign(
        FLOPs=[f"{'' if exact else '~'}{flops:.3g}" for flops, exact in zip(sums["FLOPs"], sums["exact"])],
        hours=["-" if np.isnan(hours) else f"{hours:.3g}" for hours in sums["hours"]],
    )
    print(shown.to_string())
    print(
        "made: stored already, so in neither FLOPs nor hours; what rests on a coreset chosen by scores is not "
        "recognised"
    )
    for name, size in memory.items():
        over = "" if gpu is None or size <= gpu.memory else f", more than a {asked.gpu} has"
        print(f"fine-tuning {name} takes about {size / 1e9:.3g} GB{over}")
    if not asked.gpu and not asked.calibrate:
        print("hours: name a GPU (--gpu) or measure this machine (--calibrate)")


if __name__ == "__main__":
    main()
