"""The memory that fine-tuning needs, estimated from a model's shapes, and whether the device has it.

The estimate counts the tensors that autograd keeps of each block, in transformers' decoders with gated MLPs and in
PEFT's LoRA: the inputs of norms, of LoRA layers, of the attention kernel and of the MLP's product. Small tensors
(masks, rotary tables, buffers in kernels) and the allocator's rounding are not counted.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from staff.data.tokens import TokenizedSamples
from staff.errors import UserError
from staff.models.adapters import shapes
from staff.models.spec import ARCHITECTURES, ModelSpec
from staff.models.weights import attention_of
from staff.runtime import processes
from staff.runtime.machine import free_ram
from staff.scoring.attention import NARROWED
from staff.training.settings import FinetuneSettings

log = logging.getLogger(__name__)

NF4_BYTES = 0.5 + 0.127 / 8
"""Bytes of a weight in NF4 with double quantization (Dettmers et al. 2023, section 3)."""


@dataclass(frozen=True)
class Memory:
    """Memory of fine-tuning in bytes at its peak.

    That is after the forward pass of the longest samples, when the first block is recomputed in the backward pass,
    or after the backward pass, when all gradients are there.
    """

    weights: int
    training: int
    """Adapters, Adam's two moments, gradients that are there by then, and autocast's copies of trained weights."""
    activations: int
    """Tensors of the blocks that are kept for the backward pass."""
    logits: int
    """Logits of the answer tokens, their probabilities and gradients."""

    @property
    def total(self) -> int:
        return self.weights + self.training + self.activations + self.logits


def finetuning_memory(
    spec: ModelSpec, settings: FinetuneSettings, lengths: np.ndarray, answer_lengths: np.ndarray
) -> Memory:
    """The peak memory of fine-tuning, estimated without loading weights.

    Args:
        lengths, answer_lengths: tokens of each sample and of its answer, shape (N,).
    """
    model = shapes(spec)
    config = model.config.get_text_config()
    lora = settings.kind == "lora"
    weights = _weight_bytes(model, spec.quantization) if lora else 4 * model.num_parameters()
    if spec.is_partitioned:  # plus two whole blocks: the one that runs and the one that is prefetched
        weights = weights // processes.world_size() + 2 * weights // config.num_hidden_layers
    adapted = shapes(spec, settings.lora) if lora else model
    trained = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    batch, accumulated = settings.on_each_device(processes.world_size())
    longest = int(min(lengths.max(), settings.max_length))
    tokens, answers = min(batch, len(lengths)) * longest, int(np.sort(answer_lengths)[-batch:].sum())
    kept = _Kept.by(model, 2 if settings.precision == "bfloat16" else 4, longest, lora)
    depth = config.num_hidden_layers
    held, gradients = trained * (12 if lora else 8), 4 * trained
    copies = kept.element * trained if not lora and kept.element < 4 else 0
    if accumulated > 1:  # the gradients of earlier batches of the step
        held, gradients = held + gradients, 0
    logit = 12 + (kept.element if kept.element < 4 else 0)
    logits = answers * config.vocab_size * logit
    # The last block's queries, and all that follows its attention, run at the answer tokens alone.
    queries = kept.queries if attention_of(model.config) in NARROWED else 0
    last = tokens * (kept.attention - queries) + answers * (queries + kept.mlp)
    moments = [Memory(weights, held + gradients, 0, 0)]
    if settings.gradient_checkpointing:
        inputs = tokens * (depth - 1) * kept.residual
        again = inputs + tokens * (kept.attention + kept.mlp + kept.gradients)
        moments.append(Memory(weights, held + copies, inputs + last, logits))
        moments.append(Memory(weights, held + gradients // depth, again, 0))
    else:
        activations = tokens * (depth - 1) * (kept.attention + kept.mlp) + last
        moments.append(Memory(weights, held + copies, activations, logits))
    return max(moments, key=lambda memory: memory.total)


@dataclass(frozen=True)
class _Kept:
    """Bytes per token that one block keeps for the backward pass."""

    element: int
    """Bytes of an element in matrix products."""
    residual: int
    """The block's input."""
    attention: int
    queries: int
    """The part of `attention` that is of queries and of what follows them."""
    mlp: int
    gradients: int
    """Gradients of the MLP's two inner products, while what the block keeps is still there."""

    @classmethod
    def by(cls, model: Any, element: int, length: int, frozen: bool) -> _Kept:
        config = model.config.get_text_config()
        width, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
        head = getattr(config, "head_dim", None) or width // heads
        queries, keys = heads * head, (getattr(config, "num_key_value_heads", None) or heads) * head
        norms = [m.weight.numel() for m in model.get_decoder().layers[0].modules() if "RMSNorm" in type(m).__name__]
        norm = 4 if frozen else 8  # in float32: the input; if the norm's weight is trained, also the output
        around = norm * sum(n for n in norms if n > head)
        inside = norm if head in norms else 0  # norms of queries and keys
        # Under autocast, each of the layers that share an input keeps its own copy.
        shared = (3, 2) if element < 4 else (1, 1)
        of_queries = element * 3 * queries + inside * queries + around // 2 - norm * width
        if attention_of(model.config) == "eager":
            of_queries += 8 * heads * length
        attention = of_queries + element * (shared[0] * width + 2 * keys) + inside * keys + norm * width
        mlp = element * (shared[1] * width + 4 * inner) + around // 2
        return cls(element, element * width, attention, of_queries, mlp, 2 * element * inner)


