"""What a pool answers, and signals against what they are by definition."""

from __future__ import annotations

from dataclasses import replace
from decimal import Decimal, getcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import vectors
from safetensors.numpy import load_file
from support.tiny import SETTINGS, pool_of_sums, random_model

from baselines.el2n import EL2N
from staff.data.tokens import TokenizedSamples
from staff.errors import UserError
from staff.pool import Pool, Select
from staff.scoring.passes import score_samples
from staff.scoring.positions import Positions
from staff.scoring.stage import Score, ScoringSettings
from staff.selection import Coreset
from staff.signals import NAMED, named, named_all
from staff.signals.effort import Effort
from staff.signals.el2n import el2n_scores
from staff.signals.embedding import Embedding
from staff.signals.loss import Loss
from staff.speculative import Staff
from staff.store.cost import Cost, Meter
from staff.store.store import Store

# ---------------------------------------------------------------- a pool


FRESH = {"rank": 2, "alpha": 4, "targets": ["q_proj", "v_proj"]}
THREE_EPOCHS = replace(SETTINGS, small_epochs=3)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    """Whose small model is tuned for three epochs, with a validation slice of five samples."""
    return pool_of_sums(tmp_path_factory.mktemp("pool"), dev=5, settings=THREE_EPOCHS)


def test_a_signal_is_asked_of_all_samples_of_some_or_of_the_validation_slice(pool: Pool):
    everything = pool.ask("loss", of="target")
    some = pool.ask("loss", of="target", at=np.array([7, 2]))
    assert everything.shape == (12,) and np.allclose(some, everything[[7, 2]], rtol=1e-5)
    assert pool.ask("loss", of="target", view="dev").shape == (5,)
    assert pool.ask("embedding", of="target", view="dev", pooling="last_token").shape[0] == 5


def test_the_model_is_raw_or_fine_tuned_on_the_whole_pool(pool: Pool):
    losses = {of: pool.ask("loss", of=of).mean() for of in ("small_raw", "small", "target", "target_tuned")}
    assert losses["small"] < losses["small_raw"] and losses["target_tuned"] < losses["target"]
    assert len(set(losses.values())) == 4


def test_a_signal_by_epoch_ends_with_that_of_the_fine_tuned_model(pool: Pool):
    by_epoch = pool.ask("loss", of="small@epochs")
    assert by_epoch.shape == (12, 3)
    assert (by_epoch[:, 1] == pool.ask("loss", of="small@2")).all()
    assert (by_epoch[:, 2] == pool.ask("loss", of="small")).all() and (
        by_epoch[:, 2] == pool.ask("loss", "small@3")
    ).all()
    assert len(np.unique(by_epoch[0])) == 3
    assert pool.ask(Embedding(), of="small@epochs", at=np.array([1, 5])).shape[:2] == (2, 3)


def test_efforts_online_come_from_the_fine_tuning_and_need_no_pass(pool: Pool):
    before = pool.store.computed.copy()
    online = pool.ask("effort", of="small@online")
    computed = pool.store.computed - before
    assert computed == {pool.training("small", "last_v_b").fingerprint}
    after = pool.ask("effort", of="small")
    assert np.isfinite(online).all() and np.corrcoef(np.log(online), np.log(after))[0, 1] > 0.9
    assert (pool.ask("effort", of="small@online", at=np.array([3, 1])) == online[[3, 1]]).all()


def test_the_small_model_fine_tuned_once_takes_one_epoch_whatever_the_settings(pool: Pool, tmp_path: Path):
    online = pool.ask("effort", of="small_once@online")
    assert pool.training("small_once").epochs == 1 and pool.training("small").epochs == 3
    once = replace(pool, settings=replace(pool.settings, small_epochs=1))
    before = once.store.computed.copy()
    assert (once.ask("effort", of="small@online") == online).all()
    assert once.store.computed == before, "it is the fine-tuning of a run with finetune.small_epochs=1"


