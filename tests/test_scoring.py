"""Signals out of batched passes, against each sample's own forward and backward pass."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.tiny import SHAPE, adapted, odd_llama, random_model
from torch import Tensor
from torch.nn.functional import one_hot
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import AutoConfig, AutoModelForCausalLM, CohereConfig

from staff.data.splits import DataView
from staff.data.tokens import TokenizedSamples
from staff.errors import UserError
from staff.models.flops import forward_flops
from staff.models.spec import ModelSpec
from staff.scoring.exact import batches
from staff.scoring.flops import charge
from staff.scoring.passes import score_samples
from staff.scoring.signal import Signal
from staff.signals import el2n
from staff.signals.effort import Effort
from staff.signals.el2n import EL2N
from staff.signals.embedding import Embedding
from staff.signals.loss import Loss, Perplexity
from staff.store.cost import Meter

BROKEN_TOKEN = 60


def tiny_family() -> Any:
    return ModelSpec("pkg://staff/assets/tiny/small").load()


@pytest.fixture(params=[random_model, tiny_family], ids=["random", "tiny"])
def model(request: pytest.FixtureRequest) -> Any:
    """With adapters whose A and B are both away from zero."""
    return adapted(request.param(), std=0.1)


def random_samples(n: int = 17) -> TokenizedSamples:
    rng = np.random.default_rng(0)
    prompts, answers = rng.integers(1, 30, n), rng.integers(1, 9, n)
    rows = [rng.integers(1, BROKEN_TOKEN, p + a).tolist() for p, a in zip(prompts, answers, strict=True)]
    return TokenizedSamples.of_rows([f"s{i}" for i in range(n)], rows, prompts, begin=1)


def score(model: Any, samples: TokenizedSamples, signal: Signal, batch_tokens: int = 64, **how: Any) -> np.ndarray:
    asked = DataView(prompt=signal.prompt, text=signal.text).of(samples)
    return score_samples(model, asked, (signal,), batch_tokens=batch_tokens, pad_token_id=0, **how)[signal.name]


def one_at_a_time(model: Any, samples: TokenizedSamples, signal: Any) -> np.ndarray:
    """Each signal from the model's own forward pass over one whole sample, and its own backward pass."""
    model.eval()
    values = []
    for i in range(len(samples)):
        ids, start = torch.from_numpy(samples.row(i)).long(), int(samples.prompt_lengths[i])
        if not signal.prompt:
            ids, start = torch.cat([ids[:1], ids[start:]]), 1
        start = 1 if signal.text == "all" else start
        labels = ids.clone()
        labels[:start] = -100
        out = model(input_ids=ids[None], labels=labels[None], output_hidden_states=True)
        z, y = out.logits[0, start - 1 : -1], ids[start:]
        layers = {None: -1, -1: -1}  # the last after the final norm; in front of a block's the embedding
        hidden = out.hidden_states[layers.get(signal.layer, (signal.layer or 0) + 1)][0]
        weights = torch.arange(1.0, len(ids) + 1) / (len(ids) * (len(ids) + 1) / 2)
        match signal:
            case Effort(parameters=parameters):
                wanted = [p for name, p in model.named_parameters() if is_wanted(parameters, name, model)]
                values.append(torch.cat([g.flatten() for g in torch.autograd.grad(out.loss, wanted)]).norm())
            case Perplexity():
                values.append(out.loss.exp())
            case Loss():
                values.append(out.loss)
            case Embedding(pooling="answer_mean"):
                values.append(hidden[start:].mean(0))
            case Embedding(pooling="position_weighted"):
                values.append(weights @ hidden)
            case Embedding(pooling="last_token"):
                values.append(hidden[-1])
            case EL2N(variant="standard"):
                z = z.double()
                values.append((z.softmax(-1) - one_hot(y, z.shape[1])).norm(dim=-1).mean())
            case EL2N(variant="official"):
                z = out.logits[0, start:]
                values.append((z - one_hot(ids[start:], z.shape[1])).square().mean().sqrt())
    return torch.stack(values).detach().numpy()


def is_wanted(parameters: str, name: str, model: Any) -> bool:
    last = f"layers.{model.config.num_hidden_layers - 1}.self_attn.v_proj.lora_B"
    return (last if parameters == "last_v_b" else ".lora_") in name


SIGNALS: list[Any] = [
    Effort("last_v_b"),
    Effort("all_lora"),
    EL2N(),
    EL2N("official"),
    Loss(),
    Loss(prompt=False),
    Loss(text="all"),
    Perplexity(prompt=False),
    Embedding(),
    Embedding(layer=0),
    Embedding(pooling="position_weighted"),
    Embedding(pooling="last_token"),
]
of_every_signal = pytest.mark.parametrize("signal", SIGNALS, ids=repr)


