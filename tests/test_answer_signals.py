"""Margin, probability and share of right tokens, against the logits of single samples; what names offer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.llama import LlamaConfig

from staff.data.tokens import TokenizedSamples
from staff.scoring.passes import score_samples
from staff.signals import NAMED, named


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    shape = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    return AutoModelForCausalLM.from_config(
        LlamaConfig(**shape, num_attention_heads=4, initializer_range=0.5)
    ).eval()


@pytest.fixture(scope="module")
def samples(model) -> TokenizedSamples:
    """Answers of which the model predicts some tokens, and not others."""
    rng, rows, prompts = np.random.default_rng(0), [], []
    for prompt, answer in zip(rng.integers(1, 20, 9), rng.integers(1, 9, 9), strict=True):
        row = rng.integers(1, 61, prompt).tolist()
        for _ in range(answer):
            likely = int(model(torch.tensor([row])).logits[0, -1].argmax())
            row.append(likely if rng.random() < 0.5 else int(rng.integers(1, 61)))
        rows.append(row)
        prompts.append(int(prompt))
    return TokenizedSamples.of_rows([f"s{i}" for i in range(9)], rows, prompts)


def expected(model, samples: TokenizedSamples) -> dict[str, np.ndarray]:
    """From the logits of one sample after the other, token by token."""
    values: dict[str, list[float]] = {"margin": [], "probability": [], "correct": []}
    for i in range(len(samples)):
        row, first = samples.row(i).tolist(), int(samples.prompt_lengths[i])
        logits = model(torch.tensor([row])).logits[0].double().detach().numpy()
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
def test_signals_of_answers_are_means_over_their_tokens(model, samples: TokenizedSamples, alone: bool):
    signals = [named(name) for name in ("margin", "probability", "correct")]
    values = score_samples(model, samples, signals, batch_tokens=50, pad_token_id=0, one_at_a_time=alone)
    wanted = expected(model, samples)
    assert 0 < wanted["correct"].mean() < 1 and wanted["margin"].min() < 0 < wanted["margin"].max()
    for name in wanted:
        assert values[name].shape == (9,) and values[name].dtype == np.float64
        np.testing.assert_allclose(values[name], wanted[name], rtol=1e-4, atol=1e-5)


def test_a_name_is_the_signals_own():
    for name in NAMED:
        assert named(name).name == name and isinstance(type(named(name)).version, int)
