from __future__ import annotations

import logging
from collections.abc import Iterator
from decimal import Decimal, getcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from support.golden import recorded
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM, CohereConfig
from transformers.models.llama import LlamaConfig

from staff import scoring
from staff.cost import Meter
from staff.errors import UserError
from staff.gradients import Positions
from staff.scoring import Asked, el2n_scores, score_samples
from staff.tokens import TokenizedSamples

TINY = Path(scoring.__file__).parent / "assets" / "tiny" / "small"
BROKEN_TOKEN = 60


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Small matrices gain nothing by threads, and wait long for them on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        **changes,
    )
    return AutoModelForCausalLM.from_config(config)


def tiny_family() -> Any:
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)


@pytest.fixture(params=[random_llama, tiny_family], ids=["random", "tiny"])
def model(request: pytest.FixtureRequest) -> Any:
    """With adapters whose A and B are both away from zero."""
    model = get_peft_model(request.param(), LoraConfig(r=3, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def random_samples(n: int = 17) -> TokenizedSamples:
    rng = np.random.default_rng(0)
    prompts, answers = rng.integers(1, 30, n), rng.integers(1, 9, n)
    rows = [rng.integers(1, BROKEN_TOKEN, p + a).tolist() for p, a in zip(prompts, answers, strict=True)]
    return TokenizedSamples([f"s{i}" for i in range(n)], rows, prompts.tolist())


def score(
    model: Any, samples: TokenizedSamples, signal: str, batch_tokens: int = 64, meter: Any = None, **how: Any
) -> np.ndarray:
    asked = Asked((signal,), **how)
    return score_samples(model, samples, asked, batch_tokens=batch_tokens, pad_token_id=0, meter=meter)[signal]


def one_at_a_time(model: Any, samples: TokenizedSamples, signal: str, **how: Any) -> np.ndarray:
    """Each signal from the model's own forward pass over one whole sample, and its own backward pass."""
    model.eval()
    kept = ".lora_"
    if how.get("gradient") == "last_v_b":
        kept = f"layers.{model.config.num_hidden_layers - 1}.self_attn.v_proj.lora_B"
    wanted = [parameter for name, parameter in model.named_parameters() if kept in name]
    values = []
    for i in range(len(samples)):
        ids, labels = torch.tensor([samples.input_ids[i]]), torch.tensor([samples.labels(i)])
        out = model(input_ids=ids, labels=labels, output_hidden_states=True)
        answer = labels[0] >= 0
        z, y = out.logits[0, :-1][answer[1:]].double(), labels[0, 1:][answer[1:]]
        if signal == "effort":
            gradients = torch.autograd.grad(out.loss, wanted)
            values.append(torch.cat([g.flatten() for g in gradients]).norm())
        elif signal == "loss":
            values.append(out.loss)
        elif signal == "embedding":
            values.append(out.hidden_states[-1][0, answer].mean(0))
        elif how.get("variant") == "official":
            z, y = out.logits[0, answer], labels[0, answer]
            values.append((z - torch.eye(z.shape[1])[y]).square().mean().sqrt())
        else:
            values.append((z.softmax(-1) - torch.eye(z.shape[1])[y]).norm(dim=-1).mean())
    return torch.stack(values).detach().numpy()


SIGNALS = [
    ("effort", {"gradient": "last_v_b"}),
    ("effort", {"gradient": "all_lora"}),
    ("el2n", {"variant": "standard"}),
    ("el2n", {"variant": "official"}),
    ("loss", {}),
    ("embedding", {}),
]


@pytest.mark.parametrize(("signal", "how"), SIGNALS)
def test_batched_scores_equal_one_sample_at_a_time(model: Any, signal: str, how: dict[str, Any]) -> None:
    samples = random_samples()
    expected = one_at_a_time(model, samples, signal, **how)
    np.testing.assert_allclose(score(model, samples, signal, **how), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("variant", ["standard", "official"])
@pytest.mark.parametrize("gradient", ["last_v_b", "all_lora"])
def test_several_signals_come_from_one_pass(model: Any, gradient: str, variant: str) -> None:
    samples, signals = random_samples(), ("loss", "embedding", "effort", "el2n")
    apart = {s: score(model, samples, s, gradient=gradient, variant=variant) for s in signals}
    shapes = batch_shapes(model)
    for asked in (signals, signals[:2], ("el2n", "embedding")):
        how = Asked(asked, gradient=gradient, variant=variant)
        together = score_samples(model, samples, how, batch_tokens=10_000, pad_token_id=0)
        assert set(together) == set(asked) and len(shapes) == 1
        shapes.clear()
        for signal, values in together.items():
            np.testing.assert_allclose(values, apart[signal], rtol=1e-5, atol=1e-5)


def alone(model: Any, samples: TokenizedSamples, signal: str, **how: Any) -> np.ndarray:
    asked = Asked((signal,), **how)
    return score_samples(model, samples, asked, batch_tokens=9, pad_token_id=0, one_at_a_time=True)[signal]


@pytest.mark.parametrize(("signal", "how"), SIGNALS)
def test_one_at_a_time_gives_the_same_scores(model: Any, signal: str, how: dict[str, Any]) -> None:
    samples = random_samples(5)
    expected = score(model, samples, signal, **how)
    np.testing.assert_allclose(alone(model, samples, signal, **how), expected, rtol=1e-4, atol=1e-6)


def test_an_architecture_unknown_to_the_batched_pass_is_scored_only_when_that_is_asked_for() -> None:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    cohere = AutoModelForCausalLM.from_config(CohereConfig(**shape, num_attention_heads=4))
    model = get_peft_model(cohere, LoraConfig(target_modules=["v_proj"]))
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    samples = random_samples(4)
    for signal in ("effort", "el2n", "embedding"):
        with pytest.raises(UserError, match=r"scoring\.one_at_a_time=true"):
            score(model, samples, signal)
        expected = one_at_a_time(model, samples, signal, gradient="last_v_b")
        np.testing.assert_allclose(alone(model, samples, signal), expected, rtol=1e-4, atol=1e-6)
    assert trainable == [name for name, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize(("signal", "how"), SIGNALS)
def test_scores_do_not_depend_on_batch_size_padding_or_order(model: Any, signal: str, how: dict[str, Any]) -> None:
    samples = random_samples()
    single = score(model, samples, signal, batch_tokens=1, **how)
    tolerance = {"rtol": 1e-5, "atol": 1e-5 * float(np.abs(single).max()) if signal == "embedding" else 0}
    np.testing.assert_allclose(score(model, samples, signal, **how), single, **tolerance)
    np.testing.assert_allclose(score(model, samples, signal, batch_tokens=10_000, **how), single, **tolerance)
    shuffled = np.random.default_rng(1).permutation(len(samples))
    np.testing.assert_allclose(score(model, samples.take(shuffled), signal, **how), single[shuffled], **tolerance)


def test_scores_have_the_promised_shapes_and_types() -> None:
    model, samples = random_llama(), random_samples(3)
    assert score(model, samples, "loss").dtype == np.float64
    embedding = score(model, samples, "embedding")
    assert (embedding.shape, embedding.dtype) == ((3, 32), np.float32)
    assert len(score(model, samples.take([]), "loss")) == 0


def batch_shapes(model: Any) -> list[tuple[int, int]]:
    shapes: list[tuple[int, int]] = []
    model.register_forward_pre_hook(
        lambda _, args, kw: shapes.append(tuple(kw["input_ids"].shape)), with_kwargs=True
    )
    return shapes


def test_batches_keep_to_the_token_budget_and_a_longer_sample_goes_alone() -> None:
    model, samples = random_llama(), random_samples(40)
    shapes = batch_shapes(model)
    score(model, samples, "loss", batch_tokens=30)
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
    model, samples = random_llama(), random_samples()
    expected = score(model, samples, "loss")

    def small_memory(_, args: tuple, kwargs: dict[str, Tensor]) -> None:
        if kwargs["input_ids"].numel() > 70:
            raise error

    model.register_forward_pre_hook(small_memory, with_kwargs=True)
    shapes = batch_shapes(model)
    with caplog.at_level(logging.WARNING, "staff.scoring"):
        np.testing.assert_allclose(score(model, samples, "loss", batch_tokens=500), expected, rtol=1e-5)
    assert "out of memory" in caplog.text and max(rows * length for rows, length in shapes) <= 70


def test_a_sample_too_large_for_the_memory_is_named() -> None:
    model, samples = random_llama(), random_samples()

    def no_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    model.register_forward_pre_hook(no_memory)
    longest = samples.ids[int(samples.lengths.argmax())]
    with pytest.raises(UserError, match=f"'{longest}' .* does not fit in memory"):
        score(model, samples, "loss")


def test_other_errors_of_the_model_are_not_taken_for_lack_of_memory() -> None:
    samples = TokenizedSamples(["a"], [[1, 99]], [1])
    with pytest.raises(IndexError):
        score(random_llama(), samples, "loss")


@pytest.mark.parametrize(("signal", "how"), SIGNALS)
def test_a_score_that_is_not_finite_is_refused_with_the_sample_named(signal: str, how: dict[str, Any]) -> None:
    model = get_peft_model(random_llama(), LoraConfig(target_modules=["v_proj"]))
    model.get_input_embeddings().weight.data[BROKEN_TOKEN] = torch.nan
    samples = random_samples()
    samples.input_ids[7][0] = BROKEN_TOKEN
    with pytest.raises(UserError, match=r"'s7'.*not finite"):
        score(model, samples, signal, **how)


def test_unknown_settings_are_refused() -> None:
    model, samples = random_llama(), random_samples()
    with pytest.raises(UserError, match="signal='grand' is unknown: choose"):
        score(model, samples, "grand")
    with pytest.raises(UserError, match="variant='raw' is unknown: choose"):
        score(model, samples, "el2n", variant="raw")
    with pytest.raises(UserError, match="gradient='all' is unknown: choose"):
        score(model, samples, "effort", gradient="all")


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


def test_el2n_in_chunks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples = random_llama(), random_samples()
    whole = score(model, samples, "el2n")
    monkeypatch.setattr(scoring, "EL2N_CHUNK", 2)
    np.testing.assert_array_equal(score(model, samples, "el2n"), whole)


class FlopCounter(TorchDispatchMode):
    """What FlopCounterMode counts, without its module hooks, which autograd.grad refuses."""

    flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if count := flop_registry.get(func._overloadpacket):
            self.flops += count(*args, **(kwargs or {}), out_val=out)
        return out


@pytest.mark.parametrize(("signal", "how"), SIGNALS)
def test_the_meter_is_told_what_was_computed(signal: str, how: dict[str, Any]) -> None:
    model = get_peft_model(random_llama(attn_implementation="eager"), LoraConfig(r=2, target_modules="all-linear"))
    rows = np.random.default_rng(0).integers(1, 60, (4, 40)).tolist()
    samples = TokenizedSamples(list("abcd"), rows, [30] * 4)
    meter = Meter()
    with FlopCounter() as counted:
        score(model, samples, signal, batch_tokens=1000, meter=meter, **how)
    # All LoRA parameters: the gradient at the input of the first block, here one of two, is counted but not needed.
    assert meter.cost.flops == pytest.approx(counted.flops, rel=0.1 if how.get("gradient") == "all_lora" else 0.03)
    assert meter.cost.tokens_forward == 160
    assert meter.cost.tokens_backward == (160 if signal == "effort" else 0)
