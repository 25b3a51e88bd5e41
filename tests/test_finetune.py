"""Fine-tuning: the loss on the answer tokens, the same whatever is left out to save work."""

import json
import math
import shutil
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from support.tiny import SETTINGS, SPEC, difference, farthest, history, samples_of, tuned, weights_of
from transformers.models.llama.modeling_llama import LlamaMLP

from staff.data.tokens import TokenizedSamples
from staff.errors import UserError
from staff.models.adapters import LoraSpec, fresh_lora, load_trained
from staff.models.spec import ModelSpec
from staff.scoring.passes import score_samples
from staff.scoring.positions import token_losses
from staff.signals.effort import Effort
from staff.store.cost import Meter
from staff.training import trainer
from staff.training.reports import MIN_STEPS
from staff.training.settings import SCHEDULERS
from staff.training.stage import Finetune, read_online_efforts

STILL = replace(SETTINGS, learning_rate=1e-12)
"""Weights stay where they are."""


@pytest.fixture(scope="module")
def samples() -> TokenizedSamples:
    return samples_of(12)


@pytest.fixture(scope="module")
def usual(samples, tmp_path_factory) -> dict:
    """The weights of a fine-tuning as it usually is."""
    return tuned(samples, tmp_path_factory.mktemp("usual") / "tuned")


def online(samples, folder, settings, gradient) -> np.ndarray:
    tuned(samples, folder, settings, epochs=1, online=gradient)
    return read_online_efforts(Folder(folder))  # type: ignore[arg-type]


@dataclass
class Folder:
    """Stands for an artefact."""

    path: object


@pytest.mark.parametrize("gradient", ["last_v_b", "all_lora"])
def test_online_scores_are_the_efforts_of_the_weights_that_backpropagate(samples, tmp_path, gradient):
    scores = online(samples, tmp_path / "whole", STILL, gradient)
    model, effort = load_trained(SPEC, tmp_path / "whole"), Effort(gradient)
    exact = score_samples(model, samples, (effort,), batch_tokens=1000, pad_token_id=0)["effort"]
    np.testing.assert_allclose(scores, exact, rtol=1e-4)
    divided = online(samples, tmp_path / "divided", replace(STILL, device_batch_size=1), gradient)
    np.testing.assert_allclose(divided, exact, rtol=1e-4)


def test_taking_scores_online_leaves_the_weights_alone(samples, usual, tmp_path):
    assert farthest(usual, tuned(samples, tmp_path / "online", online="last_v_b")) == 0


def test_scores_online_are_of_adapters_and_no_other_fine_tuning_has_them(samples):
    with pytest.raises(
        UserError, match=r"online scores are gradients of LoRA adapters, which finetune.kind=full does not have"
    ):
        Finetune(SPEC, samples, replace(SETTINGS, kind="full"), 1, 0, "last_v_b")


def test_equal_steps_pass_over_a_coreset_as_often_as_makes_up_for_its_size(samples, tmp_path):
    settings = replace(SETTINGS, match="steps", epochs=2)
    assert settings.coreset_epochs(5, 12) == 3 and replace(settings, match="epochs").coreset_epochs(5, 12) == 2
    assert repr(settings.coreset_epochs(12, 12)) == "2", "the whole pool is fine-tuned on as by any other run"
    for pool in range(16, 400):  # the trainer rounds up
        steps = settings.steps(pool - 12)
        assert math.ceil(settings.coreset_epochs(pool - 12, pool) * steps) == 2 * settings.steps(pool)
    few = samples.take(range(7))  # 2 steps an epoch, where the pool has 3
    tuned(
        few, tmp_path / "few", replace(settings, epochs=1), epochs=replace(settings, epochs=1).coreset_epochs(7, 12)
    )
    assert history(tmp_path / "few")["steps"] == settings.steps(12) == 3


def rates(folder) -> list[float]:
    """The learning rate of every step."""
    return [entry["learning_rate"] for entry in history(folder)["log"] if "learning_rate" in entry]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_kth_of_w_warm_up_steps_has_k_of_w_parts_of_the_rate_and_the_rest_is_the_trainers(
    samples, tmp_path, scheduler
):
    settings = replace(SETTINGS, scheduler=scheduler, warmup_ratio=0.5)  # 3 steps of 6
    tuned(samples, tmp_path / "ours", settings)
    tuned(samples, tmp_path / "theirs", replace(settings, warmup_start="zero"))
    ours, theirs = rates(tmp_path / "ours"), rates(tmp_path / "theirs")
    full = [1e-3] * 6
    rising = full if scheduler == "constant" else [1e-3 / 3, 2e-3 / 3, 1e-3]
    from_zero = full if scheduler == "constant" else [0, 1e-3 / 3, 2e-3 / 3]
    assert len(ours) == 6 and ours[:3] == pytest.approx(rising[:3]) and ours[3:] == pytest.approx(theirs[3:])
    assert theirs[:3] == pytest.approx(from_zero[:3])


