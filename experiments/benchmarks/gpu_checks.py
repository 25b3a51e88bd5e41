"""Pieces of `experiments.benchmarks.gpu`: tests, QLoRA, the estimates of memory, and a plan's speeds."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch

from experiments.benchmarks.common import (
    LORA,
    NAMES,
    Deadline,
    Drawn,
    clock,
    dialogues,
    drawn,
    fits,
    machine,
    peak_memory,
    random_tokens,
    released,
)
from experiments.sizes import ANSWER, GPUS, keep, line
from staff.data.tokens import TokenizedSamples
from staff.evaluation.generator import Greedy
from staff.evaluation.stage import Generate, read_predictions
from staff.models.spec import ModelSpec
from staff.models.state import ModelState
from staff.scoring.stage import Score, ScoringSettings, read_scores
from staff.signals.effort import Effort
from staff.store.cost import Meter
from staff.store.stage import Stage
from staff.store.store import Store
from staff.training.memory import available_memory, finetuning_memory
from staff.training.settings import FinetuneSettings
from staff.training.stage import Finetune

Rows = Iterator[dict[str, Any]]
TESTS = {
    "projected_gradient": "",
    "gradients": "",
    "scoring": "not meter_is_told",
    "finetune": "",
    "memory_and_flops": "not flops",
}
"""Of tests/test_NAME.py, those of passes over a model, by pytest's -k. FLOPs are the same on every device, and
tests of them compare with torch's counter, which before transformers 5.24 counts rotary embeddings too."""


def tests(tiny: bool, until: Deadline) -> Rows:
    """Tests that a GPU changes: exact scores and gradients, fine-tuning, attention kernels, memory."""
    for name, chosen in [*TESTS.items()][: 2 if tiny else None]:
        yield {"tests": name, **({"result": "no time left"} if until.passed else _outcome(name, chosen))}


def _outcome(name: str, chosen: str) -> dict[str, Any]:
    with TemporaryDirectory() as folder:
        report, started = Path(folder) / "report.xml", time.monotonic()
        options = ["-q", "-o", "addopts=", "-p", "no:cacheprovider", "-k", chosen, f"--junitxml={report}"]
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options, f"tests/test_{name}.py"],
            cwd=Path(__file__).resolve().parents[2],
            env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
            capture_output=True,
            text=True,
        )
        cases = [*ElementTree.parse(report).iter("testcase")] if report.is_file() else []
    ends = Counter(next((part.tag for part in case if part.tag in OUTCOMES), "passed") for case in cases)
    if done.returncode:
        print(done.stdout[-6000:], done.stderr[-2000:], flush=True)
    return {
        "result": "failed" if done.returncode else "passed",
        "passed": ends["passed"],
        "failed": ends["failure"] + ends["error"],
        "skipped": ends["skipped"],
        "seconds": round(time.monotonic() - started),
    }


OUTCOMES = {"failure", "error", "skipped"}


def qlora(tiny: bool, until: Deadline) -> Rows:
    """QLoRA end to end: a model in 4 bits is fine-tuned, scores its samples and answers."""
    if importlib.util.find_spec("bitsandbytes") is None:
        yield {"stage": "all", "result": "skipped: the package bitsandbytes is missing"}
        return
    if not torch.cuda.is_available():
        yield {"stage": "all", "result": "skipped: there is no CUDA GPU"}
        return
    target = replace(ModelSpec("pkg://staff/assets/tiny/target"), quantization="nf4", dtype="bfloat16")
    samples, settings = _short(target, 16), FinetuneSettings(lora=LORA, precision="bfloat16", quantization="nf4")
    tuning = Finetune(target, samples, settings, 1, 0)
    state, effort = ModelState(target, tuning), Effort()
    stages = (
        tuning,
        Score(state, samples, (effort,), ScoringSettings(), LORA, 0),
        Generate(state, samples, Greedy(), 8),
    )
    with TemporaryDirectory() as folder:
        store = Store(Path(folder))
        for stage in stages:
            artifact = store.get(stage)
            whole = True
            if isinstance(stage, Score):
                scores = read_scores(artifact)[effort.name]
                whole = bool(np.isfinite(scores).all() and (scores > 0).all())
            if isinstance(stage, Generate):
                whole = len(read_predictions(artifact)) == len(samples)
            cost = artifact.cost
            numbers = {"seconds": round(cost.seconds, 2), "peak GB": round(cost.peak_memory_bytes / 1e9, 3)}
            yield {"stage": stage.label, "result": "passed" if whole else "failed", **numbers}