@of_every_signal
def test_batched_scores_equal_one_sample_at_a_time(model: Any, signal: Any) -> None:
    samples = random_samples()
    expected = one_at_a_time(model, samples, signal)
    np.testing.assert_allclose(score(model, samples, signal), expected, rtol=1e-4, atol=1e-6)


@of_every_signal
def test_single_samples_by_plain_autograd_have_the_same_scores(model: Any, signal: Any) -> None:
    samples = random_samples(5)
    alone = score(model, samples, signal, one_at_a_time=True)
    np.testing.assert_allclose(alone, score(model, samples, signal), rtol=1e-4, atol=1e-6)


def test_several_signals_come_from_one_pass(model: Any) -> None:
    samples = random_samples()
    for asked in (
        (Loss(), Embedding(), Effort("last_v_b"), EL2N("official")),
        (Effort("all_lora"), Embedding(layer=0, pooling="position_weighted")),
        (EL2N(), Embedding()),
    ):
        apart = {signal.name: score(model, samples, signal) for signal in asked}
        shapes = batch_shapes(model)
        together = score_samples(model, samples, asked, batch_tokens=10_000, pad_token_id=0)
        assert set(together) == set(apart) and len(shapes) == 1
        for name, values in together.items():
            np.testing.assert_allclose(values, apart[name], rtol=1e-5, atol=1e-5)


def test_an_architecture_unknown_to_the_batched_pass_is_scored_only_when_that_is_asked_for() -> None:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    cohere = AutoModelForCausalLM.from_config(CohereConfig(**shape, num_attention_heads=4))
    model = get_peft_model(cohere, LoraConfig(target_modules=["v_proj"]))
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    samples = random_samples(4)
    for signal in (Effort(), EL2N(), Embedding()):
        with pytest.raises(UserError, match=r"scoring\.one_at_a_time=true"):
            score(model, samples, signal)
        expected = one_at_a_time(model, samples, signal)
        alone = score(model, samples, signal, one_at_a_time=True)
        np.testing.assert_allclose(alone, expected, rtol=1e-4, atol=1e-6)
    assert trainable == [name for name, p in model.named_parameters() if p.requires_grad]


@of_every_signal
def test_scores_do_not_depend_on_batch_size_padding_or_order(model: Any, signal: Any) -> None:
    samples = random_samples()
    single = score(model, samples, signal, batch_tokens=1)
    tolerance = {"rtol": 1e-5, "atol": 1e-5 * float(np.abs(single).max()) if signal.name == "embedding" else 0}
    np.testing.assert_allclose(score(model, samples, signal), single, **tolerance)
    np.testing.assert_allclose(score(model, samples, signal, batch_tokens=10_000), single, **tolerance)
    shuffled = np.random.default_rng(1).permutation(len(samples))
    np.testing.assert_allclose(score(model, samples.take(shuffled), signal), single[shuffled], **tolerance)


def test_without_a_begin_token_the_first_of_an_answer_alone_is_left_out_of_its_loss() -> None:
    model, samples = random_model().eval(), TokenizedSamples.of_rows(["a"], [[5, 6, 7, 8, 9]], [2])
    with torch.no_grad():
        expected = model(torch.tensor([[7, 8, 9]]), labels=torch.tensor([[7, 8, 9]])).loss.item()
    assert score(model, samples, Loss(prompt=False))[0] == pytest.approx(expected, rel=1e-5)


def test_scores_have_the_promised_shapes_and_types() -> None:
    model, samples = random_model(), random_samples(3)
    assert score(model, samples, Loss()).dtype == np.float64
    embedding = score(model, samples, Embedding())
    assert (embedding.shape, embedding.dtype) == ((3, 32), np.float32)
    assert len(score(model, samples.take([]), Loss())) == 0


def batch_shapes(model: Any) -> list[tuple[int, int]]:
    shapes: list[tuple[int, int]] = []
    model.register_forward_pre_hook(
        lambda _, args, kw: shapes.append(tuple(kw["input_ids"].shape)), with_kwargs=True
    )
    return shapes


def test_batches_keep_to_the_token_budget_and_a_longer_sample_goes_alone() -> None:
    model, samples = random_model(), random_samples(40)
    shapes = batch_shapes(model)
    score(model, samples, Loss(), batch_tokens=30)
    assert all(rows * length <= 30 or rows == 1 for rows, length in shapes)
    assert any(length > 30 for _, length in shapes) and any(rows > 1 for rows, _ in shapes)
    assert sum(rows for rows, _ in shapes) == len(samples)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_running_out_of_memory_halves_the_budget_and_goes_on(
    error: RuntimeError, caplog: pytest.LogCaptureFixture
) -> None:
    model, samples = random_model(), random_samples()
    expected = score(model, samples, Loss())

    def small_memory(_, args: tuple, kwargs: dict[str, Tensor]) -> None:
        if kwargs["input_ids"].numel() > 70:
            raise error

    model.register_forward_pre_hook(small_memory, with_kwargs=True)
    shapes = batch_shapes(model)
    with caplog.at_level(logging.WARNING, "staff.scoring.passes"):
        np.testing.assert_allclose(score(model, samples, Loss(), batch_tokens=500), expected, rtol=1e-5)
    assert "out of memory" in caplog.text and max(rows * length for rows, length in shapes) <= 70