def test_a_fine_tuning_of_one_step_trains_and_says_that_it_is_short(samples, tmp_path, caplog):
    weights = tuned(samples.take(range(4)), tmp_path / "one", epochs=1)
    assert max(float(weight.abs().max()) for name, weight in weights.items() if "lora_B" in name) > 1e-4
    told = history(tmp_path / "one")
    assert told["steps"] == 1 and told["warnings"] == ["only 1 optimiser step, fewer than 10."]
    assert "fine-tuning small on 4 samples: only 1 optimiser step" in caplog.text


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_fine_tuning_that_moved_no_weight_says_so(samples, tmp_path, kind):
    tuned(samples.take(range(4)), tmp_path / "none", replace(SETTINGS, kind=kind, warmup_start="zero"), epochs=1)
    assert any("no trainable weight moved" in warning for warning in history(tmp_path / "none")["warnings"])


def test_a_fine_tuning_of_enough_steps_has_no_warning(samples, tmp_path):
    tuned(samples, tmp_path / "enough", epochs=math.ceil(MIN_STEPS / 3))
    assert history(tmp_path / "enough")["warnings"] == []


def test_the_end_of_every_epoch_but_the_last_is_kept_as_the_model_was_then(samples, tmp_path):
    settings = replace(SETTINGS, scheduler="constant")
    weights = {epochs: tuned(samples, tmp_path / f"{epochs}", settings, epochs=epochs) for epochs in (1, 2, 3)}
    stage = Finetune(SPEC, samples, settings, 3, 0)
    assert sorted(folder.name for folder in (tmp_path / "3/epochs").iterdir()) == ["1", "2"]
    assert not (tmp_path / "1/epochs").exists()
    for epoch in (1, 2):
        kept = stage.checkpoint(tmp_path / "3", epoch)
        assert farthest(weights_of(kept), weights[epoch]) == 0
    with pytest.raises(UserError, match="keeps no model of epoch 1: choose finetune=lora"):
        replace(stage, settings=replace(settings, kind="full")).checkpoint(tmp_path, 1)


def test_leaving_out_positions_without_labels_changes_nothing_but_the_work(samples, usual, tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "batches", lambda config: None)
    ordinary = tuned(samples, tmp_path / "ordinary")
    assert difference(usual, ordinary) < 1e-5
    assert max(float(weight.abs().max()) for name, weight in usual.items() if "lora_B" in name) > 1e-3


def test_a_tokenizer_that_pads_on_the_left_changes_nothing(samples, usual, tmp_path):
    padded_left = tmp_path / "model"
    shutil.copytree(SPEC.local, padded_left)
    settings = json.loads((padded_left / "tokenizer_config.json").read_text())
    (padded_left / "tokenizer_config.json").write_text(json.dumps({**settings, "padding_side": "left"}))
    other = tuned(samples, tmp_path / "other", spec=ModelSpec(str(padded_left)))
    assert farthest(usual, other) == 0


def test_dividing_a_batch_over_memory_changes_nothing(samples, usual, tmp_path):
    divided = replace(SETTINGS, device_batch_size=1)
    assert difference(usual, tuned(samples, tmp_path / "divided", divided)) < 1e-5
    assert divided.key() == SETTINGS.key()


@pytest.mark.parametrize("known", [True, False], ids=["sparing", "ordinary"])
def test_gradient_checkpointing_changes_nothing_but_memory_and_time(samples, usual, tmp_path, monkeypatch, known):
    if not known:
        monkeypatch.setattr(trainer, "batches", lambda config: None)
    ran, forward = [], LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda mlp, x: ran.append(mlp) or forward(mlp, x))
    again = replace(SETTINGS, gradient_checkpointing=True)
    weights = tuned(samples, tmp_path / "again", again)
    steps, blocks = 6, SPEC.config().num_hidden_layers
    assert len(ran) == steps * (2 * blocks - 1 if known else 2 * blocks), "blocks are run twice, but for the last"
    assert difference(usual, weights) < 1e-5
    assert again.key() == SETTINGS.key()