def test_several_signals_come_out_of_one_pass_with_the_options_that_each_has(pool: Pool):
    asked = ["el2n", "embedding", Effort("all_lora")]
    before = pool.store.computed.copy()
    el2n, embedding, effort = pool.ask(asked, of="target_tuned", variant="official")
    (scores,) = [name for name in pool.store.computed - before if (pool.store.root / "scores" / name[:32]).exists()]
    assert scores and embedding.shape[0] == 12
    assert np.allclose(el2n, pool.ask("el2n", of="target_tuned", variant="official"), rtol=1e-5)
    assert np.allclose(effort, pool.ask(Effort("all_lora"), of="target_tuned"), rtol=1e-4)


def test_answers_without_their_prompts_are_a_view_of_the_samples(pool: Pool):
    apart = pool.ask(Loss(prompt=False), of="target")
    assert (apart > pool.ask("loss", of="target")).mean() > 0.5, "a prompt helps"
    assert (pool.ask("loss", of="target", prompt=False) == apart).all()
    with pytest.raises(
        UserError, match=r"the signals .* read different texts of the samples: ask for them one at a time"
    ):
        pool.ask([Loss(prompt=False), "el2n"], of="target")


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"signal": "grand"}, "signal='grand' is unknown: choose one of effort, el2n, loss"),
        ({"of": "teacher"}, "the model 'teacher' is unknown: choose one of small, small_once, small_raw, target"),
        ({"of": "target@epochs"}, "of='target@epochs': the raw model has no epochs; ask small"),
        ({"of": "small@4"}, "of='small@4': small has the epochs 1 to 3, or write small@epochs"),
        ({"of": "small@last"}, "of='small@last': small has the epochs 1 to 3"),
        ({"of": "small@online"}, "of=small@online gives only the signal effort"),
        ({"view": "test"}, "view='test' is unknown: choose pool or dev"),
        ({"parameters": "all_lora"}, "signal 'loss' has no option 'parameters': it has prompt, text"),
    ],
)
def test_what_cannot_be_asked_is_refused_with_what_can(pool: Pool, asked: dict[str, Any], sentence: str):
    with pytest.raises(UserError, match=sentence):
        pool.ask(**{"signal": "loss", "of": "small", **asked})


def test_a_pool_without_a_validation_slice_says_how_to_make_one(tmp_path: Path):
    with pytest.raises(UserError, match=r"there is no dev slice: make a validation slice with task\.dev_size=200"):
        pool_of_sums(tmp_path).ask("loss", of="target", view="dev")


def counted(cost: Cost) -> tuple[float, int, int]:
    return cost.flops, cost.tokens_forward, cost.tokens_backward


SIGNALS = [Loss(), Embedding(), Effort(), Effort("all_lora"), Effort("all_linear"), Effort("last_v_b", FRESH)]


@pytest.mark.parametrize("of", ["small_raw", "small"])
@pytest.mark.parametrize("signal", SIGNALS, ids=repr)
def test_an_estimate_of_a_scoring_counts_what_it_does_count(pool: Pool, tmp_path: Path, signal: Any, of: str):
    (state,) = pool.states(of)
    stage = Score(state, pool.slices["pool"].small, (signal,), ScoringSettings(), SETTINGS.lora, 0)
    scored, meter = pool.store.get(stage), Meter()
    stage.estimate(tmp_path, meter)
    assert counted(meter.cost) == counted(scored.cost) and scored.cost.flops > 0
    placeholder = load_file(tmp_path / "scores.safetensors")[signal.name]
    assert len(placeholder) == 12 and np.isfinite(placeholder).all() and len(np.unique(placeholder)) == 12


@pytest.mark.parametrize(("kind", "online"), [("lora", None), ("lora", "last_v_b"), ("full", None)])
def test_an_estimate_of_a_fine_tuning_counts_what_it_does_count(tmp_path: Path, kind: str, online: str | None):
    pool = pool_of_sums(tmp_path / "store", 4, settings=replace(SETTINGS, kind=kind))
    stage = pool.training("small", online)
    tuned, meter = pool.store.get(stage), Meter()
    stage.estimate(tmp_path, meter)
    assert counted(meter.cost) == counted(tuned.cost) and tuned.cost.flops > 0
    assert (tmp_path / "online.safetensors").exists() == bool(online)