def test_a_sample_too_large_for_the_memory_is_named() -> None:
    model, samples = random_model(), random_samples()

    def no_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    model.register_forward_pre_hook(no_memory)
    longest = samples.ids[int(samples.lengths.argmax())]
    with pytest.raises(UserError, match=f"'{longest}' .* does not fit in memory"):
        score(model, samples, Loss())


def test_other_errors_of_the_model_are_not_taken_for_lack_of_memory() -> None:
    samples = TokenizedSamples.of_rows(["a"], [[1, 99]], [1])
    with pytest.raises(IndexError):
        score(random_model(), samples, Loss())


@of_every_signal
def test_a_score_that_is_not_finite_is_refused_with_the_sample_named(signal: Any) -> None:
    model = get_peft_model(random_model(), LoraConfig(target_modules=["v_proj"]))
    model.get_input_embeddings().weight.data[BROKEN_TOKEN] = torch.nan
    samples = random_samples()
    samples.row(7)[-1] = BROKEN_TOKEN
    with pytest.raises(UserError, match=r"'s7'.*not finite"):
        score(model, samples, signal)


def test_signals_of_one_pass_differentiate_by_the_same_parameters() -> None:
    class Other(Effort):
        name = "other"

    model = get_peft_model(random_model(), LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(
        UserError, match="effort, other differentiate by different parameters: ask for them one aft"
    ):
        score_samples(model, random_samples(), (Effort(), Other("all_lora")), batch_tokens=64, pad_token_id=0)


def test_el2n_in_chunks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = random_model(), random_samples()
    whole = score(model, samples, EL2N())
    monkeypatch.setattr(el2n, "CHUNK", 2)
    np.testing.assert_array_equal(score(model, samples, EL2N()), whole)


class FlopCounter(TorchDispatchMode):
    """What FlopCounterMode counts, without its module hooks, which autograd.grad refuses."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        return out


@pytest.mark.parametrize(("layers", "tied"), [(2, False), (2, True), (1, False)])
@pytest.mark.parametrize("signal", [*SIGNALS, Effort("all_linear")], ids=repr)
def test_the_meter_is_told_what_was_computed(signal: Any, layers: int, tied: bool) -> None:
    model = random_model(attn_implementation="eager", tie_word_embeddings=tied, num_hidden_layers=layers)
    if signal != Effort("all_linear"):
        model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear"))
    rows = np.random.default_rng(0).integers(1, 60, (4, 40)).tolist()
    samples, meter = TokenizedSamples.of_rows(list("abcd"), rows, [30] * 4, begin=1), Meter()
    assert batches(model.config)  # tested before, since the test itself is not counted
    with FlopCounter() as counted:
        score(model, samples, signal, batch_tokens=1000)
    charge(meter, model, DataView(prompt=signal.prompt, text=signal.text).of(samples), (signal,))
    exact = isinstance(signal, Effort)  # the others' own work on logits and states is not all counted
    assert meter.cost.flops == pytest.approx(counted.flops, rel=1e-9 if exact else 0.03)
    tokens = 44 if not signal.prompt else 160  # the begin token, and ten of each answer
    assert meter.cost.tokens_forward == tokens
    assert meter.cost.tokens_backward == (tokens if signal.name == "effort" else 0)


@pytest.mark.parametrize("family", ["olmo2", "smollm3", "odd_llama"])
@pytest.mark.parametrize("parameters", ["last_v_b", "all_lora"])
def test_the_meter_is_told_what_was_computed_also_where_attention_runs_in_full(
    family: str, parameters: str
) -> None:
    config = odd_llama()(**SHAPE) if family == "odd_llama" else AutoConfig.for_model(family, **SHAPE)
    model = adapted(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))
    assert batches(model.config) and forward_flops(
        model.config, [8]
    )  # found before, since that work is not counted
    rows = np.random.default_rng(0).integers(1, 60, (4, 40)).tolist()
    samples, meter = TokenizedSamples.of_rows(list("abcd"), rows, [30] * 4, begin=1), Meter()
    with FlopCounter() as counted:
        score(model, samples, Effort(parameters), batch_tokens=1000)
    charge(meter, model, samples, (Effort(parameters),))
    assert meter.cost.flops == pytest.approx(counted.flops, rel=1e-9)
