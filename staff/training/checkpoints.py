"""Checkpoints, from which a long fine-tuning resumes after it was killed.

A checkpoint has the files of transformers' Trainer: weights as safetensors; optimizer, scheduler and random states
as torch files, which are read with `weights_only=True`. In addition it has the random state at the start of the
epoch, which determines the order of its samples; the scores taken online; and a manifest, written last, with
checksums and the cost so far. Checkpoints are saved by time, at steps that log the loss, so that the log can be
continued. Short trainings save none. A signal to end (`staff.runtime.preemption`) saves one after the step that is
running, and stops the training.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from staff.errors import UserError
from staff.models.state import MOMENTS
from staff.runtime import processes
from staff.store.cost import Meter
from staff.store.manifest import check_contents, check_sizes, read_manifest, write_manifest
from staff.training.online import OnlineEfforts

INTERVAL = 300.0
"""Seconds between two checkpoints."""

log = logging.getLogger(__name__)


class Checkpoints(TrainerCallback):
    """Tells a Trainer when to save, and adds to its checkpoints what else is needed to resume.

    Args:
        folder: the Trainer's `output_dir`, which belongs to this training alone.
        cost: the meter of the training; the cost up to the last checkpoint is added to it.
        efforts: scores taken online, which are resumed too.
        asked_to_end: whether this process is to save a checkpoint and stop.

    Attributes:
        last: the checkpoint to resume from; None: there is none.
        stopped: whether the training was stopped before its end, in all processes.
    """

    def __init__(
        self, folder: Path, cost: Meter, efforts: OnlineEfforts | None, asked_to_end: Callable[[], bool]
    ) -> None:
        self._cost, self._efforts, self._asked_to_end = cost, efforts, asked_to_end
        self.stopped = False
        self._unfinished: dict[str, Any] | None = None
        self._before = 0.0
        self._saved = self._began = time.monotonic()
        self._epoch_began: torch.Tensor | None = None
        self.last = processes.broadcast_from_main(lambda: _last(folder))
        if self.last is not None:
            self._resume(self.last)

    @property
    def seconds(self) -> float:
        """Seconds of all steps, before and after resuming, without loading and saving the model."""
        return self._before + time.monotonic() - self._began

    def _resume(self, checkpoint: Path) -> None:
        manifest, artifact = read_manifest(checkpoint)
        log.info("resuming after step %d, %.0f s", _step(checkpoint), artifact.cost.seconds)
        self._cost.resume(artifact.cost)
        self._before = manifest["step_seconds"]
        state = load_file(checkpoint / "state.safetensors")
        self._epoch_began = state["epoch_began"]
        if self._efforts is not None:
            self._efforts.squared = state["efforts"]

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._saved = self._began = time.monotonic()
        if state.log_history and state.log_history[-1]["step"] % args.logging_steps:
            self._unfinished = state.log_history.pop()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log a mean over steps that a signal has divided as one entry, as if it had not."""
        if self._unfinished is None or "loss" not in (entry := state.log_history[-1]):
            return
        before, self._unfinished = self._unfinished, None
        start = state.log_history[-2]["step"] if len(state.log_history) > 1 else 0
        first, second = before["step"] - start, entry["step"] - before["step"]
        entry["loss"] = (before["loss"] * first + entry["loss"] * second) / (first + second)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.last is not None and self._epoch_began is not None:  # the epoch that is resumed
            torch.set_rng_state(self._epoch_began)
            self.last = None
        self._epoch_began = torch.get_rng_state()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        due = control.should_log and processes.is_main_process() and time.monotonic() - self._saved >= INTERVAL
        saving, stopping = processes.all_reduce_sum(np.array([due, self._asked_to_end()], dtype=np.int64))
        self.stopped = bool(stopping)
        if self.stopped:
            log.info("asked to end: saving a checkpoint after step %d of %d", state.global_step, state.max_steps)
            control.should_log = control.should_training_stop = True
        control.should_save = bool(saving) or self.stopped

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = False  # the end of an epoch would save the same step again
        assert self._epoch_began is not None
        over = float(state.epoch).is_integer()
        kept = {"epoch_began": torch.get_rng_state() if over else self._epoch_began}
        if self._efforts is not None:
            self._efforts.all_gather()
            kept["efforts"] = self._efforts.squared
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        processes.all_gather(None)  # every process has saved its random state
        if processes.is_main_process():
            self._complete(folder, kept)
        self._saved = time.monotonic()

    def _complete(self, folder: Path, kept: dict[str, torch.Tensor]) -> None:
        save_file(kept, folder / "state.safetensors")
        (folder / "training_args.bin").unlink()  # a pickle, which is not needed
        facts = {"stage": "checkpoint", "label": folder.name, "fingerprint": "", "step_seconds": self.seconds}
        write_manifest(folder, facts, self._cost.checkpoint(), {})
        for other in set(folder.parent.glob("checkpoint-*")) - {folder}:
            shutil.rmtree(other)


class EpochAdapters(TrainerCallback):
    """Saves the adapter at the end of every epoch except the last, for signals by epoch.

    Args:
        folder: gets a folder an epoch, named 1, 2, ....
        epochs: of the whole training.
        moments: save Adam's moments as well, those of the last epoch included.
    """

    def __init__(self, folder: Path, epochs: float, moments: bool) -> None:
        self._folder, self._epochs, self._moments = folder, epochs, moments

    def on_epoch_end(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        if not processes.is_main_process() or not float(state.epoch).is_integer():  # the last one may be in part
            return
        epoch = int(state.epoch)
        folder = self._folder / str(epoch)
        if epoch < self._epochs:
            model.save_pretrained(folder)
        if self._moments:
            folder.mkdir(parents=True, exist_ok=True)
            save_file(_moments(model, optimizer), folder / MOMENTS)


def _moments(model: Any, optimizer: Any) -> dict[str, torch.Tensor]:
    """Adam's two moments of every trained parameter, by name and "exp_avg" or "exp_avg_sq".

    They are zero where no gradient came, as in layers of Mamba whose weights are read past the adapter.
    """
    names = ("exp_avg", "exp_avg_sq")
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {
        f"{name}.{moment}": optimizer.state[p].get(moment, torch.zeros_like(p))
        for name, p in trained.items()
        for moment in names
    }


def _last(folder: Path) -> Path | None:
    """The last complete checkpoint. Damaged ones after it are removed."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=_step, reverse=True):
        try:
            manifest, _ = read_manifest(checkpoint)
            check_sizes(checkpoint, manifest)
            check_contents(checkpoint, manifest)
            return checkpoint
        except (UserError, FileNotFoundError) as error:
            log.warning("not resuming from %s: %s", checkpoint, error)
            shutil.rmtree(checkpoint)
    return None


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