def test_scores_are_known_by_what_determines_them_and_not_by_how_batches_lie_in_memory(pool: Pool):
    (state,), samples = pool.states("small_raw"), pool.slices["pool"].small

    def fingerprint(*signals: Any, seed: int = 0, lora: Any = SETTINGS.lora, **how: Any) -> str:
        return Score(state, samples, signals or (Effort(),), ScoringSettings(**how), lora, seed).fingerprint

    assert fingerprint(batch_tokens=64, one_at_a_time=True) == fingerprint(dtype="float32") == fingerprint()
    others = {
        fingerprint(dtype="bfloat16"),
        fingerprint(seed=1),
        fingerprint(lora=replace(SETTINGS.lora, rank=3)),
        fingerprint(Effort("all_lora")),
        fingerprint(Effort(), Loss()),
    }
    assert len(others | {fingerprint()}) == 6
    assert fingerprint(Loss(), Effort()) == fingerprint(Effort(), Loss())
    assert fingerprint(Loss(), seed=1) == fingerprint(Loss()), "no adapter is drawn"


def test_a_selection_is_known_by_method_budget_seed_and_pool_and_charged_for_what_the_method_asked(pool: Pool):
    stage = Select(EL2N(), pool, 4)
    chosen = pool.store.get(stage)
    assert len(Coreset.load(chosen.path).indices) == 4
    assert sorted(charge.stage for charge in chosen.charged().values()) == ["coreset", "finetune", "scores"]
    assert pool.store.find(replace(stage, pool=replace(pool, scoring=ScoringSettings(batch_tokens=64)))) == replace(
        chosen, computed=False
    )
    other = replace(pool, slices={"pool": pool.slices["dev"]})
    for field in ({"method": EL2N("official")}, {"budget": 5}, {"pool": replace(pool, seed=1)}, {"pool": other}):
        assert replace(stage, **field).fingerprint != stage.fingerprint


def test_what_one_method_asked_another_reads(tmp_path: Path):
    pool = pool_of_sums(Store(tmp_path))
    pool.store.get(Select(Staff(num_regions=2, verification_budget=1), pool, 4))
    pool.store.computed.clear()
    again = Select(Staff(num_regions=2, verification_budget=1, pick="highest"), pool, 4)
    artifact = pool.store.get(again)
    assert pool.store.computed == {again.fingerprint}
    assert sorted(charge.stage for charge in artifact.charged().values()) == [
        "coreset",
        "finetune",
        *["scores"] * 2,
    ]


# ---------------------------------------------------------------- EL2N


def test_el2n_equals_the_recorded_values() -> None:
    golden = vectors("el2n")["a"]
    logits, labels = torch.from_numpy(golden["logits"]), torch.from_numpy(golden["labels"])
    predictions, answers = Positions.of_predictions(labels), Positions.of_answers(labels)
    standard = el2n_scores(predictions.gather(logits)[0], predictions)
    official = el2n_scores(answers.gather(logits)[0], answers, "official")
    assert standard.item() == pytest.approx(float(golden["recommended_mean_token_norm"]), rel=1e-6)
    assert official.item() == pytest.approx(float(golden["official"]), rel=1e-6)


def exact_error_norm(logits: list[float], label: int) -> float:
    """The textbook form in 60 digits."""
    getcontext().prec = 60
    powers = [Decimal(z).exp() for z in logits]
    p = [power / sum(powers) for power in powers]
    return float((sum(x * x for x in p) - 2 * p[label] + 1).sqrt())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_el2n_is_accurate_where_the_model_is_almost_sure(dtype: torch.dtype) -> None:
    for gap in (0.5, 5.0, 10.0, 20.0, 40.0, 60.0):
        logits = torch.tensor([[gap, 0.0, -1.5, 0.25, -3.0]], dtype=dtype)
        positions = Positions(torch.tensor([0]), torch.tensor([0]), torch.tensor([1]))
        expected = exact_error_norm(logits[0].tolist(), 0)
        assert el2n_scores(logits, positions).item() == pytest.approx(expected, rel=1e-5)


# ---------------------------------------------------------------- means over the tokens of an answer


