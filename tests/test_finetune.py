"""Fine-tuning: the loss on the answer tokens, the same whatever is left out to save work."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file as load_numpy
from safetensors.torch import load_file
from transformers.models.llama.modeling_llama import LlamaMLP

import staff.trainer
from staff.adapters import load_tuned
from staff.cost import Meter
from staff.data import Sample
from staff.errors import UserError
from staff.finetune import SCHEDULERS, FinetuneSettings, finetune
from staff.models import LoraSpec, ModelSpec
from staff.scoring import Asked, score_samples
from staff.tokens import TokenizedSamples, tokenize
from staff.training_warnings import MIN_STEPS

SPEC = ModelSpec("pkg://staff/assets/tiny/small")
SETTINGS = FinetuneSettings(
    kind="lora",
    lora=LoraSpec(8, 16),
    learning_rate=1e-3,
    batch_size=4,
    device_batch_size=4,
    epochs=1,
    small_epochs=1,
    match="epochs",
    scheduler="cosine",
    warmup_ratio=0.1,
    weight_decay=0.0,
    max_grad_norm=1.0,
    max_length=512,
    precision="float32",
    length_grouped=False,
)


@pytest.fixture(scope="module")
def samples() -> TokenizedSamples:
    rows = [Sample(str(i), f"Say {i} twice:" + " please" * i, f" {i} and {i}" * (1 + i % 3), ()) for i in range(12)]
    return tokenize(rows, SPEC.tokenizer())


def tuned(
    samples: TokenizedSamples,
    folder: Path,
    settings: FinetuneSettings = SETTINGS,
    seed: int = 0,
    spec: ModelSpec = SPEC,
) -> dict:
    folder.mkdir()
    with Meter() as meter:
        finetune(spec, samples, settings, 2, seed, folder, meter)
    assert meter.cost.tokens_backward == 2 * samples.lengths.sum() and meter.cost.flops > 0
    return load_file(folder / "adapter_model.safetensors")


def online(samples: TokenizedSamples, folder: Path, settings: FinetuneSettings, gradient: str) -> np.ndarray:
    folder.mkdir()
    finetune(SPEC, samples, settings, 1, 0, folder, Meter(), gradient)
    return load_numpy(folder / "online.safetensors")["effort"]


@pytest.mark.parametrize("gradient", ["last_v_b", "all_lora"])
def test_online_scores_are_the_efforts_of_the_weights_that_backpropagate(samples, tmp_path, gradient):
    still = replace(SETTINGS, learning_rate=1e-12)  # weights that stay where they are
    scores = online(samples, tmp_path / "whole", still, gradient)
    model = load_tuned(SPEC, tmp_path / "whole", "lora")
    asked = Asked(("effort",), gradient=gradient)
    exact = score_samples(model, samples, asked, batch_tokens=1000, pad_token_id=0)["effort"]
    np.testing.assert_allclose(scores, exact, rtol=1e-4)
    divided = online(samples, tmp_path / "divided", replace(still, device_batch_size=1), gradient)
    np.testing.assert_allclose(divided, exact, rtol=1e-4)


def test_taking_scores_online_leaves_the_weights_alone(samples, tmp_path):
    plain = tuned(samples, tmp_path / "plain")
    (tmp_path / "online").mkdir()
    finetune(SPEC, samples, SETTINGS, 2, 0, tmp_path / "online", Meter(), "last_v_b")
    assert far(plain, load_file(tmp_path / "online" / "adapter_model.safetensors")) == 0


def test_equal_steps_pass_over_a_coreset_as_often_as_makes_up_for_its_size(samples, tmp_path):
    settings = replace(SETTINGS, match="steps", epochs=2)
    assert settings.coreset_epochs(5, 12) == 3 and replace(settings, match="epochs").coreset_epochs(5, 12) == 2
    assert repr(settings.coreset_epochs(12, 12)) == "2", "the whole pool is fine-tuned on as by any other run"
    for pool in range(16, 400):  # the trainer rounds up
        steps = settings.steps(pool - 12)
        assert math.ceil(settings.coreset_epochs(pool - 12, pool) * steps) == 2 * settings.steps(pool)
    tuned(samples, tmp_path / "whole")
    few = samples.take(range(5))
    (tmp_path / "few").mkdir()
    finetune(SPEC, few, settings, settings.coreset_epochs(5, 12), 0, tmp_path / "few", Meter())
    logs = [json.loads((tmp_path / f / "training.json").read_text())["log"] for f in ("whole", "few")]
    assert logs[0][-1]["step"] == logs[1][-1]["step"] == 6


def rates(folder: Path) -> list[float]:
    """The learning rate of every step."""
    log = json.loads((folder / "training.json").read_text())["log"]
    return [entry["learning_rate"] for entry in log if "learning_rate" in entry]


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
    (tmp_path / "one").mkdir()
    finetune(SPEC, samples.take(range(4)), SETTINGS, 1, 0, tmp_path / "one", Meter())
    weights = load_file(tmp_path / "one" / "adapter_model.safetensors")
    assert max(float(weight.abs().max()) for name, weight in weights.items() if "lora_B" in name) > 1e-4
    told = json.loads((tmp_path / "one" / "training.json").read_text())
    assert told["steps"] == 1 and told["warnings"] == ["only 1 optimiser step, fewer than 10."]
    assert "fine-tuning small on 4 samples: only 1 optimiser step" in caplog.text


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_fine_tuning_that_moved_no_weight_says_so(samples, tmp_path, kind):
    (tmp_path / "none").mkdir()
    settings = replace(SETTINGS, kind=kind, warmup_start="zero")
    finetune(SPEC, samples.take(range(4)), settings, 1, 0, tmp_path / "none", Meter())
    assert any("no trainable weight moved" in w for w in warnings(tmp_path / "none"))


def test_a_fine_tuning_of_enough_steps_has_no_warning(samples, tmp_path):
    (tmp_path / "enough").mkdir()
    finetune(SPEC, samples, SETTINGS, math.ceil(MIN_STEPS / 3), 0, tmp_path / "enough", Meter())
    assert warnings(tmp_path / "enough") == []


def warnings(folder: Path) -> list[str]:
    return json.loads((folder / "training.json").read_text())["warnings"]


def far(first: dict, second: dict) -> float:
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def test_leaving_out_positions_without_labels_changes_nothing_but_the_work(samples, tmp_path, monkeypatch):
    sparing = tuned(samples, tmp_path / "sparing")
    monkeypatch.setattr(staff.trainer, "ARCHITECTURES", ())
    ordinary = tuned(samples, tmp_path / "ordinary")
    assert far(sparing, ordinary) < 1e-5
    assert max(float(weight.abs().max()) for name, weight in sparing.items() if "lora_B" in name) > 1e-3


def test_a_tokenizer_that_pads_on_the_left_changes_nothing(samples, tmp_path):
    padded_left = tmp_path / "model"
    shutil.copytree(SPEC.local, padded_left)
    settings = json.loads((padded_left / "tokenizer_config.json").read_text())
    (padded_left / "tokenizer_config.json").write_text(json.dumps({**settings, "padding_side": "left"}))
    usual = tuned(samples, tmp_path / "usual")
    other = tuned(samples, tmp_path / "other", spec=ModelSpec(str(padded_left)))
    assert far(usual, other) == 0


def test_dividing_a_batch_over_memory_changes_nothing(samples, tmp_path):
    whole = tuned(samples, tmp_path / "whole")
    divided = tuned(samples, tmp_path / "divided", replace(SETTINGS, device_batch_size=1))
    assert far(whole, divided) < 1e-5


@pytest.mark.parametrize("known", [True, False], ids=["sparing", "ordinary"])
def test_gradient_checkpointing_changes_nothing_but_memory_and_time(samples, tmp_path, monkeypatch, known):
    remembered = tuned(samples, tmp_path / "remembered")
    if not known:
        monkeypatch.setattr(staff.trainer, "ARCHITECTURES", ())
    ran, forward = [], LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda mlp, x: ran.append(mlp) or forward(mlp, x))
    again = replace(SETTINGS, gradient_checkpointing=True)
    weights = tuned(samples, tmp_path / "again", again)
    steps, blocks = 6, SPEC.config().num_hidden_layers
    assert len(ran) == steps * (2 * blocks - 1 if known else 2 * blocks), "blocks are run twice, but for the last"
    assert far(remembered, weights) < (1e-6 if known else 1e-5)
    assert again.key() == SETTINGS.key()


@pytest.mark.parametrize("gradient", ["last_v_b", "all_lora"])
def test_online_scores_are_the_same_under_gradient_checkpointing(samples, tmp_path, gradient):
    remembered = online(samples, tmp_path / "remembered", SETTINGS, gradient)
    again = online(samples, tmp_path / "again", replace(SETTINGS, gradient_checkpointing=True), gradient)
    np.testing.assert_allclose(again, remembered, rtol=1e-6)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(samples, tmp_path):
    first, again = tuned(samples, tmp_path / "first"), tuned(samples, tmp_path / "again")
    other = tuned(samples, tmp_path / "other", seed=1)
    assert far(first, again) == 0 and far(first, other) > 1e-3


def test_all_weights_can_be_tuned_and_loaded_again(samples, tmp_path):
    tmp_path.joinpath("full").mkdir()
    with Meter() as meter:
        finetune(SPEC, samples, replace(SETTINGS, kind="full"), 1, 0, tmp_path / "full", meter)
    before, after = SPEC.load().state_dict(), load_tuned(SPEC, tmp_path / "full", "full").state_dict()
    assert far(before, after) > 1e-4
    log = json.loads((tmp_path / "full/training.json").read_text())
    assert log["trainable_parameters"] == SPEC.load().num_parameters()


def test_a_loss_that_is_not_finite_is_refused_with_the_learning_rate(samples, tmp_path):
    with pytest.raises(UserError, match=r"lower finetune.learning_rate=1e\+30"):
        tuned(samples, tmp_path / "wild", replace(SETTINGS, learning_rate=1e30, max_grad_norm=0.0))


def test_the_callers_random_state_is_left_alone_by_a_fresh_adapter():
    from staff.adapters import fresh_lora

    before = torch.random.get_rng_state()
    one, two = (fresh_lora(SPEC.load(), LoraSpec(4, 8), seed).state_dict() for seed in (0, 0))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert far(one, two) == 0
