"""What a pool answers: signals of its models, and answers in context."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from support.any_pool import AnyPool
from support.golden import recorded
from support.tiny import SETTINGS, planted_pool, pool_of_sums, tiny_pool

from baselines.delift import distance_official
from baselines.el2n import EL2N
from baselines.within_groups import GroupPool
from staff.data.tokens import TokenizedSamples
from staff.errors import UserError
from staff.evaluation.in_context import before
from staff.evaluation.metrics import named_metric
from staff.pool import Pool, Select
from staff.scoring import in_context
from staff.scoring.passes import Pass
from staff.scoring.positions import Positions
from staff.scoring.stage import Score, ScoringSettings
from staff.selection import Coreset
from staff.signals.distance import Distance
from staff.signals.effort import Effort
from staff.signals.embedding import Embedding
from staff.signals.loss import Loss
from staff.speculative import Staff
from staff.store.cost import Cost, Meter
from staff.store.store import Store

# ---------------------------------------------------------------- signals


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
    with pytest.raises(UserError, match="signals that read different texts of the samples need a pass each"):
        pool.ask([Loss(prompt=False), "el2n"], of="target")


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ({"signal": "grand"}, "signal='grand' is unknown: choose one of effort, el2n, loss"),
        ({"of": "teacher"}, "the model 'teacher' is unknown: choose one of small, small_raw, target, target_tuned"),
        ({"of": "target@epochs"}, "of='target@epochs': the raw model has no epochs; ask small"),
        ({"of": "small@4"}, "of='small@4': small has the epochs 1 to 3, or write small@epochs"),
        ({"of": "small@last"}, "of='small@last': small has the epochs 1 to 3"),
        ({"of": "small@online"}, "scores online are efforts of a fine-tuned model, by its own adapter"),
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


# ---------------------------------------------------------------- answers in context


DISTANCES = [case for case in recorded("delift") if "distance" in case]
SAMPLES = TokenizedSamples.of_rows(["a", "b"], [[1, 5, 6, 7, 2], [1, 8, 9, 2]], [3, 2], begin=1)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Pool:
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
def test_gains_are_the_fall_of_the_distance_behind_each_example(planted: Pool, view: str, monkeypatch):
    monkeypatch.setattr(in_context, "PAIRS_AT_ONCE", 9)  # two samples at a time
    gains = planted.ask("in_context_gain", of="target", view=view)
    samples, helped = planted.slices["pool"].target, planted.slices[view].target
    assert gains.shape == (len(helped), 4)
    model, tokenizer = planted.family.target.load(), planted.family.target.tokenizer()
    blank = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    for i in (0, len(helped) - 1):
        row, prompt = helped.row(i).tolist(), int(helped.prompt_lengths[i])
        alone = distance(model, row, prompt)
        for j in range(4):
            before = [*samples.row(j).tolist()[:-1], *blank]
            behind = distance(model, [*before, *row[helped.begin :]], len(before) + prompt - helped.begin)
            assert gains[i, j] == pytest.approx(alone - behind, abs=1e-5)


def test_a_pair_that_does_not_fit_the_model_is_refused_before_it_runs(planted: Pool, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(type(planted.family.target), "window", lambda spec: 150)
    with pytest.raises(UserError, match=r"takes up to \d+ tokens, and the model has 150 positions: lower"):
        replace(planted, store=type(planted.store)(tmp_path)).ask("in_context_gain", of="target")
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
    planted = planted_pool(tmp_path, size=6, dev=3)
    shown, asked = np.array([[0, 4], [5, -1]]), np.array([[1, 2], [7, -1]])
    found = planted.ask("in_context", of="target", view=view, demonstrations=shown, queries=asked, metric="rougeL")
    assert found.shape == (2, 4) and np.isnan(found[1, 1]) and np.isnan(found[1, 3])
    spec = planted.family.target
    model, tokenizer = spec.load(), spec.tokenizer()
    eager = replace(spec, attention="eager").load()
    blank = tokenizer("\n\n", add_special_tokens=False)["input_ids"]
    samples, of = planted.slices["pool"].target, planted.slices[view].target
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
    planted = planted_pool(tmp_path)
    plan: dict[str, Any] = {"demonstrations": np.array([[0]]), "queries": np.array([[1]])}
    with pytest.raises(UserError, match=r"metric='nll' measures no answers"):
        planted.ask("in_context", of="target", metric="nll", **plan)
    for layer in (4, -1, "last"):
        with pytest.raises(UserError, match=r"is no block of target: choose 0 to 3, or null"):
            planted.ask("in_context", of="target", layer=layer, **plan)
    assert {folder.name for folder in tmp_path.iterdir()} <= {"locks", "tmp", "attempts"}


def test_evaluations_inside_a_group_are_of_its_samples():
    whole, members = AnyPool(6), np.array([4, 1, 5])
    shown, asked = np.array([[0, 2], [1, -1]]), np.array([[3], [-1]])
    part = GroupPool(whole, members)  # type: ignore[arg-type]
    for view, queries in (("pool", [[4], [-1]]), ("dev", [[3], [-1]])):
        ours = part.ask("in_context", "target", view=view, demonstrations=shown, queries=asked)
        same = {"demonstrations": np.array([[4, 5], [1, -1]]), "queries": np.array(queries)}
        np.testing.assert_array_equal(ours, whole.ask("in_context", "target", view=view, **same))