@pytest.mark.parametrize("gradient", ["last_v_b", "all_lora"])
def test_online_scores_are_the_same_under_gradient_checkpointing(samples, tmp_path, gradient):
    remembered = online(samples, tmp_path / "remembered", SETTINGS, gradient)
    again = online(samples, tmp_path / "again", replace(SETTINGS, gradient_checkpointing=True), gradient)
    np.testing.assert_allclose(again, remembered, rtol=1e-6)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(samples, usual, tmp_path):
    assert farthest(usual, tuned(samples, tmp_path / "again")) == 0
    assert farthest(usual, tuned(samples, tmp_path / "other", seed=1)) > 1e-3


def test_all_weights_can_be_tuned_and_loaded_again(samples, tmp_path):
    tuned(samples, tmp_path / "full", replace(SETTINGS, kind="full"), epochs=1)
    model = SPEC.load()
    assert farthest(model.state_dict(), load_trained(SPEC, tmp_path / "full").state_dict()) > 1e-4
    assert history(tmp_path / "full")["trainable_parameters"] == model.num_parameters()


@dataclass(frozen=True)
class Halved:
    """Half the usual loss."""

    def compute(self, logits, targets):
        return token_losses(logits, targets) / 2


def test_another_objective_is_what_is_minimised_and_belongs_to_the_key(samples, usual, tmp_path):
    settings = replace(SETTINGS, objective=Halved())
    tuned(samples, tmp_path / "usual", epochs=1)
    tuned(samples, tmp_path / "halved", settings, epochs=1)
    first, halved = (history(tmp_path / name)["log"][0]["loss"] for name in ("usual", "halved"))
    assert halved == pytest.approx(first / 2, rel=1e-4)
    assert settings.key() != SETTINGS.key()


def test_a_loss_that_is_not_finite_is_refused_with_the_learning_rate(samples, tmp_path):
    with pytest.raises(UserError, match=r"lower finetune.learning_rate=1e\+30"):
        tuned(samples, tmp_path / "wild", replace(SETTINGS, learning_rate=1e30, max_grad_norm=0.0))


def test_the_callers_random_state_is_left_alone_by_a_fresh_adapter():
    before = torch.random.get_rng_state()
    one, two = (fresh_lora(SPEC.load(), LoraSpec(4, 8), seed).state_dict() for seed in (0, 0))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert farthest(one, two) == 0


@pytest.mark.parametrize("grouped", [False, True])
def test_every_epoch_of_a_schedule_passes_over_its_own_samples_and_costs_what_these_do(
    samples, tmp_path, grouped, monkeypatch
):
    seen: list[list[int]] = []
    compute = trainer.AnswerTrainer.compute_loss

    def watched(self, model, inputs, *args, **kwargs):
        seen.append(inputs["row"].tolist())
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(trainer.AnswerTrainer, "compute_loss", watched)
    schedule = np.array([[0, 2, 4, 6, 8, 10], [1, 2, 3, 4, 5, 11], [0, 1, 2, 9, 10, 11]])
    stage = Finetune(SPEC, samples, replace(SETTINGS, length_grouped=grouped), 2.5, 0, schedule=schedule)
    with Meter() as meter:
        stage.run(tmp_path, meter)
    assert [len(batch) for batch in seen] == [4, 2, 4, 2, 4]
    assert [sorted(seen[i] + seen[i + 1]) for i in (0, 2)] == schedule[:2].tolist()
    assert set(seen[4]) < set(schedule[2])
    tokens = [samples.lengths[rows].sum() for rows in schedule]
    assert meter.cost.tokens_backward == round(tokens[0] + tokens[1] + tokens[2] / 2)
    trained = history(tmp_path)["trainable_parameters"]
    apart = [Finetune(SPEC, samples.take(rows), SETTINGS, 1, 0).flops(trained) for rows in schedule]
    assert stage.flops(trained) == pytest.approx(apart[0] + apart[1] + apart[2] / 2)


def test_a_schedule_belongs_to_the_key_and_must_reach_to_the_last_epoch(samples):
    plain, scheduled = (Finetune(SPEC, samples, SETTINGS, 2, 0, schedule=s) for s in (None, np.array([[0], [1]])))
    assert plain.key() == {k: v for k, v in scheduled.key().items() if k != "schedule"} != scheduled.key()
    with pytest.raises(UserError, match=r"takes 3 epochs, .* has samples for 2: set method\.epochs=3"):
        Finetune(SPEC, samples, SETTINGS, 2.5, 0, schedule=np.array([[0], [1]]))
