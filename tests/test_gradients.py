"""Exact gradients of single samples out of one batched pass, against autograd on one sample at a time."""

from __future__ import annotations

import zlib
from typing import Any

import pytest
import support.tiny
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from support.tiny import FAMILIES, SHAPE, adapted, config_of, odd_llama, random_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, CohereConfig

from staff.errors import UserError
from staff.models.spec import ARCHITECTURES
from staff.scoring.exact import NARROWED, WHOLE, batches
from staff.scoring.gradients import (
    LayerGradient,
    SampleGradients,
    SquaredNorm,
    batch_gradients,
    gradient_layers,
    gradient_parameters,
    layer_gradient_norms,
)
from staff.scoring.positions import scoring_mode

LENGTHS = [(5, 3), (9, 4), (12, 1), (4, 6), (2, 2)]  # prompt and answer tokens of the batch's samples


def tiny_model(architecture: str = "llama", *, trained: bool = False, **lora: Any) -> Any:
    """A random two-layer model with fresh adapters (B = 0), or with both A and B away from zero."""
    return adapted(random_model(architecture), std=0.2 if trained else 0, **{"lora_alpha": 6, **lora})


def padded_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    longest = max(p + a for p, a in LENGTHS)
    input_ids = torch.randint(1, 61, (len(LENGTHS), longest), generator=generator)
    labels = input_ids.clone()
    for row, (prompt, answer) in enumerate(LENGTHS):
        input_ids[row, prompt + answer :] = 0
        labels[row, :prompt] = labels[row, prompt + answer :] = -100
    return input_ids, labels


def per_sample_gradient_norms(model: Any, ids: Tensor, labels: Tensor, which: str) -> Tensor:
    """Norms of the gradient by all of these parameters together: (B,)."""
    with scoring_mode(model):
        gradients = batch_gradients(model, gradient_layers(model, which), ids, labels)
    return gradients.reduce(SquaredNorm()).sqrt()


