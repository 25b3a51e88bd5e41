"""Signals against what they are by definition: EL2N, and margin, probability and right tokens of answers."""

from __future__ import annotations

from decimal import Decimal, getcontext

import numpy as np
import pytest
import torch
from support.golden import recorded
from support.tiny import random_model

from staff.data.tokens import TokenizedSamples
from staff.scoring.passes import score_samples
from staff.scoring.positions import Positions
from staff.signals import NAMED, named
from staff.signals.el2n import el2n_scores

# ---------------------------------------------------------------- EL2N


def test_el2n_equals_the_recorded_values() -> None:
    golden = recorded("el2n")["a"]
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
