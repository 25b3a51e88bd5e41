"""Gains in context: samples behind examples, as the model reads them, against single forward passes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.any_pool import AnyPool
from support.golden import recorded
from support.tiny import tiny_pool

from baselines.delift import distance_official
from baselines.within_groups import GroupPool
from staff.data.tokens import TokenizedSamples
from staff.errors import UserError
from staff.pool import Pool
from staff.scoring import in_context
from staff.scoring.passes import Pass
from staff.scoring.positions import Positions
from staff.signals.distance import Distance

DISTANCES = [case for case in recorded("delift") if "distance" in case]
SAMPLES = TokenizedSamples.of_rows(["a", "b"], [[1, 5, 6, 7, 2], [1, 8, 9, 2]], [3, 2], begin=1)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Pool:
    return tiny_pool(tmp_path_factory.mktemp("store"), size=4)


def distance(model, row: list[int], prompt: int) -> float:
    """From one forward pass, in the formula of the released code."""
    logits = model(torch.tensor([row])).logits.detach().double().numpy()
    answer = (np.arange(len(row)) >= prompt)[None]
    return float(distance_official(logits, np.array([row]), answer)[0])


def test_a_sample_stands_behind_each_example_with_one_begin_token_and_its_own_answer():
    pairs = SAMPLES.take([1]).after(SAMPLES, [30, 31])
    assert [pairs.row(i).tolist() for i in range(2)] == [[1, 5, 6, 7, 30, 31, 8, 9, 2], [1, 8, 9, 30, 31, 8, 9, 2]]
    assert list(pairs.ids) == ["b after a", "b after b"] and pairs.prompt_lengths.tolist() == [7, 6]
    assert pairs.labels(0).tolist() == [-100] * 7 + [9, 2]
    chat = SAMPLES.after(SAMPLES, None)
    assert len(chat) == 4 and chat.row(1).tolist() == [1, 8, 9, 2, 5, 6, 7, 2]


@pytest.mark.parametrize("case", DISTANCES)
def test_the_distance_is_that_of_the_released_code(case: str):
    vectors = recorded("delift")[case]
    ids, response = torch.tensor(vectors["input_ids"]).long(), torch.tensor(vectors["token_type_ids"]).bool()
    labels = torch.where(response, ids, -100)
    answered = (labels[:, 1:] != -100).any(1)
    at = Positions.of_predictions(labels)
    batch = Pass(labels, torch.full((len(ids),), ids.shape[1]), at, at.gather(torch.tensor(vectors["logits"]))[0])
    values = Distance().compute(batch)
    np.testing.assert_allclose(values[answered], vectors["distance"][answered], atol=1e-6)


@pytest.mark.parametrize("view", ["pool", "dev"])
def test_gains_are_the_fall_of_the_distance_behind_each_example(pool: Pool, view: str, monkeypatch):
    monkeypatch.setattr(in_context, "PAIRS_AT_ONCE", 9)  # two samples at a time
    gains = pool.ask("in_context_gain", of="target", view=view)
    samples, helped = pool.slices["pool"].target, pool.slices[view].target
    assert gains.shape == (len(helped), 4)
    model, tokenizer = pool.family.target.load(), pool.family.target.tokenizer()
    blank = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    for i in (0, len(helped) - 1):
        row, prompt = helped.row(i).tolist(), int(helped.prompt_lengths[i])
        alone = distance(model, row, prompt)
        for j in range(4):
            before = [*samples.row(j).tolist()[:-1], *blank]
            behind = distance(model, [*before, *row[helped.begin :]], len(before) + prompt - helped.begin)
            assert gains[i, j] == pytest.approx(alone - behind, abs=1e-5)


def test_a_pair_that_does_not_fit_the_model_is_refused_before_it_runs(pool: Pool, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(type(pool.family.target), "window", lambda spec: 150)
    with pytest.raises(UserError, match=r"in pairs of up to \d+ tokens, and the model has 150 positions: lower"):
        replace(pool, store=type(pool.store)(tmp_path)).ask("in_context_gain", of="target")
    assert not list(tmp_path.iterdir())


def test_in_a_group_the_columns_are_those_of_its_samples():
    whole, members = AnyPool(6), np.array([4, 1, 5])
    gains, part = whole.ask("in_context_gain", "target"), GroupPool(whole, members)  # type: ignore[arg-type]
    np.testing.assert_array_equal(part.ask("in_context_gain", "target"), gains[np.ix_(members, members)])
    of_slice = whole.ask("in_context_gain", "target", view="dev")
    np.testing.assert_array_equal(part.ask("in_context_gain", "target", view="dev"), of_slice[:, members])