def _short(spec: ModelSpec, count: int) -> TokenizedSamples:
    rng, vocabulary = np.random.default_rng(0), spec.config().vocab_size
    rows = [rng.integers(4, vocabulary, int(rng.integers(20, 60))).tolist() for _ in range(count)]
    return TokenizedSamples.of_rows([str(i) for i in range(count)], rows, [len(row) - 8 for row in rows])


VARIANTS: tuple[dict[str, Any], ...] = (
    {},
    {"gradient_checkpointing": True},
    {"precision": "bfloat16"},
    {"precision": "bfloat16", "gradient_checkpointing": True},
    {"precision": "bfloat16", "kind": "full"},
)


def memory(tiny: bool, until: Deadline) -> Rows:
    """The estimate of a fine-tuning's memory beside its measured peak, for batches of eight samples of one length.

    Weights are in the precision of the training. On a processor the peak is that of all tensors of one training,
    and includes what a GPU's kernels would not keep.
    """
    for name in NAMES[:2] if tiny else NAMES:
        for variant in VARIANTS:
            spec = Drawn(name, dtype=variant.get("precision", "float32"), shrunk=tiny)
            case = {"model": spec.name, "settings": _words(variant)}
            if until.passed:
                yield {**case, "result": "no time left"}
            else:
                yield {**case, **_estimated(spec, FinetuneSettings(lora=LORA, **variant))}


def _words(variant: dict[str, Any]) -> str:
    return ", ".join(f"{key}={str(value).lower()}" for key, value in variant.items()) or "float32, LoRA"


def _estimated(spec: Drawn, settings: FinetuneSettings) -> dict[str, Any]:
    tokens, answers = (64, 16) if spec.shrunk else (512, 64)
    lengths = np.full(16, tokens)
    samples = random_tokens(lengths, lengths - answers, spec, np.random.default_rng(0))
    estimate = finetuning_memory(spec, settings, samples.lengths, samples.answer_lengths).total
    if estimate > 0.95 * available_memory():
        return {"estimate GB": round(estimate / 1e9, 3), "result": "does not fit"}
    measured = released(partial(peak_memory, partial(_train, spec, samples, settings)))
    if not isinstance(measured, int):
        return {"estimate GB": round(estimate / 1e9, 3), "result": str(measured)}
    return {
        "estimate GB": round(estimate / 1e9, 4),
        "measured GB": round(measured / 1e9, 4),
        "estimate / measured": round(estimate / measured, 3),
        "result": "within a tenth" if abs(estimate / measured - 1) <= 0.1 else "not within a tenth",
    }


def _train(spec: Drawn, samples: TokenizedSamples, settings: FinetuneSettings) -> None:
    with TemporaryDirectory() as folder:
        Finetune(spec, samples, settings, 1, 0).run(Path(folder), Meter())


KINDS = ("scores", "finetune", "evaluation")
KEPT = ("stage", "precision", "parameters", "constant", "utilisation")


def plan(tiny: bool, until: Deadline) -> Rows:
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
        stage = Generate(ModelState(spec), samples, Greedy(), 4 if tiny else ANSWER)
    with TemporaryDirectory() as folder, Meter() as meter:
        stage.estimate(Path(folder), meter)
    return stage, meter.cost.flops
