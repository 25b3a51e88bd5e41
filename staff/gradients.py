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

from collections.abc import Callable, Iterator, Mapping
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
ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")

GRADIENTS = ("last_v_b", "all_lora", "all_linear")


@dataclass(frozen=True)
class Positions:
    """L positions of a padded batch (B, T), sample after sample.

    Attributes:
        index: (L,) positions in the flattened batch, increasing.
        targets: (L,) the label that belongs to each.
        counts: (B,) positions of each sample.
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

    @classmethod
    def of_both(cls, labels: Tensor) -> Positions:
        """Where the labelled tokens stand or are predicted."""
        labelled = labels != IGNORED
        both = labelled | F.pad(labelled[:, 1:], (0, 1))
        return cls(both.flatten().nonzero()[:, 0], labels[both], both.sum(1))

    def out_of(self, others: Positions, values: Tensor) -> Tensor:
        """What belongs to these positions of values (S, ...) at `others`, which include them: (L, ...)."""
        if len(self.index) == len(others.index):
            return values
        return values.index_select(0, torch.searchsorted(others.index, self.index))

    def gather(self, hidden: Tensor) -> Tensor:
        """(B, T, D) -> (1, L, D)."""
        return hidden.flatten(0, 1).index_select(0, self.index)[None]

    def spread(self, gathered: Tensor) -> Tensor:
        """(1, L, D) -> (B, max counts, D), zero where a sample has fewer."""
        filled = torch.arange(int(self.counts.max()), device=self.counts.device) < self.counts[:, None]
        spread = gathered.new_zeros(*filled.shape, gathered.shape[-1])
        spread[filled] = gathered[0]
        return spread

    def by_sample(self, hidden: Tensor) -> Tensor:
        """`spread` where a layer ran at these positions alone; the whole batch (B, T, D) stays as it is."""
        return self.spread(hidden) if len(hidden) < len(self.counts) else hidden

    def mean(self, values: Tensor) -> Tensor:
        """Mean over each sample's positions: (L, ...) -> (B, ...), NaN for a sample without any."""
        return torch.segment_reduce(values, "mean", lengths=self.counts, axis=0)


Observer = Callable[[Tensor], None]
"""Told the logits (S, V) of the pass that norms are taken from."""


def per_sample_gradient_norms(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor,
    gradient: str,
    at: Positions | None = None,
    observe: Observer | None = None,
) -> Tensor:
    """L2 norm of the gradient of each sample's own mean answer cross-entropy: (B,), float32 or wider.

    Args:
        model: a causal LM of `ARCHITECTURES`, wrapped in a PeftModel or not.
        input_ids: (B, T), padded to the right.
        attention_mask: (B, T), or None: a causal mask already hides padding to the right from every label.
        labels: (B, T), -100 where there is none, unshifted.
        gradient: "last_v_b", the last block's v_proj lora_B; "all_lora", all LoRA parameters; "all_linear", all
            weights and biases of the linear layers of a model without adapters. Where the head shares its weight
            with the embedding, that is one weight with both gradients.
        at: positions at which logits are wanted; by default where the labelled tokens are predicted.
        observe: is told the logits at these positions.

    Raises:
        UserError: a model for which this would not be exact, or without the layers asked for.
    """
    layers = gradient_layers(model, gradient)
    norms = layer_gradient_norms(model, layers, input_ids, attention_mask, labels, at, observe)
    return torch.stack(list(norms.values())).square().sum(0).sqrt()


def layer_gradient_norms(
    model: Any,
    layers: Mapping[str, nn.Linear],
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor,
    at: Positions | None = None,
    observe: Observer | None = None,
) -> dict[str, Tensor]:
    """As `per_sample_gradient_norms`, but of each of these linear layers (weight and bias) by name: (B,)."""
    if len({id(layer.weight) for layer in layers.values()}) < len(layers):
        raise UserError(
            f"{_name(model)} shares one weight between layers: exact per-sample norms are not possible."
        )
    predictions = Positions.of_predictions(labels)
    at = at or predictions
    embedding = model.get_input_embeddings()
    tied = next((layer for layer in layers.values() if layer.weight is embedding.weight), None)
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
        stack.enter_context(last_block_at(model, at))
        for layer in (*layers.values(), *([embedding] if tied is not None else [])):
            stack.enter_context(layer.register_forward_hook(keep))
        logits = model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits[0]
        if unused := [name for name, layer in layers.items() if layer not in outputs]:
            raise UserError(
                f"{_name(model)} does not use {unused[0]} (a merged or inactive adapter?): activate it."
            )
        if observe is not None:
            observe(logits.detach())
        wanted = predictions.out_of(at, logits)
        slope = loss_slopes(wanted.detach(), predictions)
        gradients = dict(zip(outputs, torch.autograd.grad(wanted, list(outputs.values()), slope), strict=True))

    def norms(layer: nn.Linear) -> Tensor:
        x, g = at.by_sample(inputs[layer]), at.by_sample(gradients[layer])
        own = weight_gradient_norms(x, g, bias=layer.bias is not None)
        return own if layer is not tied else _tied_norms(own, x, g, input_ids, _embedded(embedding, gradients))

    return {name: norms(layer) for name, layer in layers.items()}