@pytest.fixture(scope="module")
def likely_model():
    return random_model(initializer_range=0.5).eval()


@pytest.fixture(scope="module")
def samples(likely_model) -> TokenizedSamples:
    """Answers of which the model predicts some tokens, and not others."""
    rng, rows, prompts = np.random.default_rng(0), [], []
    for prompt, answer in zip(rng.integers(1, 20, 9), rng.integers(1, 9, 9), strict=True):
        row = rng.integers(1, 61, prompt).tolist()
        for _ in range(answer):
            likely = int(likely_model(torch.tensor([row])).logits[0, -1].argmax())
            row.append(likely if rng.random() < 0.5 else int(rng.integers(1, 61)))
        rows.append(row)
        prompts.append(int(prompt))
    return TokenizedSamples.of_rows([f"s{i}" for i in range(9)], rows, prompts)


def expected(likely_model, samples: TokenizedSamples) -> dict[str, np.ndarray]:
    """From the logits of one sample after the other, token by token."""
    values: dict[str, list[float]] = {"margin": [], "probability": [], "correct": []}
    for i in range(len(samples)):
        row, first = samples.row(i).tolist(), int(samples.prompt_lengths[i])
        logits = likely_model(torch.tensor([row])).logits[0].double().detach().numpy()
        margins, probabilities, right = [], [], []
        for position in range(first, len(row)):
            z, y = logits[position - 1], row[position]
            margins.append(z[y] - np.delete(z, y).max())
            probabilities.append(np.exp(z[y] - z.max()) / np.exp(z - z.max()).sum())
            right.append(z.argmax() == y)
        for name, tokens in zip(values, (margins, probabilities, right), strict=True):
            values[name].append(np.mean(tokens))
    return {name: np.array(column) for name, column in values.items()}


@pytest.mark.parametrize("alone", [False, True], ids=["in batches", "one at a time"])
def test_signals_of_answers_are_means_over_their_tokens(likely_model, samples: TokenizedSamples, alone: bool):
    signals = [named(name) for name in ("margin", "probability", "correct")]
    values = score_samples(likely_model, samples, signals, batch_tokens=50, pad_token_id=0, one_at_a_time=alone)
    wanted = expected(likely_model, samples)
    assert 0 < wanted["correct"].mean() < 1 and wanted["margin"].min() < 0 < wanted["margin"].max()
    for name in wanted:
        assert values[name].shape == (9,) and values[name].dtype == np.float64
        np.testing.assert_allclose(values[name], wanted[name], rtol=1e-4, atol=1e-5)


def test_a_name_is_the_signals_own():
    for name in NAMED:
        assert named(name).name == name and isinstance(type(named(name)).version, int)


@pytest.mark.parametrize(
    ("ask", "sentence"),
    [
        (lambda: named("grand"), "signal='grand' is unknown: choose one of effort, el2n, loss, nll, embedding"),
        (lambda: named("loss", variant="raw"), "signal 'loss' has no option 'variant': it has prompt, text"),
        (lambda: named("el2n", variant="raw"), "variant='raw' of the signal 'el2n': choose standard or official"),
        (lambda: Effort("all"), "gradient='all' is unknown: choose last_v_b, all_lora, all_linear"),
        (lambda: Effort(fresh_adapter={"rank": 2}), "must have rank, alpha and targets"),
        (
            lambda: Effort("all_linear", {"rank": 2, "alpha": 4, "targets": "all-linear"}),
            "gradient=all_linear .*: leave out fresh_adapter",
        ),
        (lambda: Loss(text="prompt"), "text='prompt' of the signal 'loss' is unknown: choose answer or all"),
        (lambda: Embedding(pooling="max"), "pooling='max' of the signal 'embedding': choose answer_mean"),
    ],
)
def test_an_unknown_signal_or_option_is_refused_with_the_choices(ask: Any, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        ask()


def test_options_of_several_signals_reach_those_that_have_them() -> None:
    loss, error = named_all(["loss", named("el2n")], {"prompt": False, "variant": "official"})
    assert (loss, error) == (Loss(prompt=False), named("el2n", variant="official"))
