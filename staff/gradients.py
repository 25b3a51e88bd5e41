"""Exact per-sample gradient norms of a whole batch from one forward and one backward pass.

The loss is the sum over samples of each sample's own mean answer cross-entropy, so the gradient of the loss
with respect to a layer's output holds, row by row, what each sample contributes. For a linear layer with
inputs x (T, in) and output gradients g (T, out) of one sample, the gradient of the weight is g^T x (Goodfellow
2015, arXiv:1510.01799): its norm needs no backward pass per sample.

Two savings leave every number as it is. No parameter asks for a gradient, the wanted outputs do: all that
runs before the first of them keeps no graph. And nothing after the last block's attention mixes positions, so
the output projection and MLP of that block, the final norm and the head run at label positions only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from staff.errors import UserError

IGNORED = -100

# Decoders whose block feeds `input_layernorm` to the attention alone, and whose attention is causal and ends
# in `o_proj`; everything else in them works on one position at a time. Checked layer by layer in the tests.
ARCHITECTURES = ("llama", "mistral", "qwen2", "gemma", "gemma2", "gemma3_text")


@dataclass(frozen=True)
class Positions:
    """The L labelled positions of a padded batch (B, T), sample after sample.

    Attributes:
        index: (L,) positions in the flattened batch.
        targets: (L,) the label of each.
        counts: (B,) labelled positions of each sample.
    """

    index: Tensor
    targets: Tensor
    counts: Tensor

    @classmethod
    def of_answers(cls, labels: Tensor) -> Positions:
        """Where the labelled tokens themselves stand; labels (B, T), -100 where there is none."""
        labelled = labels != IGNORED
        return cls(labelled.flatten().nonzero()[:, 0], labels[labelled], labelled.sum(1))

    @classmethod
    def of_predictions(cls, labels: Tensor) -> Positions:
        """Where the labelled tokens are predicted: one position earlier."""
        return cls.of_answers(F.pad(labels[:, 1:], (0, 1), value=IGNORED))

    def gather(self, hidden: Tensor) -> Tensor:
        """(B, T, D) -> (1, L, D)."""
        return hidden.flatten(0, 1).index_select(0, self.index)[None]

    def spread(self, gathered: Tensor) -> Tensor:
        """(1, L, D) -> (B, max counts, D), zero where a sample has fewer."""
        filled = torch.arange(int(self.counts.max()), device=self.counts.device) < self.counts[:, None]
        spread = gathered.new_zeros(*filled.shape, gathered.shape[-1])
        spread[filled] = gathered[0]
        return spread

    def mean(self, values: Tensor) -> Tensor:
        """Mean over each sample's positions: (L, ...) -> (B, ...), NaN for a sample without any."""
        return torch.segment_reduce(values, "mean", lengths=self.counts, axis=0)


def per_sample_gradient_norms(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor, gradient: str
) -> Tensor:
    """L2 norm of the gradient of each sample's own mean answer cross-entropy: (B,), float32 or wider.

    Args:
        model: a causal LM of `ARCHITECTURES` with LoRA adapters (peft), wrapped in a PeftModel or not.
        input_ids: (B, T), padded to the right.
        attention_mask: (B, T), or None: a causal mask already hides padding to the right from every label.
        labels: (B, T), -100 where there is none, unshifted.
        gradient: "last_v_b", the last block's v_proj lora_B; "all_lora", all LoRA parameters.

    Raises:
        UserError: a model for which this would not be exact, or without the adapters asked for.
    """
    layers = lora_layers(model, gradient)
    norms = layer_gradient_norms(model, layers, input_ids, attention_mask, labels)
    return torch.stack(list(norms.values())).square().sum(0).sqrt()


