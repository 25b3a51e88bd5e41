"""Exact per-sample gradients of a whole batch from one forward and one backward pass.

The loss is the sum over samples of each sample's own mean answer cross-entropy. So the rows of its gradient with
respect to a layer's output belong to one sample each. For a linear layer with inputs x (T, in) and output gradients
g (T, out) of one sample, the gradient of the weight is g^T x (Goodfellow 2015, arXiv:1510.01799). A reducer turns
these pairs into a value per sample; the squared norm is one of them.

Parameters do not require gradients, only the outputs of these layers do. So nothing before the first of them keeps
a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from staff.errors import UserError
from staff.scoring.positions import Positions, last_block, last_block_at, model_name, scoring_mode, widened
from staff.scoring.signal import check_parameters

CHUNK = 128
"""Positions whose probabilities are in memory at the same time."""


@dataclass(frozen=True)
class LayerGradient:
    """The gradient of one linear layer, as a pair of matrices for each sample.

    Attributes:
        x: inputs of the layer, (B, T, in).
        g: gradients of its outputs, (B, T, out).
        embedded: if the layer's weight is tied to the embedding, the token ids (B, T) and the gradient (B, T, in)
            that each position adds to its token's row.
    """

    name: str
    layer: nn.Linear
    x: Tensor
    g: Tensor
    embedded: tuple[Tensor, Tensor] | None = None


class Reducer(Protocol):
    """Turns gradients into a value per sample. The values of all layers are added up."""

    def of_layer(self, gradient: LayerGradient) -> Tensor:
        """The values of a batch for one linear layer: (B, *shape)."""
        ...

    def of_parameter(self, name: str, gradient: Tensor) -> Tensor:
        """The value of a single sample for one parameter, from its gradient: (*shape,)."""
        ...


class SquaredNorm:
    """The squared L2 norm of the gradient: (B,)."""

    def of_layer(self, gradient: LayerGradient) -> Tensor:
        own = squared_weight_gradient_norms(gradient.x, gradient.g, bias=gradient.layer.bias is not None)
        if gradient.embedded is None:
            return own
        return _squared_tied_norms(own, gradient.x, gradient.g, *gradient.embedded)

    def of_parameter(self, name: str, gradient: Tensor) -> Tensor:
        return widened(gradient).square().sum()


@dataclass(frozen=True)
class BatchGradients:
    """Gradients of a batch as pairs of input and output gradient of its linear layers, read through a reducer.

    Attributes:
        at: the positions at which the last block ran. The tensors of its layers have these positions only.
        embedding: the input embedding, if its weight is tied to one of the layers.
    """

    names: Mapping[nn.Module, str]
    inputs: Mapping[nn.Module, Tensor]
    outputs: Mapping[nn.Module, Tensor]
    at: Positions
    input_ids: Tensor
    embedding: Any = None

    def reduce(self, reducer: Reducer) -> Tensor:
        """The reducer's values, summed over layers: (B, *shape)."""
        return torch.stack([reducer.of_layer(gradient) for gradient in self]).sum(0)

    def __iter__(self) -> Iterator[LayerGradient]:
        for layer, name in self.names.items():
            assert isinstance(layer, nn.Linear)
            x, g = self.at.by_sample(self.inputs[layer]), self.at.by_sample(self.outputs[layer])
            tied = self.embedding is not None and layer.weight is self.embedding.weight
            yield LayerGradient(name, layer, x, g, (self.input_ids, self._embedded()) if tied else None)

    def _embedded(self) -> Tensor:
        """What each position adds to its token's row of the embedding's gradient. Gemma 3 scales embeddings."""
        return widened(self.outputs[self.embedding]) * getattr(self.embedding, "embed_scale", 1.0)


@dataclass(frozen=True)
class SampleGradients:
    """The gradients of a single sample by parameter, computed by autograd."""

    gradients: Mapping[str, Tensor]

    def reduce(self, reducer: Reducer) -> Tensor:
        return torch.stack([reducer.of_parameter(name, g) for name, g in self.gradients.items()]).sum(0)[None]


Gradients = BatchGradients | SampleGradients


