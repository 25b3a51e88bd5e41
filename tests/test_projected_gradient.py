"""Projected gradients, and the warm-up whose moments and learning rates LESS takes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import vectors
from support.tiny import adapted, random_model, tiny_pool
from torch import Tensor

from baselines.less import adam_direction_official
from staff.data.tokens import TokenizedSamples
from staff.errors import UserError
from staff.models.adapters import fresh_lora
from staff.models.state import ModelState
from staff.pool import Pool
from staff.scoring import projection
from staff.scoring.flops import scoring_flops
from staff.scoring.gradients import gradient_parameters
from staff.scoring.passes import score_samples
from staff.scoring.projection import adam_direction, random_words, sign_blocks
from staff.signals import named
from staff.signals.projected_gradient import ProjectedGradient
from staff.training.settings import FinetuneSettings
from staff.training.stage import Finetune, read_learning_rates

# ---------------------------------------------------------------- projected gradients


ADAM = [case for case in vectors("less") if case.startswith("less_adam")]


def samples(n: int = 5) -> TokenizedSamples:
    rng = np.random.default_rng(0)
    prompts, answers = rng.integers(1, 20, n), rng.integers(1, 9, n)
    rows = [rng.integers(1, 61, p + a).tolist() for p, a in zip(prompts, answers, strict=True)]
    return TokenizedSamples.of_rows([f"s{i}" for i in range(n)], rows, prompts.tolist())


def moments_of(model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    torch.manual_seed(1)
    parameters = gradient_parameters(model, "all_lora")
    return {name: (0.01 * torch.randn_like(p), 1e-4 * torch.rand_like(p)) for name, p in parameters.items()}


def signs(name: str, rows: int, dim: int) -> Tensor:
    return torch.cat([block for _, block in sign_blocks(name, rows, dim)])


def by_autograd(
    model: Any, samples: TokenizedSamples, dim: int, moments: dict[str, tuple[Tensor, Tensor]] | None
) -> np.ndarray:
    """The model's own loss and one backward pass a sample, projected by the whole matrix of signs."""
    model.eval()
    parameters, rows = gradient_parameters(model, "all_lora"), []
    for i in range(len(samples)):
        ids, labels = (torch.tensor(values)[None] for values in (samples.row(i).astype(int), samples.labels(i)))
        gradients = torch.autograd.grad(model(input_ids=ids, labels=labels).loss, list(parameters.values()))
        projected = torch.zeros(dim)
        for name, gradient in zip(parameters, gradients, strict=True):
            if moments is not None:
                first, second = (moment.numpy() for moment in moments[name])
                gradient = torch.from_numpy(adam_direction_official(gradient.numpy(), first, second))
            projected += gradient.flatten() @ signs(name, gradient.numel(), dim) / dim**0.5
        rows.append(projected.numpy())
    return np.stack(rows)


@pytest.mark.filterwarnings("ignore:.*lora_bias=True")
@pytest.mark.parametrize("alone", [False, True], ids=["in batches", "one at a time"])
@pytest.mark.parametrize("adam", [False, True], ids=["plain", "adam"])
@pytest.mark.parametrize(
    ("architecture", "lora"), [("llama", {}), ("gemma3_text", {}), ("llama", {"lora_bias": True})], ids=str
)
def test_projections_are_those_of_autograds_gradients(architecture: str, lora: dict, adam: bool, alone: bool):
    model, given = adapted(random_model(architecture), **lora), samples()
    moments = moments_of(model) if adam else None
    expected = by_autograd(model, given, 70, moments)
    signal = ProjectedGradient(70, adam)
    asked = {"batch_tokens": 60, "pad_token_id": 0, "one_at_a_time": alone, "moments": moments}
    values = score_samples(model, given, [signal], **asked)["projected_gradient"]
    assert values.shape == (5, 70) and values.dtype == np.float32
    np.testing.assert_allclose(values, expected, rtol=1e-4, atol=2e-5 * np.abs(expected).max())


