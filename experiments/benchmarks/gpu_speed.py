"""Pieces of `experiments.benchmarks.gpu`: scoring, fine-tuning and generation beside peers and bounds."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch

from experiments.benchmarks.common import LORA, Deadline, Drawn, clock, dialogues, drawn, fits, released
from experiments.benchmarks.finetuning import logits_everywhere
from experiments.benchmarks.generation import plain
from experiments.benchmarks.scoring import authors, batches_of, floor, flops_bound, ours, with_adapter
from staff.evaluation.generator import Greedy
from staff.models.flops import forward_flops
from staff.scoring.passes import default_batch_tokens
from staff.store.cost import Meter
from staff.training.memory import available_memory, finetuning_memory
from staff.training.settings import FinetuneSettings
from staff.training.stage import HISTORY, Finetune

Rows = Iterator[dict[str, Any]]
SECONDS = 12.0
"""Of each measurement at most, by which the number of samples is chosen."""


def scoring(tiny: bool, until: Deadline) -> Rows:
    """Effort scores on a GPU, in samples per second.

    "new" scores samples whose batches have shapes that the device has not seen; "seen" scores the same again.
    "floor" is a forward pass over them with logits at label positions. "of the floor" is floor time over that of
    "seen", and "FLOPs bound" what it would be if both ran at the same speed. "error" is the largest relative
    difference from the authors' procedure, which runs in the same precision.
    """
    yield from _cases(tiny, until, _scored)


def finetuning(tiny: bool, until: Deadline) -> Rows:
    """Fine-tuning of LoRA adapters on a GPU, in samples per second of the training steps.

    "Trainer" is transformers' own, with logits at all positions. "of the bound" is the time of a forward pass,
    times the FLOPs of training over those of the forward pass, over our time.
    """
    yield from _cases(tiny, until, _finetuned)


def generation(tiny: bool, until: Deadline) -> Rows:
    """Greedy answers on a GPU, in samples per second.

    "plain" is transformers' `generate` over unsorted batches of 8. "of the bound" is the time to read the weights
    once for each token of each of our batches, at the speed of a copy on this device, over our time. "equal" counts
    answers that agree token by token; random weights in bfloat16 have many near ties.
    """
    yield from _cases(tiny, until, _answered)


def _cases(tiny: bool, until: Deadline, measure: Callable[[Drawn], dict[str, Any]]) -> Rows:
    for spec in drawn(tiny):
        case = {"model": spec.name, "precision": spec.dtype}
        if until.passed:
            yield {**case, "result": "no time left"}
        elif not fits(spec):
            yield {**case, "result": "does not fit"}
        else:
            measured = released(partial(measure, spec))
            yield {**case, **(measured if isinstance(measured, dict) else {"result": measured})}


def _affordable(seconds: float, most: int, least: int) -> int:
    """How many samples take `SECONDS`, when one takes so many."""
    return int(np.clip(SECONDS / max(seconds, 1e-9), least, most))


def _timed(way: Callable[[], Any]) -> float:
    started = clock()
    way()
    return clock() - started


def _scored(spec: Drawn) -> dict[str, Any]:
    model, pad = with_adapter(spec, lambda drawn: drawn.load()), spec.tokenizer().pad_token_id
    few = dialogues(8, spec, seed=1)
    theirs = authors(model, few, pad, 2)  # warms up
    seconds_theirs = _timed(partial(authors, model, few, pad, 2)) / len(few)
    error = float(np.max(np.abs(ours(model, few, None, pad) / theirs - 1)))
    some = dialogues(32, spec, seed=2)
    each = _timed(partial(ours, model, some, None, pad)) / len(some)
    samples = dialogues(16 if spec.shrunk else _affordable(each, 1024, 64), spec)
    with Meter() as meter:
        new = _timed(partial(ours, model, samples, None, pad))
    seen = _timed(partial(ours, model, samples, None, pad))
    batches = batches_of(samples, default_batch_tokens(model), pad, model.device)
    below = min(_timed(partial(floor, model, batches)) for _ in range(2))
    rate = {"authors": 1 / seconds_theirs, **{k: len(samples) / v for k, v in _named(below, new, seen).items()}}
    return {
        "samples": len(samples),
        **{name: round(value, 2) for name, value in rate.items()},
        "new / seen": round(seen / new, 3),
        "seen / authors": round(seconds_theirs * len(samples) / seen, 2),
        "of the floor": round(below / seen, 3),
        "FLOPs bound": round(flops_bound(model, samples), 3),
        "error": float(f"{error:.1g}"),
        "peak GB": round(meter.cost.peak_memory_bytes / 1e9, 2),
    }


def _named(below: float, new: float, seen: float) -> dict[str, float]:
    return {"floor": below, "new": new, "seen": seen}


def _finetuned(spec: Drawn) -> dict[str, Any]:
    settings = FinetuneSettings(lora=LORA, precision=spec.dtype, scheduler="constant", warmup_ratio=0.0)
    some = dialogues(8 if spec.shrunk else 64, spec)
    need = finetuning_memory(spec, settings, some.lengths, some.answer_lengths).total
    if need > available_memory():
        settings = FinetuneSettings(
            lora=LORA, precision=spec.dtype, scheduler="constant", warmup_ratio=0.0, gradient_checkpointing=True
        )
    each = _tuned(spec, some, settings)["seconds"] / len(some)
    samples = some if spec.shrunk else dialogues(_affordable(2 * each, 512, 64) // 8 * 8, spec, seed=1)
    found = {"ours": _tuned(spec, samples, settings), "Trainer": _tuned(spec, samples, settings, peer=True)}
    below, ratio = _forward(spec, samples, settings)
    mine, theirs = found["ours"], found["Trainer"]
    return {
        "samples": len(samples),
        "checkpointing": settings.gradient_checkpointing,
        **{name: round(len(samples) / run["seconds"], 2) for name, run in found.items()},
        "ours / Trainer": round(theirs["seconds"] / mine["seconds"], 2),
        "of the bound": round(below * ratio / mine["seconds"], 3),
        **{f"{name}, peak GB": round(run["peak"] / 1e9, 2) for name, run in found.items()},
        "loss, relative difference": float(f"{abs(mine['loss'] / theirs['loss'] - 1):.1g}"),
    }


def _tuned(spec: Drawn, samples: Any, settings: FinetuneSettings, peer: bool = False) -> dict[str, float]:
    """Seconds of the steps, peak memory in bytes and mean loss of one epoch."""
    with TemporaryDirectory() as folder, logits_everywhere() if peer else nullcontext(), Meter() as meter:
        Finetune(spec, samples, settings, 1, 0).run(Path(folder), meter)
        history = json.loads((Path(folder) / HISTORY).read_text())
    return {"seconds": history["seconds"], "loss": history["loss"], "peak": meter.cost.peak_memory_bytes}


def _forward(spec: Drawn, samples: Any, settings: FinetuneSettings) -> tuple[float, float]:
    """Wall seconds of a forward pass over the samples, and the FLOPs of training over its own."""
    model = with_adapter(spec, lambda drawn: drawn.load())
    batches = batches_of(samples, 8 * int(samples.lengths.max()), spec.tokenizer().pad_token_id, model.device)
    floor(model, batches[:1])
    with Meter() as meter:
        floor(model, batches)
    training = Finetune(spec, samples, settings, 1, 0).flops(0)
    return meter.cost.seconds, training / forward_flops(spec.config(), samples.lengths, samples.answer_lengths)


def _answered(spec: Drawn) -> dict[str, Any]:
    new = 4 if spec.shrunk else 64
    model, tokenizer, generator = spec.load(), spec.tokenizer(), Greedy()
    prompts = dialogues(8 if spec.shrunk else 128, spec).prompts()
    generator.generate(model, tokenizer, prompts[:8], max_new_tokens=new)
    each = _timed(partial(plain, model, tokenizer, prompts[:8], new)) / 8
    prompts = prompts[: _affordable(each, len(prompts), 8) // 8 * 8]
    seconds, answers = {}, {}
    ways = {
        "plain": partial(plain, model, tokenizer, prompts, new),
        "ours": partial(generator.generate, model, tokenizer, prompts, max_new_tokens=new),
    }
    for name, way in ways.items():
        started = clock()
        answers[name] = way()
        seconds[name] = clock() - started
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    budget = 8192 if model.device.type == "cpu" else 32768
    batches = -(-len(prompts) // max(1, budget // (max(map(len, prompts)) + new)))
    return {
        "prompts": len(prompts),
        **{name: round(len(prompts) / value, 2) for name, value in seconds.items()},
        "ours / plain": round(seconds["plain"] / seconds["ours"], 2),
        "of the bound": round(batches * new * weights / _copy_speed(model.device) / seconds["ours"], 3),
        "equal": f"{sum(a == b for a, b in zip(answers['plain'], answers['ours']))} of {len(prompts)}",
    }


def _copy_speed(device: Any) -> float:
    """Bytes per second that a copy on the device reads and writes."""
    source = torch.ones(64 << 20 if device.type == "cuda" else 4 << 20, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    taken = min(_timed(lambda: target.copy_(source)) for _ in range(5))
    return 2 * source.nbytes / max(taken, 1e-9)