@dataclass
class _Captured:
    """Inputs and outputs of layers, in the order in which they run, kept by a forward hook."""

    model: Any
    inputs: dict[nn.Module, Tensor] = field(default_factory=dict)
    outputs: dict[nn.Module, Tensor] = field(default_factory=dict)

    def run(self, input_ids: Tensor, layers: Mapping[str, nn.Module]) -> Tensor:
        """The logits (S, V) of the model, whose layers (by name) are captured."""
        with ExitStack() as stack:
            for layer in layers.values():
                stack.enter_context(layer.register_forward_hook(self))
            logits = self.model(input_ids=input_ids, use_cache=False).logits.squeeze(0)
        if unused := [name for name, layer in layers.items() if layer not in self.outputs]:
            raise UserError(
                f"{model_name(self.model)} does not use {unused[0]} (a merged or inactive adapter?): activate it."
            )
        return logits

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if layer in self.outputs:
            raise UserError(
                f"{model_name(self.model)} uses a layer twice ({layer}): "
                "exact per-sample gradients are not possible."
            )
        self.inputs[layer] = args[0].detach()
        self.outputs[layer] = output if output.requires_grad else output.requires_grad_()


def batch_gradients(
    model: Any,
    layers: Mapping[str, nn.Linear],
    input_ids: Tensor,
    labels: Tensor,
    at: Positions | None = None,
    observe: Callable[[Tensor], None] | None = None,
) -> BatchGradients:
    """Gradients of each sample's own mean answer cross-entropy with respect to linear layers.

    Args:
        model: a causal LM, exact in batches (`staff.scoring.exact`), also as a PeftModel, in `scoring_mode`.
        layers: by name, as from `gradient_layers`.
        input_ids: (B, T), padded on the right, where a causal mask hides padding from all labels.
        labels: (B, T), unshifted, -100 where there is no label.
        at: positions whose logits are computed; by default those that predict labels.
        observe: called with the logits (S, V) at these positions. Without it their memory is used for gradients.

    Raises:
        UserError: a model for which this is not exact, or that does not use one of the layers.
    """
    if len({id(layer.weight) for layer in layers.values()}) < len(layers):
        raise UserError(
            f"{model_name(model)} shares one weight between layers: exact per-sample gradients are not possible."
        )
    predictions = Positions.of_predictions(labels)
    at = at or predictions
    embedding = model.get_input_embeddings()
    tied = any(layer.weight is embedding.weight for layer in layers.values())
    with torch.enable_grad(), last_block_at(model, at):
        captured = _Captured(model)
        logits = captured.run(input_ids, {**layers, **({"the embedding": embedding} if tied else {})})
        wanted = predictions.out_of(at, logits)
        values = wanted.detach()
        if observe is not None:
            observe(logits.detach())
            values = values.clone()  # slopes replace them
        found = torch.autograd.grad(wanted, list(captured.outputs.values()), to_slopes(values, predictions))
    names: dict[nn.Module, str] = {layer: name for name, layer in layers.items()}
    gradients = dict(zip(captured.outputs, found, strict=True))
    return BatchGradients(names, captured.inputs, gradients, at, input_ids, embedding if tied else None)


