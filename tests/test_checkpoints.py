"""A fine-tuning that is killed goes on from its checkpoint, and ends as if nothing had been."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.processes import wait_for
from support.tiny import SETTINGS, SPEC, difference, history, samples_of
from transformers import Trainer

from staff.runtime import preemption
from staff.store import cost
from staff.store.cost import failed_attempts
from staff.store.manifest import Artifact
from staff.store.store import Store
from staff.training import checkpoints
from staff.training.settings import FinetuneSettings
from staff.training.stage import Finetune

STEPS = 24  # of 3 epochs, and of 4 samples each


def tuning(settings: FinetuneSettings, online: str | None) -> Finetune:
    return Finetune(SPEC, samples_of(32), settings, 3, 0, online)


def tuned(store: Path, stage: Finetune) -> Artifact:
    return Store(store).get(stage)


def started(work: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A process that does this work; all of them fork from one that has imported what a training needs.

    A fork of this process, which other tests gave threads, may wait for one of them for ever.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["peft", "staff.training.trainer"])  # this file is on no path yet
    process = context.Process(target=work, args=arguments)
    process.start()
    return process


def tune_and_stop(store: Path, at: int, stage: Finetune, pause: float) -> None:
    """Tune until the step after `at`, of which there is a checkpoint, and wait there."""
    step = Trainer.training_step

    def stop(self: Trainer, *args, **kwargs):
        checkpoints.INTERVAL = 0.0 if self.state.global_step >= at - 2 else 600.0
        if self.state.global_step == at:
            (store / "at work").touch()
            time.sleep(600)
        time.sleep(pause)
        return step(self, *args, **kwargs)

    Trainer.training_step = stop
    cost.BEAT = 0.05
    tuned(store, stage)


def killed(
    store: Path, at: int, stage: Finetune, until: Callable[[], bool] = lambda: True, pause: float = 0.0
) -> None:
    """Tune in a process that is killed in the step after `at`."""
    process = started(tune_and_stop, store, at, stage, pause)
    wait_for(store / "at work", seconds=120)
    while not until():
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (store / "at work").unlink()


def steps(artefact: Artifact) -> list[dict]:
    return history(artefact.path)["log"][:-1]  # the last entry tells times


@pytest.mark.parametrize(
    ("settings", "online"),
    [
        (SETTINGS, "last_v_b"),
        (
            replace(SETTINGS, length_grouped=True, device_batch_size=1, lora=replace(SETTINGS.lora, dropout=0.1)),
            None,
        ),
        (replace(SETTINGS, kind="full", learning_rate=1e-4), None),
    ],
    ids=["in random order, scoring online", "grouped by length, with dropout, in parts", "all weights"],
)
def test_killed_twice_it_ends_with_the_same_weights_log_and_scores(tmp_path, caplog, settings, online):
    caplog.set_level("INFO")
    stage = tuning(settings, online)
    undisturbed = tuned(tmp_path / "undisturbed", stage)
    assert not list((tmp_path / "undisturbed/checkpoints").glob("*")), "it took no time"

    killed(tmp_path / "killed", 8, stage)  # where an epoch ends
    (checkpoint,) = (tmp_path / "killed").glob("checkpoints/*/checkpoint-*")
    shutil.copytree(checkpoint, torn := checkpoint.with_name("checkpoint-9"))
    (torn / "manifest.json").write_text("{")
    killed(tmp_path / "killed", 19, stage)  # in the midst of the last
    resumed = tuned(tmp_path / "killed", stage)

    assert "resuming after step 19" in caplog.text
    files = sorted(file.relative_to(undisturbed.path) for file in undisturbed.path.rglob("*.safetensors"))
    assert files == sorted(file.relative_to(resumed.path) for file in resumed.path.rglob("*.safetensors"))
    assert len(files) == (1 if settings.kind == "full" else 3) + bool(online), (
        "the model, at the end of every epoch"
    )
    for file in files:
        assert difference(load_file(undisturbed.path / file), load_file(resumed.path / file)) < 1e-6
    first, second = steps(undisturbed), steps(resumed)
    assert [entry["step"] for entry in second] == list(range(1, STEPS + 1))
    assert [entry["loss"] for entry in second] == pytest.approx([entry["loss"] for entry in first])
    assert resumed.cost.flops == undisturbed.cost.flops
    assert not list((tmp_path / "killed/checkpoints").glob("*"))


def test_what_a_checkpoint_keeps_is_charged_to_the_artefact_and_the_rest_is_lost(tmp_path):
    stage = tuning(SETTINGS, None)
    attempt = Store(tmp_path).attempts(stage)
    killed(tmp_path, 12, stage, lambda: failed_attempts(attempt)[0]["seconds"] > 0.5, pause=0.1)
    (noted,) = failed_attempts(attempt)
    (checkpoint,) = tmp_path.glob("checkpoints/*/checkpoint-*")
    kept = json.loads((checkpoint / "manifest.json").read_text())
    resumed = tuned(tmp_path, stage)
    (failed,) = json.loads((resumed.path / "manifest.json").read_text())["failed_attempts"]
    assert failed == noted and 0.5 < failed["seconds"] < kept["cost"]["seconds"]
    assert resumed.cost.seconds > kept["cost"]["seconds"] > 1.2
    assert history(resumed.path)["seconds"] > kept["step_seconds"] > 1.2


def tune_slowly(store: Path, stage: Finetune) -> None:
    """Tune as the application does, with a pause in every step, and say when the training is under way."""
    step = Trainer.training_step

    def slow(self: Trainer, *args, **kwargs):
        (store / "at work").touch()
        time.sleep(0.02)
        return step(self, *args, **kwargs)

    Trainer.training_step = slow
    preemption.listen()
    tuned(store, stage)


def test_a_signal_saves_a_checkpoint_at_once_and_the_exit_status_says_resumable(tmp_path):
    """More than a hundred steps are logged every second step: a signal may divide what an entry averages."""
    stage = replace(tuning(SETTINGS, "last_v_b"), epochs=13)
    undisturbed = tuned(tmp_path / "undisturbed", stage)
    last = 0
    for how in (signal.SIGTERM, signal.SIGUSR1):
        process = started(tune_slowly, tmp_path / "preempted", stage)
        wait_for(tmp_path / "preempted/at work", seconds=120)
        time.sleep(0.3)
        assert process.pid is not None
        os.kill(process.pid, how)
        process.join(timeout=60)
        assert process.exitcode == preemption.RESUMABLE == 75
        (tmp_path / "preempted/at work").unlink()
        (checkpoint,) = (tmp_path / "preempted").glob("checkpoints/*/checkpoint-*")
        before, last = last, int(checkpoint.name.rpartition("-")[2])
        assert before < last < 13 * STEPS // 3
    resumed = tuned(tmp_path / "preempted", stage)
    for file in ("adapter_model.safetensors", "online.safetensors"):
        assert difference(load_file(undisturbed.path / file), load_file(resumed.path / file)) < 1e-6
    first, second = steps(undisturbed), steps(resumed)
    assert [entry["step"] for entry in second] == [entry["step"] for entry in first]
    assert [entry["loss"] for entry in second] == pytest.approx([entry["loss"] for entry in first], rel=1e-4)
    (failed, _) = json.loads((resumed.path / "manifest.json").read_text())["failed_attempts"]
    assert failed["error"] == "Preempted" and failed["seconds"] < 1, "what the checkpoint keeps is not lost"


def test_a_signal_in_the_last_step_loses_nothing(tmp_path, monkeypatch):
    stage, step = tuning(SETTINGS, None), Trainer.training_step
    undisturbed = tuned(tmp_path / "undisturbed", stage)

    def signalled(self: Trainer, *args, **kwargs):
        if self.state.global_step == STEPS - 1:
            signal.raise_signal(signal.SIGUSR1)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", signalled)
    heard = []
    usual = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        with pytest.raises(preemption.Preempted):
            tuned(tmp_path / "preempted", stage)
    finally:
        signal.signal(signal.SIGUSR1, usual)
    assert heard == [signal.SIGUSR1], "which takes its usual course once the checkpoint is saved"
    resumed = tuned(tmp_path / "preempted", stage)
    weights = "adapter_model.safetensors"
    assert difference(load_file(undisturbed.path / weights), load_file(resumed.path / weights)) < 1e-6
