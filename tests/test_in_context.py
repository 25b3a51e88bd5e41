"""Gains, answers and attention in context, as the model reads them, against single passes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.any_pool import AnyPool
from support.golden import recorded
from support.tiny import planted_pool, tiny_pool

from baselines.delift import distance_official
from baselines.within_groups import GroupPool
from staff.data.tokens import TokenizedSamples
from staff.errors import UserError
from staff.evaluation.in_context import before
from staff.evaluation.metrics import named_metric
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
    with pytest.raises(UserError, match=r"takes up to \d+ tokens, and the model has 150 positions: lower"):
        replace(pool, store=type(pool.store)(tmp_path)).ask("in_context_gain", of="target")
    assert not list(tmp_path.iterdir())


def test_in_a_group_the_columns_are_those_of_its_samples():
    whole, members = AnyPool(6), np.array([4, 1, 5])
    gains, part = whole.ask("in_context_gain", "target"), GroupPool(whole, members)  # type: ignore[arg-type]
    np.testing.assert_array_equal(part.ask("in_context_gain", "target"), gains[np.ix_(members, members)])
    of_slice = whole.ask("in_context_gain", "target", view="dev")
    np.testing.assert_array_equal(part.ask("in_context_gain", "target", view="dev"), of_slice[:, members])


# ---------------------------------------------------------------- answers and attention


@pytest.mark.parametrize("view", ["pool", "dev"])
def test_answers_and_attention_are_those_of_single_prompts(view: str, tmp_path: Path):
    pool = planted_pool(tmp_path, size=6, dev=3)
    shown, asked = np.array([[0, 4], [5, -1]]), np.array([[1, 2], [7, -1]])
    found = pool.ask("in_context", of="target", view=view, demonstrations=shown, queries=asked, metric="rougeL")
    assert found.shape == (2, 4) and np.isnan(found[1, 1]) and np.isnan(found[1, 3])
    spec = pool.family.target
    model, tokenizer = spec.load(), spec.tokenizer()
    eager = replace(spec, attention="eager").load()
    blank = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    samples, of = pool.slices["pool"].target, pool.slices[view].target
    for e, demonstrations in enumerate([[0, 4], [5]]):
        attention = []
        for i, query in enumerate(asked[e][asked[e] >= 0] % len(of)):
            row, prompt = [samples.row(0)[0]], []
            for j in demonstrations:
                start = len(row)
                row += [*samples.row(j)[1:-1], *blank]
                prompt.append(range(start, len(row)))
            row += of.row(query)[1 : of.prompt_lengths[query]].tolist()
            tokens = torch.tensor([row])
            new = int(max(of.answer_lengths[q] for q in asked[asked >= 0] % len(of)))
            answer = model.generate(tokens, do_sample=False, max_new_tokens=new)[0, len(row) :].tolist()
            answer = answer[: answer.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in answer else answer
            text = tokenizer.decode(before(answer, blank)).strip()
            reference = tokenizer.decode(of.row(query)[of.prompt_lengths[query] : -1]).strip()
            assert found[e, 2 + i] == pytest.approx(named_metric("rougeL").measure([text], [(reference,)])[0])
            answer = before(answer, blank)
            weights = eager(torch.tensor([[*row, *answer]]), output_attentions=True).attentions[2][0]
            received = weights[:, len(row) :].mean((0, 1)).detach().numpy()
            attention.append([received[span].mean() for span in prompt])
        np.testing.assert_allclose(found[e, : len(demonstrations)], np.mean(attention, axis=0), rtol=1e-4)


def test_an_answer_ends_where_the_next_sample_would_begin():
    assert before([5, 6, 30, 31, 7], [30, 31]) == [5, 6] and before([30, 31], [30, 31]) == []
    assert before([5, 30], [30, 31]) == [5, 30] and before([5], None) == [5]


def test_what_cannot_be_read_in_context_is_refused_before_a_model_loads(tmp_path: Path):
    pool = planted_pool(tmp_path)
    plan: dict[str, Any] = {"demonstrations": np.array([[0]]), "queries": np.array([[1]])}
    with pytest.raises(UserError, match=r"metric='nll' measures no answers"):
        pool.ask("in_context", of="target", metric="nll", **plan)
    for layer in (4, -1, "last"):
        with pytest.raises(UserError, match=r"is no block of target: choose 0 to 3, or null"):
            pool.ask("in_context", of="target", layer=layer, **plan)
    assert {folder.name for folder in tmp_path.iterdir()} <= {"locks", "tmp", "attempts"}


def test_evaluations_inside_a_group_are_of_its_samples():
    whole, members = AnyPool(6), np.array([4, 1, 5])
    shown, asked = np.array([[0, 2], [1, -1]]), np.array([[3], [-1]])
    part = GroupPool(whole, members)  # type: ignore[arg-type]
    for view, queries in (("pool", [[4], [-1]]), ("dev", [[3], [-1]])):
        ours = part.ask("in_context", "target", view=view, demonstrations=shown, queries=asked)
        same = {"demonstrations": np.array([[4, 5], [1, -1]]), "queries": np.array(queries)}
        np.testing.assert_array_equal(ours, whole.ask("in_context", "target", view=view, **same))