def weight_gradient_norms(x: Tensor, g: Tensor, bias: bool) -> Tensor:
    """Norm over t of sum g_t x_t^T, from x (B, T, in) and g (B, T, out), and of sum g_t for a bias: (B,)."""
    x, g = _wide(x), _wide(g)
    (length, wide), tall = x.shape[1:], g.shape[2]
    if gram_is_cheaper(length, wide, tall):
        squared = ((x @ x.mT) * (g @ g.mT)).sum((1, 2)).clamp_min(0)
    else:
        squared = (g.mT @ x).square().sum((1, 2))
    return (squared + g.sum(1).square().sum(1) if bias else squared).sqrt()


def gram_is_cheaper(length: int, wide: int, tall: int) -> bool:
    """Whether two Gram matrices (length x length) cost less than the gradient (tall x wide) itself."""
    return length * (wide + tall) < wide * tall


def _tied_norms(own: Tensor, x: Tensor, g: Tensor, input_ids: Tensor, e: Tensor) -> Tensor:
    """Norm of the gradient of a weight that is head and embedding: (B,).

    The embedding's gradient adds e_t (B, T, D) to the row of token t; its products with itself and with the
    head's gradient, sum over l of g_l x_l^T, need neither of the two as a matrix.
    """
    x, g = _wide(x), _wide(g)
    same_token = input_ids[:, :, None] == input_ids[:, None, :]
    embedding = ((e @ e.mT) * same_token).sum((1, 2))
    tokens = input_ids[:, None, :].expand(-1, g.shape[1], -1)
    cross = ((x @ e.mT) * g.gather(2, tokens)).sum((1, 2))
    return (own.square() + 2 * cross + embedding).clamp_min(0).sqrt()


def _embedded(embedding: Any, gradients: Mapping[nn.Module, Tensor]) -> Tensor:
    """What each position adds to its token's row of the embedding's gradient (Gemma 3 scales its rows)."""
    return _wide(gradients[embedding]) * getattr(embedding, "embed_scale", 1.0)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each token, in float32 or wider: (L, V), (L,) -> (L,)."""
    return F.cross_entropy(_wide(logits), targets, reduction="none")


def loss_slopes(logits: Tensor, at: Positions) -> Tensor:
    """Gradient of the sum of the samples' mean cross-entropies with respect to logits at `at`: (L, V), (L, V).

    In closed form, (softmax - onehot) / tokens of the sample: autograd would pass over three such matrices.
    """
    slopes = _wide(logits).softmax(-1)
    slopes.scatter_add_(-1, at.targets[:, None], slopes.new_full((len(slopes), 1), -1.0))
    slopes /= at.counts.repeat_interleave(at.counts)[:, None]
    return slopes.to(logits.dtype)


def gradient_layers(model: Any, gradient: str) -> dict[str, nn.Linear]:
    """The linear layers that hold the parameters which `gradient` means, by name."""
    if gradient not in GRADIENTS:
        raise UserError(f"gradient={gradient!r} is unknown: choose {', '.join(GRADIENTS)}.")
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    layers = {name: layer for name, layer in linear.items() if ".lora_A." in name or ".lora_B." in name}
    if gradient == "all_linear":
        if any(".lora_" in name for name, _ in model.named_parameters()):
            raise UserError("gradient=all_linear is for a model without adapters: merge them first.")
        return linear
    covered = {id(parameter) for layer in layers.values() for parameter in layer.parameters()}
    for name, parameter in model.named_parameters():
        if ".lora_" in name and id(parameter) not in covered:
            raise UserError(
                f"{name} is no weight of a linear LoRA layer: exact per-sample norms are for plain LoRA."
            )
    if gradient == "last_v_b":
        inside = set(last_block(model).self_attn.v_proj.modules())
        layers = {name: layer for name, layer in layers.items() if layer in inside and ".lora_B." in name}
    if not layers:
        raise UserError(
            f"gradient={gradient}: {_name(model)} has no such LoRA layer; add it to the LoRA target modules."
        )
    return layers


def gradient_parameters(model: Any, gradient: str) -> list[nn.Parameter]:
    """The parameters that `gradient` means, of a model of any architecture."""
    named = dict(model.named_parameters())
    if gradient == "all_linear":
        return [p for layer in gradient_layers(model, gradient).values() for p in layer.parameters()]
    names = [name for name in named if ".lora_" in name]
    if gradient == "last_v_b":
        values = [name for name in names if ".v_proj.lora_B." in name]
        names = [name for name in values if name.rpartition(".")[0] == values[-1].rpartition(".")[0]]
    if not names:
        raise UserError(
            f"gradient={gradient}: {_name(model)} has no such LoRA layer; add it to the LoRA target modules."
        )
    return [named[name] for name in names]


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
            f"{_name(model)} (model type {config.model_type!r}) cannot be scored exactly in batches: its model "
            f"type must be one of {', '.join(ARCHITECTURES)}, with causal attention; or ask for plain autograd on "
            f"single samples, which is slower, by scoring.one_at_a_time=true."
        )
    return model.get_decoder().layers[: config.num_hidden_layers][-1]


def _name(model: Any) -> str:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return type(base).__name__