def layer_gradient_norms(
    model: Any, layers: Mapping[str, nn.Linear], input_ids: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    """Norms of each sample's gradient with respect to linear layers (weight and bias), by name: (B,)."""
    with scoring_mode(model):
        gradients = batch_gradients(model, layers, input_ids, labels)
    return {gradient.name: SquaredNorm().of_layer(gradient).sqrt() for gradient in gradients}


def squared_weight_gradient_norms(x: Tensor, g: Tensor, bias: bool) -> Tensor:
    """Squared norm of sum over t of g_t x_t^T, and of sum g_t for a bias: (B,).

    Args:
        x: inputs of the layer, (B, T, in).
        g: gradients of its outputs, (B, T, out).
    """
    x, g = widened(x), widened(g)
    (length, wide), tall = x.shape[1:], g.shape[2]
    if length * (wide + tall) < wide * tall:  # two Gram matrices cost less than the gradient
        squared = ((x @ x.mT) * (g @ g.mT)).sum((1, 2)).clamp_min(0)
    else:
        squared = (g.mT @ x).square().sum((1, 2))
    return squared + g.sum(1).square().sum(1) if bias else squared


def _squared_tied_norms(own: Tensor, x: Tensor, g: Tensor, input_ids: Tensor, e: Tensor) -> Tensor:
    """Squared norm of the gradient of a tied head and embedding: (B,).

    The embedding's gradient adds e_t to the row of the token at position t, and the head's gradient is the sum over
    l of g_l x_l^T. The inner products of the two are computed without forming either matrix.

    Args:
        own: squared norm of the head's gradient, (B,).
        x, g: inputs of the head and gradients of its outputs, (B, L, D) and (B, L, V).
        e: gradients of the embedding's outputs, (B, T, D).
    """
    x, g = widened(x), widened(g)
    same_token = input_ids[:, :, None] == input_ids[:, None, :]
    embedding = ((e @ e.mT) * same_token).sum((1, 2))
    tokens = input_ids[:, None, :].expand(-1, g.shape[1], -1)
    cross = ((x @ e.mT) * g.gather(2, tokens)).sum((1, 2))
    return (own + 2 * cross + embedding).clamp_min(0)


def to_slopes(logits: Tensor, at: Positions) -> Tensor:
    """Replace logits at `at` by the gradient of the sum of the samples' mean cross-entropies: (L, V).

    The closed form is (softmax - onehot) / tokens of the sample. Autograd would need three more matrices of this
    size. This needs none, and a few rows at a time stay in a processor's caches.
    """
    counts = at.counts.index_select(0, at.samples)
    for z, y, count in zip(logits.split(CHUNK), at.targets.split(CHUNK), counts.split(CHUNK), strict=True):
        slopes = widened(z).softmax(-1)
        slopes.scatter_add_(-1, y[:, None], slopes.new_full((len(slopes), 1), -1.0))
        z.copy_(slopes.div_(count[:, None]))
    return logits


def gradient_layers(model: Any, parameters: str) -> dict[str, nn.Linear]:
    """The linear layers with these parameters (one of `staff.scoring.signal.PARAMETERS`), by name.

    Raises:
        UserError: a model without such layers, or with LoRA weights outside linear layers.
    """
    check_parameters(parameters)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    layers = {name: layer for name, layer in linear.items() if ".lora_A." in name or ".lora_B." in name}
    if parameters == "all_linear":
        if any(".lora_" in name for name, _ in model.named_parameters()):
            raise UserError("gradient=all_linear is for a model without adapters: merge them first.")
        return linear
    covered = {id(parameter) for layer in layers.values() for parameter in layer.parameters()}
    for name, parameter in model.named_parameters():
        if ".lora_" in name and id(parameter) not in covered:
            raise UserError(
                f"{name} is not a weight of a linear LoRA layer: exact per-sample gradients are for plain LoRA."
            )
    if parameters == "last_v_b":
        inside = set(last_block(model).self_attn.v_proj.modules())
        layers = {name: layer for name, layer in layers.items() if layer in inside and ".lora_B." in name}
    if not layers:
        raise _no_such_layer(model, parameters)
    return layers


def gradient_parameters(model: Any, parameters: str) -> dict[str, nn.Parameter]:
    """The parameters (one of `staff.scoring.signal.PARAMETERS`) of a model of any architecture, by name."""
    check_parameters(parameters)
    named = dict(model.named_parameters())
    if parameters == "all_linear":
        layers = gradient_layers(model, parameters)
        return {f"{name}.{part}": p for name, layer in layers.items() for part, p in layer.named_parameters()}
    names = [name for name in named if ".lora_" in name]
    if parameters == "last_v_b":
        values = [name for name in names if ".v_proj.lora_B." in name]
        names = [name for name in values if name.rpartition(".")[0] == values[-1].rpartition(".")[0]]
    if not names:
        raise _no_such_layer(model, parameters)
    return {name: named[name] for name in names}


def _no_such_layer(model: Any, parameters: str) -> UserError:
    return UserError(
        f"gradient={parameters}: {model_name(model)} has no such LoRA layer; add it to the LoRA target modules, or "
        "choose gradient=all_lora."
    )
