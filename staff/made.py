"""Models that are made before anything is computed with them: read from a GGUF file, cut out of the target, or
written down from objects at hand.

Each is made once and kept as an artefact of the stage "model". Nobody is charged for it: converting a format and
copying blocks belong to obtaining a model, as a download does, not to selecting samples. So they are made outside
every other stage, where no artefact has them among its inputs.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from staff.artifacts import Store
from staff.cost import Meter
from staff.errors import UserError
from staff.models import Family, ModelSpec

log = logging.getLogger(__name__)


def materialise(family: Family, store: Store) -> Family:
    """The family with every model in a folder that transformers loads in seconds.

    Raises:
        UserError: a GGUF file that cannot be read, or blocks that the target does not have.
    """
    target, small = _converted(family.target, store), family.small
    if small.from_target is None or small.from_target.keep_layers is None:
        return replace(family, target=target, small=_converted(small, store))
    return replace(family, target=target, small=_depth_pruned(small, target, store))


def handed_over(model: Any, tokenizer: Any, store: Store) -> ModelSpec:
    """A transformers model with its tokenizer, written down once and found again by content; they stay as they are.

    Raises:
        UserError: a model whose own weights are not all that it is (an adapter), or in no precision that is known.
    """
    name = model.config.name_or_path or type(model).__name__
    if hasattr(model, "peft_config") or getattr(model, "is_quantized", False):
        raise UserError(f"the model {name} has an adapter or packed weights: merge or unpack it, or give its path.")
    dtype = str(model.dtype).removeprefix("torch.")
    spec = ModelSpec(name, dtype=dtype, attention=model.config._attn_implementation)
    with TemporaryDirectory() as apart:
        model.config.save_pretrained(apart)
        tokenizer.save_pretrained(apart)
        key = {"handed over": ModelSpec(apart).source(), "weights": _weights_digest(model)}

    def make(folder: Path, cost: Meter) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return replace(spec, made=store.get("model", key, make, label=f"write down {spec.name}"))


def _weights_digest(model: Any) -> str:
    import torch

    digest = hashlib.sha256()
    for name, weights in model.state_dict().items():
        digest.update(name.encode())
        digest.update(weights.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _converted(spec: ModelSpec, store: Store) -> ModelSpec:
    """A GGUF file as a folder of its own: parsing one takes transformers the better part of a minute."""
    file = spec.local
    if file is None or file.is_dir():
        return spec
    if importlib.util.find_spec("gguf") is None:
        raise UserError(f"{file.name} needs the package gguf to be read: pip install gguf.")

    def make(folder: Path, cost: Meter) -> None:
        import torch
        from transformers import GgufConfig

        log.info("reading %s, which takes a while and is done once", file)
        plain = GgufConfig(dequantize=True)  # packed weights can be neither saved nor tuned
        model = spec.weights(dtype=getattr(torch, spec.dtype), quantization_config=plain)
        model.save_pretrained(folder)
        spec.tokenizer().save_pretrained(folder)

    def foresee(folder: Path, cost: Meter) -> None:
        spec.config().save_pretrained(folder)
        spec.tokenizer().save_pretrained(folder)

    key = {"gguf": spec.source(), "dtype": spec.dtype}
    return replace(spec, made=store.get("model", key, make, label=f"convert {file.name}", foresee=foresee))


def _depth_pruned(small: ModelSpec, target: ModelSpec, store: Store) -> ModelSpec:
    assert small.from_target is not None
    depth = target.config().num_hidden_layers
    kept = small.from_target.indices(depth)
    name = f"{target.name}, {len(kept)} of {depth} blocks"

    def make(folder: Path, cost: Meter) -> None:
        model = target.weights(dtype="auto")
        keep_blocks(model, kept)
        model.save_pretrained(folder)
        target.tokenizer().save_pretrained(folder)

    def foresee(folder: Path, cost: Meter) -> None:
        shapes = target.shapes()
        keep_blocks(shapes, kept)
        shapes.config.save_pretrained(folder)
        target.tokenizer().save_pretrained(folder)

    key = {"target": target.source(), "keep_layers": kept}
    made = store.get("model", key, make, label=f"cut out {name}", foresee=foresee)
    return replace(small, path=name, revision=None, made=made)


def keep_blocks(model: Any, kept: Sequence[int]) -> None:
    """Leave a causal language model only the blocks at these increasing indices; all other weights stay.

    Depth pruning without a healing of its own (Kim et al., Shortened LLaMA, 2024): fine-tuning follows anyway.
    """
    from torch.nn import ModuleList

    config, depth = model.config, model.config.num_hidden_layers
    blocks = next(m for m in model.modules() if isinstance(m, ModuleList) and len(m) == depth)
    remaining = [blocks[index] for index in kept]
    del blocks[:]
    blocks.extend(remaining)
    config.num_hidden_layers = len(kept)
    for name, value in config.to_dict().items():
        if "layer" in name and isinstance(value, list) and len(value) == depth:  # such as layer_types
            setattr(config, name, [value[index] for index in kept])
