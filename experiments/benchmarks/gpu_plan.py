"""The piece `plan` of `experiments.benchmarks.gpu`: speeds by kind of stage and size of model."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from experiments.benchmarks.common import clock, machine
from experiments.benchmarks.shapes import LORA, Deadline, Drawn, dialogues, drawn, fits, released
from experiments.speeds import GPUS, keep, line
from staff.evaluation.generator import Greedy
from staff.evaluation.stage import Generate
from staff.models.spec import ModelSpec
from staff.models.state import ModelState
from staff.scoring.stage import Score, ScoringSettings
from staff.signals.effort import Effort
from staff.store.cost import Meter
from staff.store.stage import Stage
from staff.training.settings import FinetuneSettings
from staff.training.stage import Finetune

KINDS = ("scores", "finetune", "evaluation")
KEPT = ("stage", "precision", "parameters", "constant", "utilisation")


def plan(tiny: bool, until: Deadline) -> Iterator[dict[str, Any]]:
    """Speeds of the stages that a plan counts.

    Each stage runs on fewer and on more samples, as long as DialogSum's. "constant" is what does not depend on
    their number, in seconds, and "utilisation" the fraction of the peak at which the rest of the FLOPs run. Weights
    are drawn at random, so that the constant has no reading of weights from a disk.
    """
    gpu = next((name for name in GPUS if torch.cuda.is_available() and _named(name)), None)
    gpu = "cpu" if not torch.cuda.is_available() else gpu
    found = []
    for spec in _models(tiny):
        case = {"model": spec.name, "precision": spec.dtype}
        if until.passed or not fits(spec):
            yield {**case, "result": "no time left" if until.passed else "does not fit"}
            continue
        for kind in KINDS:
            measured = released(partial(_measured, spec, kind, gpu or "h100", tiny))
            if isinstance(measured, str):
                yield {**case, "stage": kind, "result": measured}
                continue
            yield {**case, **measured}
            found.append({name: measured[name] for name in KEPT})
            if gpu is not None and not tiny:
                keep(gpu, machine(), found)


def _named(gpu: str) -> bool:
    return gpu in torch.cuda.get_device_name().lower().replace(" ", "")


def _models(tiny: bool) -> Iterator[Drawn | ModelSpec]:
    if tiny or torch.cuda.is_available():
        yield from drawn(tiny)
        return
    for name in ("small", "target"):
        yield ModelSpec(f"pkg://staff/assets/tiny/{name}")
    yield next(drawn(False))


def _measured(spec: Any, kind: str, gpu: str, tiny: bool) -> dict[str, Any]:
    few, many = (4, 8) if tiny else (64, 256) if torch.cuda.is_available() else (24, 96)
    parameters = spec.shapes().num_parameters()
    if not torch.cuda.is_available() and parameters > 1e8:
        few, many = 4, 12
    points = []
    for count in (few, few, many):  # the first warms up
        stage, flops = _stage(spec, kind, count, tiny)
        with TemporaryDirectory() as folder, Meter() as meter:
            started = clock()
            stage.run(Path(folder), meter)
            points.append((flops, clock() - started))
    constant, slope = line(points[1:])
    return {
        "stage": kind,
        "precision": spec.dtype,
        "parameters": parameters,
        "constant": float(f"{constant:.3g}"),
        "utilisation": float(f"{1 / (slope * GPUS[gpu].peak(spec.dtype)):.3g}"),
        "seconds": "; ".join(f"{seconds:.2f}" for _, seconds in points[1:]),
    }


def _stage(spec: Any, kind: str, count: int, tiny: bool) -> tuple[Stage, float]:
    """A stage of this kind on so many samples, and the FLOPs that a plan counts it with."""
    samples = dialogues(count, spec, seed=count)
    if kind == "scores":
        stage: Stage = Score(ModelState(spec), samples, (Effort(),), ScoringSettings(), LORA, 0)
    elif kind == "finetune":
        stage = Finetune(spec, samples, FinetuneSettings(lora=LORA, precision=spec.dtype), 1, 0)
    else:
        stage = Generate(ModelState(spec), samples, Greedy(), 4 if tiny else 64)
    with TemporaryDirectory() as folder, Meter() as meter:
        stage.estimate(Path(folder), meter)
    return stage, meter.cost.flops
