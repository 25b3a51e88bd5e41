"""The warm-up on a part of the pool: Adam's moments and learning rates, as they were in its fine-tuning."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny import tiny_pool

from staff.errors import UserError
from staff.models.adapters import fresh_lora
from staff.models.state import ModelState
from staff.pool import Pool
from staff.scoring.gradients import gradient_parameters
from staff.training.settings import FinetuneSettings
from staff.training.stage import Finetune, read_learning_rates


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return tiny_pool(tmp_path_factory.mktemp("store"))


def test_the_moments_after_one_step_are_those_of_its_gradient(pool: Pool):
    samples = pool.slices["dev"].small  # six, in one batch
    settings = replace(pool.settings, max_grad_norm=1e9)
    training = Finetune(pool.family.small, samples, settings, 1, seed=3, moments=True)
    moments = ModelState(pool.family.small, training).load_moments(pool.store.get(training))

    model = fresh_lora(pool.family.small.load(), settings.lora, seed=3)
    parameters, total = gradient_parameters(model, "all_lora"), torch.zeros(())
    for i in range(len(samples)):
        ids, labels = (torch.tensor(values)[None] for values in (samples.row(i).astype(int), samples.labels(i)))
        total = total + model(input_ids=ids, labels=labels).loss * int(samples.answer_lengths[i])
    gradients = torch.autograd.grad(total / int(samples.answer_lengths.sum()), list(parameters.values()))
    assert moments.keys() == parameters.keys()
    for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
        first, second = moments[name]
        assert first.shape == second.shape == parameter.shape
        torch.testing.assert_close(first, 0.1 * gradient, rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(second, 0.001 * gradient.square(), rtol=2e-3, atol=1e-12)
    assert any(gradient.any() for gradient in gradients)


def test_moments_lie_beside_every_epochs_adapter_and_only_where_they_are_asked_for(pool: Pool):
    warmup, other = pool.store.get(pool.training("warmup")), pool.store.get(pool.training("small"))
    kept = sorted(
        str(file.relative_to(warmup.path / "epochs")) for file in warmup.path.glob("epochs/*/*.safetensors")
    )
    assert kept == ["1/adapter_model.safetensors", "1/moments.safetensors", "2/moments.safetensors"]
    assert not list(other.path.rglob("moments.safetensors"))
    first, last = (
        ModelState(pool.family.target, pool.training("warmup"), k).load_moments(warmup) for k in (1, None)
    )
    assert all(not first[name][1].equal(last[name][1]) for name in first)


def test_a_fine_tuning_is_known_by_its_moments_only_where_it_keeps_them(pool: Pool):
    training = pool.training("small")
    assert "moments" not in training.key()
    assert replace(training, moments=True).fingerprint != training.fingerprint
    with pytest.raises(UserError, match="Adam's moments are kept of adapters: they need finetune=lora, not full"):
        replace(training, settings=FinetuneSettings(kind="full"), moments=True)


def test_the_warmup_is_on_a_twentieth_of_the_pool_drawn_by_seed_and_id(pool: Pool):
    ids = set(pool.training("warmup").samples.ids)
    assert len(ids) == 2 and ids <= set(pool.ids)
    turned = np.arange(len(pool.ids))[::-1]
    part = pool.slices["pool"]
    reordered = replace(
        pool, slices={"pool": replace(part, small=part.small.take(turned), target=part.target.take(turned))}
    )
    assert reordered.training("warmup").fingerprint == pool.training("warmup").fingerprint
    assert len({tuple(replace(pool, seed=seed).training("warmup").samples.ids) for seed in range(4)}) > 2
    first = replace(part, small=part.small.take(range(21)), target=part.target.take(range(21)))
    assert len(replace(pool, slices={"pool": first}).training("warmup").samples) == 2  # 1.05, rounded up


@pytest.mark.parametrize("of", ["small", "warmup"])
def test_learning_rates_are_means_over_the_steps_of_each_epoch(pool: Pool, of: str):
    training = pool.training(of)
    log = json.loads((pool.store.get(training).path / "training.json").read_text())["log"]
    used = np.array([entry["learning_rate"] for entry in log if "learning_rate" in entry])
    steps = 5 if of == "small" else 1  # of 40 or 2 samples, 8 at once
    assert used.shape == (2 * steps,) and used.max() == pytest.approx(3e-3)
    np.testing.assert_allclose(pool.learning_rates(of), used.reshape(2, steps).mean(1))


def test_an_epoch_without_a_logged_step_gets_a_rate_between_its_neighbours(tmp_path: Path):
    steps = [{"epoch": epoch, "learning_rate": rate} for epoch, rate in ((0.5, 2.0), (1.0, 4.0), (3.0, 1.0))]
    (tmp_path / "training.json").write_text(json.dumps({"log": [*steps, {"epoch": 4.0, "train_loss": 0.1}]}))

    class Trained:
        path = tmp_path

    assert read_learning_rates(Trained(), 4).tolist() == [3, 2, 1, 1]  # type: ignore[arg-type]


def test_what_has_no_moments_or_learning_rates_is_refused_before_it_is_made(tmp_path: Path):
    pool = tiny_pool(tmp_path)
    for of in ("small", "small@1", "target"):
        with pytest.raises(UserError, match=r"optimiser's moments, and .* keeps none"):
            pool.ask("projected_gradient", of=of, adam=True)
    with pytest.raises(UserError, match="of='target': the raw model has no learning rates"):
        pool.learning_rates("target")
    with pytest.raises(UserError, match="the model 'warm' is unknown: choose one of small"):
        pool.ask("loss", of="warm")
    assert not list(tmp_path.iterdir())


def test_adams_directions_of_a_warmup_are_finite_and_not_the_gradients(pool: Pool):
    at = np.arange(3)
    plain, adam = (pool.ask("projected_gradient", of="warmup@epochs", at=at, dim=64, adam=a) for a in (False, True))
    assert plain.shape == adam.shape == (3, 2, 64) and plain.dtype == np.float32
    assert np.isfinite(adam).all() and not np.allclose(adam[:, 0], adam[:, 1])
    cosine = (plain * adam).sum(-1) / np.linalg.norm(plain, axis=-1) / np.linalg.norm(adam, axis=-1)
    assert (cosine < 0.99).all()
