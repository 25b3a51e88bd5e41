"""Supervised fine-tuning of a model on a set of samples, with the loss on the answer tokens alone."""

from __future__ import annotations

import json
import logging
import math
import sys
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from staff.runtime import processes
from staff.adapters import fresh_lora
from staff.artifacts import Artifact, Store
from staff.cost import Meter, training_flops
from staff.errors import UserError
from staff.models import PRECISIONS, QUANTIZATIONS, LoraSpec, ModelSpec, plain
from staff.tokens import TokenizedSamples
from staff.training_warnings import checksums, training_warnings

log = logging.getLogger(__name__)

SCHEDULERS = ("cosine", "linear", "constant", "constant_with_warmup")
WARMUP_STARTS = ("first_step", "zero")
MATCHES = ("epochs", "steps")
ONLINE_SCORES = "online.safetensors"


@dataclass(frozen=True)
class FinetuneSettings:
    """How models are fine-tuned; defaults are the preset `lora`, conf/finetune/lora.yaml says where they are from.

    Attributes:
        kind: "lora", or "full" for all weights.
        batch_size: samples of one optimiser step, on all devices together.
        device_batch_size: samples in a device's memory at once, or all of its share of a step where those are less;
            gradients are accumulated up to the share.
        epochs: passes over the coreset, for the target.
        small_epochs: T, passes over the whole pool, for the small model.
        match: what fine-tuning on a coreset has in common with fine-tuning on the whole pool: the "epochs", or the
            optimiser "steps", for which it passes over the coreset more often.
        scheduler: how the learning rate goes on after warm-up; one of `SCHEDULERS`, as transformers defines them.
        warmup_ratio: fraction of the steps in which the learning rate rises, rounded up to whole steps.
        warmup_start: where it rises from; "first_step": the k-th of w warm-up steps has k / w of the rate; "zero":
            (k - 1) / w, transformers' own schedule and that of the authors' code, in which the first step changes
            nothing, and neither does a fine-tuning of one step. For exact comparisons.
        max_length: cut-off in tokens; a sample that does not fit is refused or dropped (task.too_long).
        precision: "float32", or "bfloat16" for autocast.
        length_grouped: batches of samples of similar length: less padding, less random batches.
        quantization: None, or "nf4": the frozen weights under LoRA in 4 bits (QLoRA, see `staff.models`).
        gradient_checkpointing: blocks are run again in the backward pass instead of remembered: less memory, about
            a third more time, the same weights.
        fsdp: the processes of a run share out the models' weights (FSDP2), in scoring and answering as well, and
            fetch a block's when it runs: for a target that does not fit one device.
    """

    kind: str = "lora"
    lora: LoraSpec = field(default_factory=lambda: LoraSpec(rank=8, alpha=16))
    learning_rate: float = 1e-4
    batch_size: int = 8
    device_batch_size: int = 8
    epochs: int = 4
    small_epochs: int = 3
    match: str = "epochs"
    scheduler: str = "cosine"
    warmup_ratio: float = 0.1
    warmup_start: str = "first_step"
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    max_length: int = 1024
    precision: str = "float32"
    length_grouped: bool = False
    quantization: str | None = None
    gradient_checkpointing: bool = False
    fsdp: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("lora", "full"):
            raise UserError(f"finetune.kind={self.kind!r} is unknown: choose lora or full.")
        if self.precision not in PRECISIONS:
            raise UserError(f"finetune.precision={self.precision!r}: choose {' or '.join(PRECISIONS)}.")
        if self.quantization not in (None, *QUANTIZATIONS):
            raise UserError(f"finetune.quantization={self.quantization!r}: choose null or {QUANTIZATIONS[0]}.")
        if self.quantization and self.kind != "lora":
            raise UserError(f"finetune.quantization={self.quantization} is for finetune.kind=lora: frozen weights.")
        if self.fsdp and (self.quantization or self.kind != "lora"):
            raise UserError("finetune.fsdp=true shares out frozen weights of full precision: choose finetune=lora.")
        for name in ("length_grouped", "gradient_checkpointing", "fsdp"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"finetune.{name}={getattr(self, name)!r} must be true or false.")
        for name in ("batch_size", "device_batch_size", "epochs", "small_epochs", "max_length"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise UserError(f"finetune.{name}={value!r} must be a whole number of at least 1.")
        if not isinstance(self.learning_rate, int | float) or not 0 < self.learning_rate < math.inf:
            raise UserError(f"finetune.learning_rate={self.learning_rate!r} must be a positive number.")
        for name, high in (("warmup_ratio", 1.0), ("weight_decay", 1e9), ("max_grad_norm", 1e9)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= high:
                raise UserError(f"finetune.{name}={value!r} must be a number of at least 0 and at most {high:g}.")
        if self.match not in MATCHES:
            raise UserError(f"finetune.match={self.match!r} is unknown: choose {' or '.join(MATCHES)}.")
        if self.scheduler not in SCHEDULERS:
            raise UserError(f"finetune.scheduler={self.scheduler!r}: choose {', '.join(SCHEDULERS)}.")
        if self.warmup_start not in WARMUP_STARTS:
            raise UserError(f"finetune.warmup_start={self.warmup_start!r}: choose {' or '.join(WARMUP_STARTS)}.")
        if self.batch_size % self.device_batch_size:
            raise UserError(
                f"finetune.device_batch_size={self.device_batch_size} must divide finetune.batch_size="
                f"{self.batch_size}, so that every step sees as many samples."
            )

    def key(self) -> dict[str, Any]:
        """The fields that determine the result. How batches and weights lie in memory changes nothing but rounding;
        which number of epochs counts depends on the model and on `match`; a quantised model is another model."""
        memory = ("device_batch_size", "gradient_checkpointing", "fsdp")
        apart = (*memory, "epochs", "small_epochs", "match", "quantization")
        return {k: v for k, v in plain(self).items() if k not in apart}

    def steps(self, samples: int) -> int:
        """Optimiser steps of one epoch."""
        return math.ceil(samples / self.batch_size)

    def on_each_device(self, devices: int) -> tuple[int, int]:
        """Samples in memory at once, and how many times over for one step.

        Raises:
            UserError: the samples of a step cannot be shared out evenly.
        """
        share, left = divmod(self.batch_size, devices)
        if left or share % min(self.device_batch_size, share):
            raise UserError(
                f"finetune.batch_size={self.batch_size} cannot be shared by {devices} processes in parts of "
                f"finetune.device_batch_size={self.device_batch_size}: start as many as divide the batch, and let "
                "the parts divide each one's share."
            )
        at_once = min(self.device_batch_size, share)
        return at_once, share // at_once

    def coreset_epochs(self, coreset: int, pool: int) -> float:
        """Epochs over a coreset of that many samples, whole or not."""
        if self.match == "epochs":
            return self.epochs
        wanted, steps = self.epochs * self.steps(pool), self.steps(coreset)
        if wanted % steps == 0:
            return wanted // steps
        epochs = wanted / steps
        # The trainer rounds up, so that an error of rounding would be a step too many.
        return epochs if math.ceil(epochs * steps) == wanted else math.nextafter(epochs, 0)


def finetune_key(
    spec: ModelSpec,
    samples: TokenizedSamples,
    settings: FinetuneSettings,
    epochs: float,
    seed: int,
    online: str | None = None,
) -> dict[str, Any]:
    """What determines a fine-tuned model, and whether scores are taken on the way."""
    key = {
        "model": spec.identity(),
        "samples": samples.fingerprint,
        "settings": settings.key(),
        "epochs": epochs,
        "seed": seed,
    }
    return {**key, "online": online} if online else key


def finetuned(
    store: Store,
    spec: ModelSpec,
    samples: TokenizedSamples,
    settings: FinetuneSettings,
    epochs: float,
    seed: int,
    online: str | None = None,
) -> Artifact:
    """The fine-tuned model as an artefact: a LoRA adapter (or all weights), and the log of its training; with
    `online`, a kind of gradient, also every sample's effort in the last epoch (`staff.online`)."""

    label = f"fine-tune {spec.name} on {len(samples)} samples" + (", scoring online" if online else "")
    key = finetune_key(spec, samples, settings, epochs, seed, online)
    checkpoints = store.checkpoints(store.fingerprint("finetune", key))

    def make(folder: Path, cost: Meter) -> None:
        finetune(spec, samples, settings, epochs, seed, folder, cost, online, checkpoints)

    def foresee(folder: Path, cost: Meter) -> None:
        model = spec.shapes()
        if settings.kind == "lora":
            fresh_lora(model, settings.lora, seed)
        _count(cost, spec, samples, settings, epochs, _trainable(model))
        if online:
            from safetensors.numpy import save_file

            save_file({"effort": stand_in(len(samples), label)}, folder / ONLINE_SCORES)

    return store.get("finetune", key, make, label=label, foresee=foresee)


def finetune(
    spec: ModelSpec,
    samples: TokenizedSamples,
    settings: FinetuneSettings,
    epochs: float,
    seed: int,
    folder: Path,
    cost: Meter,
    online: str | None = None,
    checkpoints: Path | None = None,
) -> None:
    """Fine-tune and write the result to `folder`. The trainer is given the very tokens the scorer sees.

    A long training leaves checkpoints in the folder `checkpoints` (by default in `folder`), and goes on from the
    last one that is there.
    """
    if online and settings.kind != "lora":
        raise UserError(f"scores online are gradients of adapters: they need finetune=lora, not {settings.kind}.")
    import torch
    from transformers import PrinterCallback

    from staff.checkpoints import Checkpoints
    from staff.online import OnlineEfforts
    from staff.trainer import Progress, checkpoint_blocks, trainer_for

    model = spec.load()
    model = fresh_lora(model, settings.lora, seed) if settings.kind == "lora" else model.float()
    efforts = OnlineEfforts(model, online, len(samples)) if online else None
    checkpoints = checkpoints or folder
    saved = Checkpoints(checkpoints, cost, efforts)
    if settings.gradient_checkpointing:
        checkpoint_blocks(model)
    trainer = trainer_for(
        model,
        spec.tokenizer(),
        samples.ids,
        efforts,
        warmup_start=settings.warmup_start,
        args=_arguments(settings, epochs, seed, len(samples), checkpoints),
        train_dataset=_rows(samples),
        callbacks=[Progress(spec.name, len(samples)), saved],
    )
    trainer.remove_callback(PrinterCallback)
    before = checksums(model)
    result = trainer.train(resume_from_checkpoint=saved.last and str(saved.last))
    seconds = saved.seconds  # those of the steps, before the model is saved
    if not math.isfinite(result.training_loss):
        raise UserError(
            f"fine-tuning {spec.path} ended with a loss of {result.training_loss}: lower finetune.learning_rate="
            f"{settings.learning_rate}."
        )
    trained = _trainable(model)
    _count(cost, spec, samples, settings, epochs, trained)
    if processes.is_main_process():
        model.save_pretrained(folder)
    if efforts is not None:
        efforts.bring_together()
        efforts.save(folder / ONLINE_SCORES)
    steps = trainer.state.global_step
    warnings = training_warnings(steps, moved=checksums(model) != before)
    for warning in warnings:
        log.warning("fine-tuning %s on %d samples: %s", spec.name, len(samples), warning)
    history = {
        "seconds": seconds,
        "steps": steps,
        "trainable_parameters": trained,
        "loss": result.training_loss,
        "warnings": warnings,
    }
    (folder / "training.json").write_text(json.dumps({**history, "log": trainer.state.log_history}, indent=1))
    del trainer, model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _rows(samples: TokenizedSamples) -> Any:
    from datasets import Dataset

    return Dataset.from_dict(
        {
            "input_ids": samples.input_ids,
            "labels": [samples.labels(i) for i in range(len(samples))],
            "length": samples.lengths.tolist(),
            "row": list(range(len(samples))),
        }
    )


def _trainable(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _count(
    cost: Meter,
    spec: ModelSpec,
    samples: TokenizedSamples,
    settings: FinetuneSettings,
    epochs: float,
    trained: int,
) -> None:
    flops = epoch_flops(spec, samples, trained if settings.kind == "lora" else None)
    tokens = round(int(samples.lengths.sum()) * epochs)
    cost.add(flops=flops * epochs, tokens_forward=tokens, tokens_backward=tokens)


def stand_in(samples: int, name: str) -> np.ndarray:
    """Scores where nothing was scored, (N,): evenly spread, so that no region is empty, in an order drawn by `name`
    (two methods that asked for different scores hardly ever choose the same coreset)."""
    return (1 + np.random.default_rng(zlib.crc32(name.encode())).permutation(samples)) / samples


def epoch_flops(spec: ModelSpec, samples: TokenizedSamples, adapter_parameters: int | None) -> float:
    """FLOPs of one epoch: logits where there are labels, the last block in full (it is run at fewer positions)."""
    return training_flops(
        spec.config(), samples.lengths, samples.answer_lengths, adapter_parameters=adapter_parameters
    )


def _arguments(settings: FinetuneSettings, epochs: float, seed: int, samples: int, checkpoints: Path) -> Any:
    import torch
    from transformers import TrainingArguments

    steps = math.ceil(settings.steps(samples) * epochs)
    at_once, accumulated = settings.on_each_device(processes.world_size())
    return TrainingArguments(
        output_dir=str(checkpoints),
        num_train_epochs=epochs,
        per_device_train_batch_size=at_once,
        gradient_accumulation_steps=accumulated,
        learning_rate=settings.learning_rate,
        lr_scheduler_type=settings.scheduler,
        warmup_steps=math.ceil(settings.warmup_ratio * steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.precision == "bfloat16",
        train_sampling_strategy="group_by_length" if settings.length_grouped else "random",
        seed=seed,
        data_seed=seed,
        use_cpu=not torch.cuda.is_available(),
        logging_steps=max(1, steps // 50),
        logging_nan_inf_filter=False,  # a loss that is not finite must show
        remove_unused_columns=False,
        save_strategy="no",  # `Checkpoints` says when
        report_to="none",
        ddp_find_unused_parameters=False,
        disable_tqdm=not sys.stderr.isatty(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
