"""How fast a device carries out a stage: what was measured, and what is assumed where nothing was.

The measurements lie in `sizes/speeds.json`. `python -m experiments.benchmarks.gpu plan` measures a device and
writes its entry. This module needs neither Hydra nor torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

FILE = Path(__file__).parent / "sizes/speeds.json"
ASSUMED = {"finetune": 0.4, "scores": 0.24, "evaluation": 0.05}
"""Fractions of the peak where nothing was measured. Decoding is bound by memory, not by arithmetic. A model too
small to fill the GPU reaches less."""
ANSWER = 64
"""New tokens of the answers that were measured."""
NEAR = 2.0
"""A model counts as measured up to so many times more or fewer parameters than those that were."""


class Gpu(NamedTuple):
    """Dense FLOP/s in bfloat16 and in float32 (plain, as torch computes by default), and bytes of memory, by the
    vendor's data sheet."""

    bfloat16: float
    float32: float
    memory: float

    def peak(self, precision: str) -> float:
        """FLOP/s in this precision."""
        return self.bfloat16 if precision == "bfloat16" else self.float32


GPUS = {
    "h100": Gpu(989e12, 67e12, 80e9),
    "h200": Gpu(989e12, 67e12, 141e9),
    "a100": Gpu(312e12, 19.5e12, 80e9),
    "l40s": Gpu(362e12, 91.6e12, 48e9),
    "rtx4090": Gpu(165e12, 82.6e12, 24e9),
    # No data sheet: matrix products of 2,048 x 2,048 on one thread of the processor that sizes/speeds.json names.
    "cpu": Gpu(1e11, 1e11, float("inf")),
}


class Speed(NamedTuple):
    """Seconds of a stage: a constant, such as for loading the model, and its FLOPs at a fraction of the peak.

    The constant of answers is that of `ANSWER` new tokens, whose steps take their time however few the prompts are.
    """

    constant: float
    utilisation: float
    measured: bool

    def seconds(self, flops: float, peak: float, constants: float = 1.0) -> float:
        return constants * self.constant + flops / (peak * self.utilisation)


def speed_on(gpu: str, stage: str, precision: str, parameters: float) -> Speed:
    """The speed of a kind of stage, for a model with that many parameters.

    Between the sizes that were measured on this device, the constant and the utilisation are interpolated in the
    logarithm of the parameters. Beyond them the nearest size counts: as measured up to `NEAR` times, then as
    assumed.

    Args:
        gpu: a key of `GPUS`.
        stage: a key of `ASSUMED`.
    """
    points = sorted(
        (point["parameters"], point["constant"], point["utilisation"])
        for point in _measured().get(gpu, {}).get("speeds", [])
        if (point["stage"], point["precision"]) == (stage, precision)
    )
    if not points:
        return Speed(0.0, ASSUMED[stage], False)
    sizes, constants, utilisations = np.array(points).T
    at, known = np.log(parameters), np.log(sizes)
    near = known[0] - np.log(NEAR) <= at <= known[-1] + np.log(NEAR)
    utilisation = float(np.exp(np.interp(at, known, np.log(utilisations))))
    return Speed(float(np.interp(at, known, constants)), utilisation, bool(near))


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Constant and slope, neither negative, through (FLOPs, seconds)."""
    flops, seconds = np.array(points, dtype=float).T
    slope = float(np.polyfit(flops, seconds, 1)[0]) if np.ptp(flops) > 0 else 0.0
    constant = float((seconds - slope * flops).mean())
    if slope <= 0 or constant < 0:
        return 0.0, float(seconds.sum() / flops.sum())
    return constant, slope


def keep(gpu: str, machine: str, speeds: list[dict[str, Any]]) -> None:
    """Write what was measured on a device to `FILE`, in place of earlier measurements of the same combinations."""
    known = json.loads(FILE.read_text())
    new = {_combination(point) for point in speeds}
    before = [point for point in known.get(gpu, {}).get("speeds", []) if _combination(point) not in new]
    known[gpu] = {"machine": machine, "speeds": sorted([*before, *speeds], key=_combination)}
    FILE.write_text(as_text(known))
    _measured.cache_clear()


def as_text(known: dict[str, Any]) -> str:
    """The JSON of `FILE`, with a line for each measurement."""
    parts = []
    for gpu, entry in known.items():
        rows = ",\n   ".join(json.dumps(point) for point in entry["speeds"])
        rest = {name: value for name, value in entry.items() if name != "speeds"}
        head = "".join(f"  {json.dumps(name)}: {json.dumps(value)},\n" for name, value in rest.items())
        parts.append(f' {json.dumps(gpu)}: {{\n{head}  "speeds": [\n   {rows}\n  ]\n }}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _combination(point: dict[str, Any]) -> tuple[str, str, float]:
    return point["stage"], point["precision"], point["parameters"]


@cache
def _measured() -> dict[str, Any]:
    return json.loads(FILE.read_text())