def _weight_bytes(model: Any, quantization: str | None) -> int:
    from torch import nn

    total = float(sum(p.numel() * p.element_size() for p in model.parameters()))
    if quantization:
        head = model.get_output_embeddings()
        for layer in model.modules():
            if isinstance(layer, nn.Linear) and layer is not head:
                total += layer.weight.numel() * (NF4_BYTES - layer.weight.element_size())
    return int(total)


def available_memory() -> int:
    """Free bytes on the GPU, or without a GPU in RAM, divided among the processes that share it."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return free_ram()


def check_fits(spec: ModelSpec, samples: TokenizedSamples, settings: FinetuneSettings) -> None:
    """Refuse a fine-tuning that needs more memory than the device has.

    A model type without an estimate passes.

    Raises:
        UserError: it does not fit; with settings that would.
    """
    if spec.config().get_text_config().model_type not in ARCHITECTURES:
        log.info("there is no estimate of the memory that %s needs: it is not checked", spec.name)
        return
    available = available_memory()
    lengths, answers = samples.lengths, samples.answer_lengths
    need = finetuning_memory(spec, settings, lengths, answers)
    if need.total <= available:
        return
    for changes in _smaller(settings, int(lengths.max())):
        asked = replace(settings, **changes)
        held = replace(spec, quantization=asked.quantization, sharded=asked.fsdp)
        if finetuning_memory(held, asked, lengths, answers).total <= available:
            mend = f"it would fit with {_overrides(changes)}"
            break
    else:
        mend = "and so would no other setting: choose a smaller model or a larger device"
    raise UserError(
        f"fine-tuning {spec.name} needs about {_gib(need.total)} (weights {_gib(need.weights)}, training "
        f"{_gib(need.training)}, activations {_gib(need.activations)}, logits {_gib(need.logits)}), and "
        f"{_gib(available)} are free: {mend}. To start all the same: memory_check=false."
    )


def _smaller(settings: FinetuneSettings, longest: int) -> Iterator[dict[str, Any]]:
    """Settings that need less memory, those that cost least time first."""
    import torch

    share = settings.batch_size // processes.world_size()
    sizes = [n for n in range(min(settings.device_batch_size, share), 0, -1) if share % n == 0]
    means: list[dict[str, Any]] = [{}, {"gradient_checkpointing": True}]
    if processes.world_size() > 1 and settings.kind == "lora" and not settings.quantization:
        means.append({"fsdp": True, "gradient_checkpointing": True})
    if torch.cuda.is_available() and settings.kind == "lora" and not settings.fsdp:
        means.append({"quantization": "nf4", "gradient_checkpointing": True})
    for mean in means:
        for size in sizes:
            smaller = {} if size == settings.device_batch_size else {"device_batch_size": size}
            yield {**mean, **smaller}
    cutoff = min(longest, settings.max_length) // 2
    while cutoff >= 64:
        yield {**means[-1], "device_batch_size": 1, "max_length": cutoff}
        cutoff //= 2


def _overrides(changes: dict[str, Any]) -> str:
    qlora = ["finetune=qlora"] if "quantization" in changes else []
    left = {
        name: value for name, value in changes.items() if not qlora or name in ("device_batch_size", "max_length")
    }
    return " ".join(qlora + [f"finetune.{name}={str(value).lower()}" for name, value in left.items()])


def _gib(size: int) -> str:
    return f"{size / 2**30:.2g} GiB" if size < 2**34 else f"{size / 2**30:.0f} GiB"
