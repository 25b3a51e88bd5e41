"""Settings of fine-tuning."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from staff.errors import UserError
from staff.models.adapters import LoraSpec
from staff.models.spec import PRECISIONS, QUANTIZATIONS
from staff.store.stage import plain
from staff.training.objective import Objective, Supervised

SCHEDULERS = ("cosine", "linear", "constant", "constant_with_warmup")
WARMUP_STARTS = ("first_step", "zero")
MATCHES = ("epochs", "steps")


@dataclass(frozen=True)
class FinetuneSettings:
    """How models are fine-tuned. Defaults are the preset `lora`; conf/finetune/lora.yaml gives their sources.

    Attributes:
        kind: "lora", or "full" for all weights.
        batch_size: samples per optimiser step, over all devices.
        device_batch_size: samples in a forward pass of one device, at most; gradients are accumulated.
        epochs: epochs of the target.
        small_epochs: epochs T of the small model, on the whole pool.
        match: what fine-tuning on a coreset has in common with fine-tuning on the whole pool: the number of
            "epochs", or of optimiser "steps", which takes more epochs.
        scheduler: the learning rate after warm-up; one of `SCHEDULERS`, as in transformers.
        warmup_ratio: fraction of warm-up steps, rounded up to whole steps.
        warmup_start: the start of warm-up. With "first_step" the k-th of w warm-up steps has k / w of the learning
            rate. With "zero", as in transformers and the authors' code, it has (k - 1) / w, so that the first step
            changes nothing.
        max_length: cut-off in tokens; a sample that does not fit is refused or dropped (task.too_long).
        precision: "float32", or "bfloat16" for autocast.
        length_grouped: whether batches have samples of similar length, for less padding.
        quantization: None, or "nf4" for frozen weights in 4 bits (QLoRA, see `staff.models.spec.ModelSpec`).
        gradient_checkpointing: whether blocks are recomputed in the backward pass: less memory, about a third more
            time, the same weights.
        fsdp: whether the models' weights are sharded over the processes of a run (FSDP2), in scoring and generation
            too, for a target that does not fit on one device.
        objective: the loss (`staff.training.objective`).
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
    objective: Objective = field(default_factory=Supervised)

    def __post_init__(self) -> None:
        if self.kind not in ("lora", "full"):
            raise UserError(f"finetune.kind={self.kind!r} is unknown: choose lora or full.")
        if not isinstance(self.lora, LoraSpec):
            raise UserError(f"finetune.lora={self.lora!r} must have rank, alpha, dropout and targets.")
        if self.precision not in PRECISIONS:
            raise UserError(f"finetune.precision={self.precision!r}: choose {' or '.join(PRECISIONS)}.")
        if self.quantization not in (None, *QUANTIZATIONS):
            raise UserError(f"finetune.quantization={self.quantization!r}: choose null or {QUANTIZATIONS[0]}.")
        if self.quantization and self.kind != "lora":
            raise UserError(f"finetune.quantization={self.quantization} is for finetune.kind=lora: frozen weights.")
        if self.fsdp and (self.quantization or self.kind != "lora"):
            raise UserError("finetune.fsdp=true shards frozen weights in full precision: choose finetune=lora.")
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
        """The fields that determine the result, as JSON holds them.

        Epochs are part of the stage's key, and quantization of the model's. The layout of batches and weights in
        memory changes nothing except rounding.
        """
        memory = ("device_batch_size", "gradient_checkpointing", "fsdp")
        elsewhere = (*memory, "epochs", "small_epochs", "match", "quantization")
        return {k: v for k, v in plain(self).items() if k not in elsewhere}

    def steps(self, samples: int) -> int:
        """Optimiser steps per epoch."""
        return math.ceil(samples / self.batch_size)

    def on_each_device(self, devices: int) -> tuple[int, int]:
        """Samples per forward pass of a device, and forward passes per optimiser step.

        Raises:
            UserError: the samples of a step cannot be divided evenly.
        """
        share, left = divmod(self.batch_size, devices)
        if left or share % min(self.device_batch_size, share):
            raise UserError(
                f"finetune.batch_size={self.batch_size} cannot be divided among {devices} processes with "
                f"finetune.device_batch_size={self.device_batch_size}: start a number of processes that "
                "divides the batch, and choose a device_batch_size that divides the samples of each."
            )
        at_once = min(self.device_batch_size, share)
        return at_once, share // at_once

    def coreset_epochs(self, coreset: int, pool: int) -> float:
        """Epochs of fine-tuning on a coreset, given its size and the pool's. May be a fraction."""
        if self.match == "epochs":
            return self.epochs
        wanted, steps = self.epochs * self.steps(pool), self.steps(coreset)
        if wanted % steps == 0:
            return wanted // steps
        epochs = wanted / steps
        # The trainer rounds up the number of steps, so a rounding error here would add one.
        return epochs if math.ceil(epochs * steps) == wanted else math.nextafter(epochs, 0)