def test_other_signals_come_out_of_the_same_pass():
    model, given = adapted(random_model()), samples()
    asked = {"batch_tokens": 60, "pad_token_id": 0}
    together = score_samples(model, given, [ProjectedGradient(8), named("effort", parameters="all_lora")], **asked)
    for name, values in score_samples(model, given, [ProjectedGradient(8)], **asked).items():
        np.testing.assert_allclose(values, together[name], rtol=1e-5)
    assert together["effort"].shape == (5,)


def test_small_blocks_of_signs_change_nothing(monkeypatch: pytest.MonkeyPatch):
    whole = signs("a weight", 50, 70)
    monkeypatch.setattr(projection, "BLOCK_SIGNS", 7 * 70)
    blocks = list(sign_blocks("a weight", 50, 70))
    assert [(start, len(block)) for start, block in blocks] == [(k, min(7, 50 - k)) for k in range(0, 50, 7)]
    assert torch.cat([block for _, block in blocks]).equal(whole)


def test_inner_products_are_right_on_average_and_as_near_as_the_dimensions_allow():
    rng, dim = np.random.default_rng(0), 32
    g, h = rng.normal(size=(2, 40))
    projected = [(np.stack([g, h]) @ signs(f"draw {k}", 40, dim).numpy() / dim**0.5) for k in range(3000)]
    products = np.array([a @ b for a, b in projected])
    variance = (g @ g * (h @ h) + (g @ h) ** 2 - 2 * (g**2 @ h**2)) / dim
    assert products.mean() == pytest.approx(g @ h, abs=4 * (variance / 3000) ** 0.5)
    assert products.var() == pytest.approx(variance, rel=0.15)


def test_signs_are_fair_and_independent_between_rows_columns_and_parameters():
    one, other = signs("one", 512, 512), signs("other", 512, 512)
    assert set(one.unique().tolist()) == {-1.0, 1.0}
    for sums in (one.mean(), (one * other).mean(), (one[1:] * one[:-1]).mean(), (one[:, 1:] * one[:, :-1]).mean()):
        assert abs(float(sums)) < 4 / 512
    off_diagonal = (one @ one.T)[~torch.eye(512, dtype=torch.bool)]
    assert off_diagonal.abs().max() < 6 * 512**0.5


def split_mix(state: int) -> int:
    """The word that SplitMix64 makes of a state, in integers without bounds."""
    z = state % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_random_words_are_those_of_splitmix_from_wherever_they_are_read():
    origin = int.from_bytes(hashlib.blake2b(b"a weight", digest_size=8).digest(), "little")
    expected = [split_mix(origin + (i + 1) * 0x9E3779B97F4A7C15) for i in range(50)]
    assert [word % 2**64 for word in random_words("a weight", 0, 50).tolist()] == expected
    assert [word % 2**64 for word in random_words("a weight", 30, 20).tolist()] == expected[30:]


@pytest.mark.parametrize("case", ADAM)
def test_adams_direction_is_that_of_the_released_code(case: str):
    recorded = vectors("less")[case]
    grad, m, v, adam = (torch.tensor(recorded[name]) for name in ("grad", "m", "v", "adam"))
    torch.testing.assert_close(adam_direction(grad, m, v), adam, rtol=1e-6, atol=1e-6)


def test_the_projection_is_counted():
    model, lengths = adapted(random_model()), np.array([20, 30])
    flops = {dim: scoring_flops(model, lengths, np.array([4, 5]), [ProjectedGradient(dim)]) for dim in (64, 128)}
    parameters = sum(p.numel() for p in gradient_parameters(model, "all_lora").values())
    assert flops[128] - flops[64] == 2 * 2 * 64 * parameters


def test_dimensions_that_are_no_number_above_zero_are_refused():
    for dim in (0, 2.5, True):
        with pytest.raises(UserError, match=f"dim={dim} of the signal 'projected_gradient' must be a whole number"):
            named("projected_gradient", dim=dim)


# ---------------------------------------------------------------- the warm-up


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
    with pytest.raises(
        UserError, match=r"of=warmup keeps Adam's moments, finetune.kind=full does not: set finetune=lora"
    ):
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