def one_at_a_time(model: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Norms by weight, from the model's own loss and one backward pass a sample."""
    model.eval()
    for weight in weights.values():
        weight.requires_grad_()
    rows = []
    for lengths, input_ids, labels in zip(LENGTHS, *padded_batch(), strict=True):
        n = sum(lengths)
        loss = model(input_ids=input_ids[None, :n], labels=labels[None, :n]).loss
        rows.append([g.norm() for g in torch.autograd.grad(loss, list(weights.values()))])
    return {name: torch.stack(column) for name, column in zip(weights, zip(*rows, strict=True), strict=True)}


def weights_of(layers: dict[str, nn.Linear]) -> dict[str, Tensor]:
    return {f"{name}.{kind}": p for name, layer in layers.items() for kind, p in layer.named_parameters()}


def assert_same(norms: Tensor, expected: Tensor, name: str = "") -> None:
    torch.testing.assert_close(norms, expected, rtol=1e-4, atol=1e-7, msg=lambda text: f"{name}: {text}")


def test_every_architecture_named_is_tested() -> None:
    assert set(support.tiny.ARCHITECTURES) == set(ARCHITECTURES)


@pytest.mark.parametrize("trained", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_norms_equal_one_sample_at_a_time_autograd_layer_by_layer(architecture: str, trained: bool) -> None:
    model = tiny_model(architecture, trained=trained)
    layers = gradient_layers(model, "all_lora")
    assert len(layers) == 2 * 7 * 2  # A and B of seven projections in two blocks
    expected = one_at_a_time(model, weights_of(layers))
    norms = layer_gradient_norms(model, layers, *padded_batch())
    for name in layers:
        assert_same(norms[name], expected[f"{name}.weight"], name)
        assert trained or (".lora_A." in name) == bool((norms[name] == 0).all())  # B = 0 hides A from the loss

    total = torch.stack(list(expected.values())).square().sum(0).sqrt()
    assert_same(per_sample_gradient_norms(model, *padded_batch(), "all_lora"), total)
    (last,) = [name for name in expected if "layers.1.self_attn.v_proj.lora_B" in name]
    assert_same(per_sample_gradient_norms(model, *padded_batch(), "last_v_b"), expected[last])


def test_double_precision_agrees_far_below_single() -> None:
    model = tiny_model("qwen2", trained=True)
    single = per_sample_gradient_norms(model, *padded_batch(), "all_lora")
    double = per_sample_gradient_norms(model.double(), *padded_batch(), "all_lora")
    assert double.dtype == torch.float64
    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=0)


def test_any_linear_layer_is_exact_with_bias_and_in_gram_form() -> None:
    model = random_model("qwen2")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    input_ids, labels = padded_batch()
    length = input_ids.shape[1]
    gram_is_cheaper = {length * (a.in_features + a.out_features) < a.weight.numel() for a in layers.values()}
    assert gram_is_cheaper == {True, False}  # both forms are used
    expected = one_at_a_time(model, weights_of(layers))
    norms = layer_gradient_norms(model, layers, input_ids, labels)
    for name in layers:
        bias = expected.get(f"{name}.bias", torch.zeros(len(labels)))
        assert_same(norms[name], torch.hypot(expected[f"{name}.weight"], bias), name)


@pytest.mark.parametrize("tied", [False, True], ids=["own head", "tied head"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_norms_over_all_linear_layers_equal_autograd_layer_by_layer(architecture: str, tied: bool) -> None:
    model = random_model(architecture, tie_word_embeddings=tied)
    layers = gradient_layers(model, "all_linear")
    assert len(layers) == 2 * 7 + 1  # seven projections in two blocks, and the head
    assert tied == (layers["lm_head"].weight is model.get_input_embeddings().weight)
    expected = one_at_a_time(model, weights_of(layers))
    norms = layer_gradient_norms(model, layers, *padded_batch())
    for name in layers:
        bias = expected.get(f"{name}.bias", torch.zeros(len(LENGTHS)))
        assert_same(norms[name], torch.hypot(expected[f"{name}.weight"], bias), name)
    total = torch.stack(list(expected.values())).square().sum(0).sqrt()
    assert_same(per_sample_gradient_norms(model, *padded_batch(), "all_linear"), total)


def test_adapters_with_a_bias_count_it() -> None:
    model = tiny_model(lora_bias=True)
    weights = weights_of(gradient_layers(model, "last_v_b"))
    assert len(weights) == 2
    expected = torch.stack(list(one_at_a_time(model, weights).values())).square().sum(0).sqrt()
    assert_same(per_sample_gradient_norms(model, *padded_batch(), "last_v_b"), expected)


def test_adapters_injected_without_a_peft_wrapper_are_found() -> None:
    model: Any = random_model()
    inject_adapter_in_model(LoraConfig(r=3, target_modules=["q_proj", "v_proj"]), model)
    (expected,) = one_at_a_time(model, weights_of(gradient_layers(model, "last_v_b"))).values()
    assert_same(per_sample_gradient_norms(model, *padded_batch(), "last_v_b"), expected)


@pytest.mark.parametrize("gradient", ["last_v_b", "all_lora"])
def test_padding_changes_nothing(gradient: str) -> None:
    model = tiny_model(trained=True)
    input_ids, labels = padded_batch()
    norms = per_sample_gradient_norms(model, input_ids, labels, gradient)
    wider = nn.functional.pad(input_ids, (0, 9), value=5), nn.functional.pad(labels, (0, 9), value=-100)
    torch.testing.assert_close(norms, per_sample_gradient_norms(model, *wider, gradient), rtol=1e-5, atol=0)


class Projected:
    """The gradient's product with a direction that is drawn for every parameter: a reducer of one's own."""

    def of_layer(self, gradient: LayerGradient) -> Tensor:
        along = self.direction(f"{gradient.name}.weight", gradient.layer.weight)
        return torch.einsum("bto,bti,oi->b", gradient.g, gradient.x, along)

    def of_parameter(self, name: str, gradient: Tensor) -> Tensor:
        return (gradient * self.direction(name, gradient)).sum()

    def direction(self, name: str, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))


@pytest.mark.parametrize("parameters", ["last_v_b", "all_lora"])
def test_a_reducer_of_ones_own_is_given_the_gradients_of_each_sample_by_the_parameters_names(
    parameters: str,
) -> None:
    model = tiny_model(trained=True)
    weights = gradient_parameters(model, parameters)
    assert list(weights) == [f"{name}.weight" for name in gradient_layers(model, parameters)]
    input_ids, labels = padded_batch()
    together = batch_gradients(model, gradient_layers(model, parameters), input_ids, labels)
    alone = []
    for row, length in enumerate(map(sum, LENGTHS)):
        loss = model(input_ids=input_ids[row, None, :length], labels=labels[row, None, :length]).loss
        gradients = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
        alone.append(SampleGradients(gradients).reduce(Projected()))
    torch.testing.assert_close(together.reduce(Projected()), torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_last_v_b_keeps_no_graph_before_the_last_value_projection(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(trained=True)
    first, last = model.get_decoder().layers
    in_graph: dict[str, bool] = {}
    first.register_forward_hook(lambda _, args, output: in_graph.update(first=output.requires_grad))
    last.self_attn.q_proj.register_forward_hook(lambda _, args, output: in_graph.update(q=output.requires_grad))
    last.self_attn.v_proj.register_forward_hook(lambda _, args, output: in_graph.update(v=output.requires_grad))
    backward = torch.autograd.grad
    passes = []
    monkeypatch.setattr(torch.autograd, "grad", lambda *args: passes.append(1) or backward(*args))
    per_sample_gradient_norms(model, *padded_batch(), "last_v_b")
    assert in_graph == {"first": False, "q": False, "v": True}
    assert len(passes) == 1


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_model(trained=True, lora_dropout=0.5).train()
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    norms = per_sample_gradient_norms(model, *padded_batch(), "all_lora")
    assert_same(norms, per_sample_gradient_norms(model, *padded_batch(), "all_lora"))  # no dropout
    assert model.training and trainable == [name for name, p in model.named_parameters() if p.requires_grad]
    assert all(p.grad is None for p in model.parameters())
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# ---------------------------------------------------------------- which classes are exact in batches


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_last_blocks_queries_run_at_the_positions_read_in_every_architecture_named(architecture: str) -> None:
    assert batches(random_model(architecture).config) == NARROWED


EXACT = {"llama": NARROWED, "qwen3": NARROWED, "gemma2": NARROWED, "granite": NARROWED}
EXACT |= {"smollm3": NARROWED, "olmo2": WHOLE, "stablelm": WHOLE}  # all layers of two have rotations


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_batches_are_found_by_a_test_of_a_small_instance(family: str) -> None:
    assert batches(config_of(family)) == EXACT.get(family)


@pytest.mark.parametrize("family", ["olmo2", "smollm3", "stablelm", "odd_llama"])
@pytest.mark.parametrize("layers", [3, 4])  # the fourth of SmolLM3 has no rotation
def test_norms_of_other_families_of_that_shape_equal_autograd_layer_by_layer(family: str, layers: int) -> None:
    fields = {**SHAPE, "num_hidden_layers": layers}
    config = odd_llama()(**fields) if family == "odd_llama" else AutoConfig.for_model(family, **fields)
    torch.manual_seed(0)
    model = adapted(AutoModelForCausalLM.from_config(config), lora_alpha=6)
    adapters = gradient_layers(model, "all_lora")
    expected = one_at_a_time(model, weights_of(adapters))
    norms = layer_gradient_norms(model, adapters, *padded_batch())
    for name in adapters:
        assert_same(norms[name], expected[f"{name}.weight"], name)
    (last,) = [name for name in expected if f"layers.{layers - 1}.self_attn.v_proj.lora_B" in name]
    assert_same(per_sample_gradient_norms(model, *padded_batch(), "last_v_b"), expected[last])


@pytest.mark.parametrize("reads", ["batch", "padding", "norm"])
def test_a_class_that_reads_other_samples_or_padding_is_scored_one_sample_at_a_time(reads: str, caplog) -> None:
    caplog.set_level("INFO")
    config = odd_llama()(**SHAPE, reads=reads)
    assert batches(config) is None and batches(config) is None
    (said,) = [record.message for record in caplog.records if "odd_llama" in record.message]
    assert "without exact batches: values of a small instance differ" in said
    with pytest.raises(UserError, match="one_at_a_time=true"):
        per_sample_gradient_norms(adapted(AutoModelForCausalLM.from_config(config)), *padded_batch(), "last_v_b")


def test_frequencies_that_depend_on_the_longest_sample_are_not_exact_in_batches() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert batches(random_model().config) and batches(random_model(rope_parameters=rope).config) is None


def test_the_test_of_a_class_changes_no_random_numbers_and_works_in_inference_mode() -> None:
    config = odd_llama()(**SHAPE, num_labels=5)
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert batches(config) == WHOLE
    assert torch.equal(torch.rand(4), expected)


def test_what_cannot_be_exact_is_refused_by_name() -> None:
    shape = {k: v for k, v in SHAPE.items() if k != "head_dim"}
    cohere = AutoModelForCausalLM.from_config(CohereConfig(**shape))
    with_adapter = get_peft_model(cohere, LoraConfig(target_modules=["v_proj"]))
    twice = tiny_model()
    twice.get_decoder().layers[0].mlp = twice.get_decoder().layers[1].mlp
    shared = tiny_model()
    one, other = (layer.self_attn.q_proj.lora_A["default"] for layer in shared.get_decoder().layers)
    one.weight = other.weight
    merged = tiny_model()
    merged.merge_adapter()
    bidirectional = tiny_model("gemma3_text")
    bidirectional.config.use_bidirectional_attention = True
    for model, gradient, sentence in [
        (with_adapter, "last_v_b", "CohereForCausalLM .*model type 'cohere'"),
        (twice, "all_lora", "LlamaForCausalLM uses a layer twice"),
        (shared, "all_lora", "shares one weight"),
        (merged, "all_lora", "merged or inactive"),
        (bidirectional, "last_v_b", "Gemma3ForCausalLM .*cannot be scored exactly"),
        (tiny_model(use_dora=True), "all_lora", "lora_magnitude_vector"),
        (tiny_model(target_modules=["q_proj"]), "last_v_b", "no such LoRA layer"),
        (tiny_model(), "all", "gradient='all' is unknown"),
        (tiny_model(), "all_linear", "without adapters: merge them"),
    ]:
        with pytest.raises(UserError, match=sentence):
            per_sample_gradient_norms(model, *padded_batch(), gradient)
