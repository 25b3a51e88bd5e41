"""A fine-tuning that is killed goes on from its checkpoint, and ends as if nothing had been."""

import json
import multiprocessing
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_finetune import SETTINGS, SPEC, far
from transformers import Trainer

from staff import attempts, checkpoints
from staff.artifacts import Artifact, Store
from staff.data import Sample
from staff.finetune import FinetuneSettings, finetuned
from staff.tokens import TokenizedSamples, tokenize

STEPS = 24  # of 3 epochs, and of 4 samples each
ROWS = [Sample(str(i), f"Say {i} twice:" + " please" * (7 * i % 32), f" {i} and {i}", ()) for i in range(32)]


@pytest.fixture(scope="module")
def samples() -> TokenizedSamples:
    return tokenize(ROWS, SPEC.tokenizer())


def tuned(store: Path, samples: TokenizedSamples, settings: FinetuneSettings, online: str | None) -> Artifact:
    return finetuned(Store(store), SPEC, samples, settings, 3, 0, online)


def killed(store: Path, at: int, *arguments, wait: float = 0) -> None:
    """Tune in a process that is killed in the step after `at`, of which there is a checkpoint."""

    def work() -> None:
        step = Trainer.training_step

        def stop(self: Trainer, *args, **kwargs):
            checkpoints.INTERVAL = 0.0 if self.state.global_step >= at - 2 else 600.0
            if self.state.global_step == at:
                (store / "at work").touch()
                time.sleep(600)
            return step(self, *args, **kwargs)

        Trainer.training_step = stop
        tuned(store, *arguments)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    deadline = time.monotonic() + 120
    while not (store / "at work").exists():
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(wait)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    (store / "at work").unlink()


def history(artefact: Artifact) -> list[dict]:
    return json.loads((artefact.path / "training.json").read_text())["log"][:-1]  # the last entry tells times


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
def test_killed_twice_it_ends_with_the_same_weights_log_and_scores(samples, tmp_path, caplog, settings, online):
    caplog.set_level("INFO")
    undisturbed = tuned(tmp_path / "undisturbed", samples, settings, online)
    assert not list((tmp_path / "undisturbed/checkpoints").glob("*")), "it took no time"

    killed(tmp_path / "killed", 8, samples, settings, online)  # where an epoch ends
    (checkpoint,) = (tmp_path / "killed").glob("checkpoints/*/*")
    shutil.copytree(checkpoint, torn := checkpoint.with_name("checkpoint-9"))
    (torn / "manifest.json").write_text("{")
    killed(tmp_path / "killed", 19, samples, settings, online)  # in the midst of the last
    resumed = tuned(tmp_path / "killed", samples, settings, online)

    assert "going on after step 19" in caplog.text
    for file in sorted(file.name for file in undisturbed.path.glob("*.safetensors")):
        assert far(load_file(undisturbed.path / file), load_file(resumed.path / file)) < 1e-6
    first, second = history(undisturbed), history(resumed)
    assert [entry["step"] for entry in second] == list(range(1, STEPS + 1))
    assert [entry["loss"] for entry in second] == pytest.approx([entry["loss"] for entry in first])
    assert resumed.cost.flops == undisturbed.cost.flops
    assert not list((tmp_path / "killed/checkpoints").glob("*"))


def test_what_a_checkpoint_keeps_is_charged_to_the_artefact_and_the_rest_is_lost(samples, tmp_path, monkeypatch):
    monkeypatch.setattr(attempts, "BEAT", 0.1)
    step = Trainer.training_step

    def slowly(self: Trainer, *args, **kwargs):
        time.sleep(0.1)
        return step(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", slowly)
    killed(tmp_path, 12, samples, SETTINGS, None, wait=1.0)
    resumed = tuned(tmp_path, samples, SETTINGS, None)
    (lost,) = json.loads((resumed.path / "manifest.json").read_text())["lost_attempts"]
    assert 0.5 < lost["seconds"] < 1.2
    assert resumed.cost.seconds > 2.4
    assert json.loads((resumed.path / "training.json").read_text())["seconds"] > 2.4