def layer_gradient_norms(
    model: nn.Module,
    layers: Mapping[str, nn.Linear],
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor,
) -> dict[str, Tensor]:
    """As `per_sample_gradient_norms`, but of each of these linear layers (weight and bias) by name: (B,)."""
    weights = [layer.weight for layer in layers.values()]
    if len({id(weight) for weight in weights}) < len(weights):
        raise UserError(
            f"{_name(model)} shares one weight between layers: exact per-sample norms are not possible."
        )
    positions = Positions.of_predictions(labels)
    inputs: dict[nn.Module, Tensor] = {}
    outputs: dict[nn.Module, Tensor] = {}

    def keep(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if layer in outputs:
            raise UserError(
                f"{_name(model)} uses a layer twice ({layer}): exact per-sample norms are not possible."
            )
        inputs[layer] = args[0].detach()
        outputs[layer] = output if output.requires_grad else output.requires_grad_()

    with ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(scoring_mode(model))
        stack.enter_context(last_block_at(model, positions))
        for layer in layers.values():
            stack.enter_context(layer.register_forward_hook(keep))
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[0]
        if unused := [name for name, layer in layers.items() if layer not in outputs]:
            raise UserError(
                f"{_name(model)} does not use {unused[0]} (a merged or inactive adapter?): activate it."
            )
        loss = positions.mean(token_losses(logits, positions.targets)).sum()
        gradients = torch.autograd.grad(loss, list(outputs.values()))

    def norms(layer: nn.Linear, x: Tensor, g: Tensor) -> Tensor:
        if x.shape[0] < len(labels):
            x, g = positions.spread(x), positions.spread(g)
        return _weight_gradient_norms(x, g, bias=layer.bias is not None)

    by_layer = dict(zip(outputs, gradients, strict=True))
    return {name: norms(layer, inputs[layer], by_layer[layer]) for name, layer in layers.items()}


def _weight_gradient_norms(x: Tensor, g: Tensor, bias: bool) -> Tensor:
    """Norm over t of sum g_t x_t^T, from x (B, T, in) and g (B, T, out), and of sum g_t for a bias: (B,)."""
    x, g = (tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in (x, g))
    (length, wide), tall = x.shape[1:], g.shape[2]
    if length * (wide + tall) < wide * tall:  # two Gram matrices are cheaper than the gradient itself
        squared = ((x @ x.mT) * (g @ g.mT)).sum((1, 2)).clamp_min(0)
    else:
        squared = (g.mT @ x).square().sum((1, 2))
    return (squared + g.sum(1).square().sum(1) if bias else squared).sqrt()


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each token, in float32 or wider: (L, V), (L,) -> (L,)."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")


def lora_layers(model: nn.Module, gradient: str) -> dict[str, nn.Linear]:
    """The linear layers that hold the LoRA parameters which `gradient` means, by name."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    layers = {name: layer for name, layer in linear.items() if ".lora_A." in name or ".lora_B." in name}
    covered = {id(parameter) for layer in layers.values() for parameter in layer.parameters()}
    for name, parameter in model.named_parameters():
        if ".lora_" in name and id(parameter) not in covered:
            raise UserError(
                f"{name} is no weight of a linear LoRA layer: exact per-sample norms are for plain LoRA."
            )
    if gradient == "last_v_b":
        inside = set(last_block(model).self_attn.v_proj.modules())
        layers = {name: layer for name, layer in layers.items() if layer in inside and ".lora_B." in name}
    elif gradient != "all_lora":
        raise UserError(f"gradient={gradient!r} is unknown: choose 'last_v_b' or 'all_lora'.")
    if not layers:
        raise UserError(
            f"gradient={gradient}: {_name(model)} has no such LoRA layer; add it to the LoRA target modules."
        )
    return layers


@contextmanager
def scoring_mode(model: nn.Module) -> Iterator[None]:
    """No dropout, and no parameter asks for a gradient; as it was afterwards."""
    training, trainable = model.training, [p for p in model.parameters() if p.requires_grad]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        model.train(training)
        for parameter in trainable:
            parameter.requires_grad_()


@contextmanager
def last_block_at(model: nn.Module, positions: Positions) -> Iterator[None]:
    """Run what follows the last block's attention at these positions only: logits come as (1, L, V).

    The block is handed the gathered positions, its attention the whole sequence: the norm in front of the
    attention is given back what was set aside, and the attention's output is gathered before `o_proj`.
    """
    block = last_block(model)
    whole: list[Tensor] = []

    def narrow(_, args: tuple) -> tuple:
        whole.append(args[0])
        return (positions.gather(args[0]), *args[1:])

    with (
        block.register_forward_pre_hook(narrow),
        block.input_layernorm.register_forward_pre_hook(lambda _, args: (whole.pop(),)),
        block.self_attn.o_proj.register_forward_pre_hook(lambda _, args: (positions.gather(args[0]),)),
    ):
        yield


def last_block(model: Any) -> Any:
    """The last decoder block; refuses an architecture that is not known to be exact."""
    config = model.config
    if config.model_type not in ARCHITECTURES or getattr(config, "use_bidirectional_attention", False):
        raise UserError(
            f"{_name(model)} (model type {config.model_type!r}) cannot be scored exactly: its model type must be "
            f"one of {', '.join(ARCHITECTURES)}, with causal attention."
        )
    return model.get_decoder().layers[: config.num_hidden_layers][-1]


def _name(model: Any) -> str:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(base).__name__
