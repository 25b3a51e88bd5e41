"""The stage that fine-tunes a model on samples, with the loss on their answer tokens."""

from __future__ import annotations

import io
import json
import logging
import math
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from staff.data.tokens import TokenizedSamples
from staff.errors import UserError
from staff.models.adapters import LoraSpec, fresh_lora, trained_parameters
from staff.models.flops import training_flops
from staff.models.spec import ModelSpec
from staff.models.state import MOMENTS, Training
from staff.runtime import preemption, processes
from staff.runtime.machine import without_cudnn_attention
from staff.scoring.stage import placeholder
from staff.store.cost import Meter
from staff.store.manifest import Artifact
from staff.training.settings import FinetuneSettings

if TYPE_CHECKING:
    from staff.training.online import OnlineEfforts
    from staff.training.trainer import AnswerTrainer

log = logging.getLogger(__name__)

ONLINE_SCORES = "online.safetensors"
HISTORY = "training.json"
EPOCHS = "epochs"
"""Folder of what is kept of every epoch: its adapter (the last one's lies outside), and the optimiser's moments."""


@dataclass(frozen=True)
class Finetune(Training):
    """A model fine-tuned on samples: a LoRA adapter (or all weights), and the log of its training.

    Training uses the same tokens as scoring. A long training resumes from its last checkpoint.

    Attributes:
        epochs: passes over the samples, whole or not.
        online: None, or the parameters whose gradients give every sample's effort in the last epoch
            (`staff.training.online`).
        moments: keep the optimiser's moments at the end of every epoch.
        schedule: positions in `samples` by epoch, (epochs, m), for a training on other samples in every epoch;
            None: on all of them in each.
    """

    kind: ClassVar[str] = "finetune"
    version: ClassVar[int] = 3

    spec: ModelSpec
    samples: TokenizedSamples
    settings: FinetuneSettings
    epochs: float
    seed: int
    online: str | None = None
    moments: bool = False
    schedule: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.schedule is not None and len(self.schedule) < math.ceil(self.epochs):
            raise UserError(
                f"fine-tuning takes {math.ceil(self.epochs)} epochs, and the coreset has samples for "
                f"{len(self.schedule)}: set method.epochs={math.ceil(self.epochs)}."
            )
        if self.moments and self.settings.kind != "lora":
            raise UserError(
                f"of=warmup keeps Adam's moments, finetune.kind={self.settings.kind} does not: set finetune=lora."
            )
        if self.online and self.settings.kind != "lora":
            kind = self.settings.kind
            raise UserError(
                f"online scores are gradients of LoRA adapters, which finetune.kind={kind} does not have: choose "
                "finetune=lora, or method.scores=pass."
            )

    @property
    def label(self) -> str:
        online = ", scoring online" if self.online else ""
        by_epoch = "" if self.schedule is None else f", {self.schedule.shape[1]} in every epoch"
        return f"fine-tune {self.spec.name} on {len(self.samples)} samples{by_epoch}{online}"

    @property
    def adapter(self) -> LoraSpec | None:
        return self.settings.lora if self.settings.kind == "lora" else None

    def key(self) -> dict[str, Any]:
        return {
            "model": self.spec.identity(),
            "samples": self.samples.fingerprint,
            "settings": self.settings.key(),
            "epochs": self.epochs,
            "seed": self.seed,
            "online": self.online,
            # Only where they are kept, so that every other fine-tuning is known as before there were any.
            **({"moments": True} if self.moments else {}),
            **({} if self.schedule is None else {"schedule": self.schedule.tolist()}),
        }

    def checkpoint(self, folder: Path, epoch: int) -> Path:
        if self.adapter is None:
            raise UserError(
                f"fine-tuning all weights keeps no model of epoch {epoch}: "
                "choose finetune=lora, whose adapters are kept at the end of every epoch."
            )
        return folder / EPOCHS / str(epoch)

    def moments_file(self, folder: Path, epoch: int | None) -> Path:
        return folder / EPOCHS / str(epoch or round(self.epochs)) / MOMENTS

    def run(self, folder: Path, meter: Meter, *inputs: Artifact) -> None:
        import torch

        with redirect_stdout(io.StringIO()):  # transformers prints a line where WANDB_MODE=offline
            from transformers import PrinterCallback, Trainer  # noqa: F401

        from staff.training.checkpoints import Checkpoints
        from staff.training.online import OnlineEfforts
        from staff.training.reports import checksums

        model = self.spec.load()
        adapt = self.settings.kind == "lora"
        model = fresh_lora(model, self.settings.lora, self.seed) if adapt else model.float()
        efforts = OnlineEfforts(model, self.online, len(self.samples)) if self.online else None
        work = meter.checkpoints or folder / "checkpoints"
        before = checksums(model)
        with self._trainer(model, efforts, work) as trainer, preemption.deferred() as asked_to_end:
            trainer.remove_callback(PrinterCallback)
            saved = Checkpoints(work, meter, efforts, asked_to_end)
            trainer.add_callback(saved)
            result = trainer.train(resume_from_checkpoint=saved.last and str(saved.last))
        if saved.stopped:
            raise preemption.Preempted
        seconds = saved.seconds  # those of the steps, before the model is saved
        if not math.isfinite(result.training_loss):
            raise UserError(
                f"fine-tuning {self.spec.path} ended with a loss of {result.training_loss}: lower "
                f"finetune.learning_rate={self.settings.learning_rate}."
            )
        self._count(meter, _trainable(model))
        if processes.is_main_process():
            model.save_pretrained(folder)
            if (work / EPOCHS).is_dir():
                shutil.move(work / EPOCHS, folder / EPOCHS)
        if efforts is not None:
            efforts.all_gather()
            efforts.save(folder / ONLINE_SCORES)
        self._write_history(folder, trainer.state, result, seconds, model, moved=checksums(model) != before)
        del trainer, model
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @contextmanager
    def _trainer(self, model: Any, efforts: OnlineEfforts | None, work: Path) -> Iterator[AnswerTrainer]:
        """The trainer, which shows its progress within the block."""
        from staff.training.checkpoints import EpochAdapters
        from staff.training.reports import Progress
        from staff.training.trainer import AnswerTrainer, Rows, checkpoint_blocks

        shown = Progress(self.spec.name, len(self.samples))
        callbacks: list[Any] = [shown]
        if self.adapter is not None:
            callbacks.append(EpochAdapters(work / EPOCHS, self.epochs, self.moments))
        if self.settings.gradient_checkpointing:
            checkpoint_blocks(model)
        trainer = AnswerTrainer(
            model=model,
            tokenizer=self.spec.tokenizer(),
            ids=self.samples.ids,
            objective=self.settings.objective,
            efforts=efforts,
            schedule=self.schedule,
            warmup_start=self.settings.warmup_start,
            args=self.training_arguments(work),
            train_dataset=Rows(self.samples),
            callbacks=callbacks,
        )
        with closing(shown), without_cudnn_attention():
            yield trainer

    def estimate(self, folder: Path, meter: Meter, *inputs: Artifact) -> None:
        self._count(meter, trained_parameters(self.spec, self.adapter))
        if self.online:
            from safetensors.numpy import save_file

            save_file({"effort": placeholder(len(self.samples), self.label)}, folder / ONLINE_SCORES)
        log = [{"epoch": k, "learning_rate": self.settings.learning_rate} for k in range(1, int(self.epochs) + 1)]
        (folder / HISTORY).write_text(json.dumps({"log": log}))

    def flops(self, trained: int) -> float:
        """FLOPs of all epochs, with this number of trained parameters.

        Logits are counted at label positions. The last block is counted at all positions, though it runs at fewer.
        """
        adapter_parameters = None if self.adapter is None else trained
        return sum(
            part
            * training_flops(
                self.spec.config(),
                self.samples.lengths[rows],
                self.samples.answer_lengths[rows],
                adapter_parameters=adapter_parameters,
            )
            for rows, part in self._passes()
        )

    def _passes(self) -> list[tuple[Any, float]]:
        """The samples that are passed over, and how often; a last epoch may be in part."""
        if self.schedule is None:
            return [(slice(None), self.epochs)]
        return [(rows, min(1.0, self.epochs - k)) for k, rows in enumerate(self.schedule) if k < self.epochs]

    def _count(self, meter: Meter, trained: int) -> None:
        tokens = round(sum(int(self.samples.lengths[rows].sum()) * part for rows, part in self._passes()))
        meter.add(flops=self.flops(trained), tokens_forward=tokens, tokens_backward=tokens)

    def _write_history(
        self, folder: Path, state: Any, result: Any, seconds: float, model: Any, moved: bool
    ) -> None:
        from staff.training.reports import training_warnings

        warnings = training_warnings(state.global_step, moved)
        for warning in warnings:
            log.warning("fine-tuning %s on %d samples: %s", self.spec.name, len(self.samples), warning)
        history = {
            "seconds": seconds,
            "steps": state.global_step,
            "trainable_parameters": _trainable(model),
            "loss": result.training_loss,
            "warnings": warnings,
            "log": state.log_history,
        }
        (folder / HISTORY).write_text(json.dumps(history, indent=1))

    def training_arguments(self, checkpoints: Path) -> Any:
        """The `TrainingArguments` of these settings."""
        import torch
        from transformers import TrainingArguments

        settings = self.settings
        size = len(self.samples) if self.schedule is None else self.schedule.shape[1]
        steps = math.ceil(settings.steps(size) * self.epochs)
        at_once, accumulated = settings.on_each_device(processes.world_size())
        return TrainingArguments(
            output_dir=str(checkpoints),
            num_train_epochs=self.epochs,
            per_device_train_batch_size=at_once,
            gradient_accumulation_steps=accumulated,
            learning_rate=settings.learning_rate,
            lr_scheduler_type=settings.scheduler,
            warmup_steps=math.ceil(settings.warmup_ratio * steps),
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            bf16=settings.precision == "bfloat16",
            train_sampling_strategy="group_by_length" if settings.length_grouped else "random",
            seed=self.seed,
            data_seed=self.seed,
            use_cpu=not torch.cuda.is_available(),
            logging_steps=max(1, steps // 50),
            logging_nan_inf_filter=False,  # so that the log shows losses that are not finite
            remove_unused_columns=False,
            save_strategy="no",  # `Checkpoints` saves
            report_to="none",
            ddp_find_unused_parameters=False,
            disable_tqdm=True,  # `Progress` shows the steps
            dataloader_pin_memory=torch.cuda.is_available(),
        )


def read_online_efforts(trained: Artifact) -> np.ndarray:
    """The efforts that `Finetune` stored with `online`, (N,) float64."""
    from safetensors.numpy import load_file

    return load_file(trained.path / ONLINE_SCORES)["effort"]


def read_learning_rates(trained: Artifact, epochs: int) -> np.ndarray:
    """The mean learning rate of each epoch of a `Finetune`, (epochs,), over the steps that its log holds.

    An epoch of which it holds none, which there are only beyond fifty, is interpolated.
    """
    log = json.loads((trained.path / HISTORY).read_text())["log"]
    steps = [(math.ceil(entry["epoch"]), entry["learning_rate"]) for entry in log if "learning_rate" in entry]
    known = sorted({epoch for epoch, _ in steps})
    means = [np.mean([rate for of, rate in steps if of == epoch]) for epoch in known]
    return np.interp(np.arange(1, epochs + 1), known, means)


def _trainable(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)
