"""Stages that obtain a model: convert a GGUF file, cut a small model out of the target, save objects in memory.

Each runs once and is kept as an artefact. No run is charged for it: like a download, it obtains a model and selects
no samples. So these stages run outside every other stage.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from staff.errors import UserError
from staff.models.depth import keep_blocks
from staff.models.family import Family
from staff.models.spec import ModelSpec
from staff.models.weights import attention_of
from staff.store.cost import Meter
from staff.store.manifest import Artifact
from staff.store.stage import Stage
from staff.store.store import Store

log = logging.getLogger(__name__)


def prepare(family: Family, store: Store) -> Family:
    """The family with every model in a format that transformers loads in seconds, and names of the hub pinned.

    Raises:
        UserError: a GGUF file that cannot be read, a name that the hub does not have, or blocks that the target
            does not have.
    """
    target, small = _prepared(family.target, store), family.small
    if small.from_target is None or small.from_target.keep_layers is None:
        return replace(family, target=target, small=_prepared(small, store))
    cut = PruneDepth(target, small.from_target.indices(target.config().num_hidden_layers))
    small = replace(small, path=cut.name, revision=None, prepared=store.get(cut))
    return replace(family, target=target, small=small)


def from_objects(model: Any, tokenizer: Any, store: Store) -> ModelSpec:
    """The spec of a transformers model and its tokenizer, which are saved in the store and not changed.

    Raises:
        UserError: a model with an adapter or packed weights, or in a precision that is not supported.
    """
    saved = SaveObjects(model, tokenizer)
    return replace(saved.spec, prepared=store.get(saved))


def _prepared(spec: ModelSpec, store: Store) -> ModelSpec:
    """A GGUF file converted to a folder, a name on the hub pinned to its commit, a folder unchanged."""
    if spec.local is None or spec.local.is_dir():
        spec = spec.pinned()
        spec.check()
        return spec
    return replace(spec, prepared=store.get(ConvertGguf(spec)))


class _Prepare(Stage):
    kind: ClassVar[str] = "model"
    version: ClassVar[int] = 1
    one_process: ClassVar[bool] = True


@dataclass(frozen=True)
class ConvertGguf(_Prepare):
    """A GGUF file converted to a folder, since transformers needs most of a minute to parse one."""

    spec: ModelSpec

    def __post_init__(self) -> None:
        if importlib.util.find_spec("gguf") is None:
            raise UserError(f"{self.spec.name} is a GGUF file, which needs the package gguf: pip install gguf.")

    @property
    def label(self) -> str:
        return f"convert {self.spec.name}"

    def key(self) -> dict[str, Any]:
        return {"gguf": self.spec.source(), "dtype": self.spec.dtype}

    def run(self, folder: Path, meter: Meter, *inputs: Artifact) -> None:
        import torch
        from transformers import GgufConfig

        log.info("reading %s, which takes a while and is done once", self.spec.local)
        plain = GgufConfig(dequantize=True)  # packed weights can be neither saved nor tuned
        model = self.spec.weights(dtype=getattr(torch, self.spec.dtype), quantization_config=plain)
        model.save_pretrained(folder)
        self.spec.tokenizer().save_pretrained(folder)

    def estimate(self, folder: Path, meter: Meter, *inputs: Artifact) -> None:
        self.spec.config().save_pretrained(folder)
        self.spec.tokenizer().save_pretrained(folder)


@dataclass(frozen=True)
class PruneDepth(_Prepare):
    """The target with only some of its blocks."""

    target: ModelSpec
    kept: list[int]

    @property
    def name(self) -> str:
        return f"{self.target.name}, {len(self.kept)} of {self.target.config().num_hidden_layers} blocks"

    @property
    def label(self) -> str:
        return f"cut out {self.name}"

    def key(self) -> dict[str, Any]:
        return {"target": self.target.source(), "keep_layers": self.kept}

    def run(self, folder: Path, meter: Meter, *inputs: Artifact) -> None:
        model = self.target.weights(dtype="auto")
        keep_blocks(model, self.kept)
        model.save_pretrained(folder)
        self.target.tokenizer().save_pretrained(folder)

    def estimate(self, folder: Path, meter: Meter, *inputs: Artifact) -> None:
        shapes = self.target.shapes()
        keep_blocks(shapes, self.kept)
        shapes.config.save_pretrained(folder)
        self.target.tokenizer().save_pretrained(folder)


@dataclass(frozen=True)
class SaveObjects(_Prepare):
    """A model and a tokenizer that were given as objects."""

    model: Any
    tokenizer: Any

    def __post_init__(self) -> None:
        if hasattr(self.model, "peft_config") or getattr(self.model, "is_quantized", False):
            raise UserError(
                f"the model {self._name} has an adapter or packed weights: merge or unpack it, or give its path."
            )

    @property
    def _name(self) -> str:
        return self.model.config.name_or_path or type(self.model).__name__

    @cached_property
    def spec(self) -> ModelSpec:
        dtype = str(self.model.dtype).removeprefix("torch.")
        return ModelSpec(self._name, dtype=dtype, attention=attention_of(self.model.config))

    @property
    def label(self) -> str:
        return f"save {self.spec.name}"

    def key(self) -> dict[str, Any]:
        with TemporaryDirectory() as apart:
            self.model.config.save_pretrained(apart)
            self.tokenizer.save_pretrained(apart)
            return {"files": ModelSpec(apart).source(), "weights": _weights_digest(self.model)}

    def run(self, folder: Path, meter: Meter, *inputs: Artifact) -> None:
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def _weights_digest(model: Any) -> str:
    import torch

    digest = hashlib.sha256()
    for name, weights in model.state_dict().items():
        digest.update(name.encode())
        digest.update(weights.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
