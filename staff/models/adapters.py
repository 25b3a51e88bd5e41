"""LoRA adapters: add, load and replace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from staff.errors import UserError
from staff.models.spec import ModelSpec


@dataclass(frozen=True)
class LoraSpec:
    """A LoRA adapter.

    Attributes:
        rank: r of the matrices A and B.
        alpha: the adapter's output is scaled by alpha / r.
        dropout: probability of dropout on the adapter's input.
        targets: names of the linear layers that get an adapter, or "all-linear".
    """

    rank: int
    alpha: int
    dropout: float = 0.0
    targets: str | Sequence[str] = "all-linear"

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise UserError(f"LoRA rank={self.rank!r} must be a whole number of at least 1.")
        names = [self.targets] if isinstance(self.targets, str) else self.targets
        if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) for name in names):
            raise UserError(f"LoRA targets={self.targets!r} must be names of linear layers, or all-linear.")
        if not isinstance(self.targets, str):
            object.__setattr__(self, "targets", tuple(self.targets))  # hashable, since shapes are cached by it
        for name, high in (("alpha", 1e9), ("dropout", 1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= high:
                raise UserError(f"LoRA {name}={value!r} must be a number of at least 0 and at most {high:g}.")


def fresh_lora(model: Any, spec: LoraSpec, seed: int) -> Any:
    """`model` with a new adapter: A is drawn from `seed`, B is zero. The global random state does not change."""
    import torch
    from peft import LoraConfig, get_peft_model

    targets = spec.targets if isinstance(spec.targets, str) else list(spec.targets)
    config = LoraConfig(
        exclude_modules=_left_out(model) if targets == "all-linear" else None,
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            return get_peft_model(model, config).eval()
        except ValueError as error:  # no layer has such a name
            raise UserError(f"LoRA targets={targets!r}: {str(error).split('. ')[0]}; name others.") from error


def _left_out(model: Any) -> list[str] | None:
    """The linear layers of "all-linear" that cannot have an adapter; None: all can."""
    from torch import Tensor, nn

    # PEFT refuses one on the output projection of Mamba's blocks, which a fused kernel reads directly.
    kind = model.config.model_type
    names = ["out_proj"] if "mamba" in kind or kind in ("falcon_h1", "nemotron_h") else []
    # Some routers of experts are linear layers by class, but return more than one tensor.
    for name, module in model.named_modules():
        own = type(module).__module__.startswith("transformers.models")
        if own and isinstance(module, nn.Linear) and not isinstance(module(module.weight[:1]), Tensor):
            names.append(name)
    return names or None


@lru_cache(maxsize=8)
def shapes(spec: ModelSpec, adapter: LoraSpec | None = None) -> Any:
    """The model, with such an adapter, without weights: on the meta device. It is shared, so it must not change."""
    model = spec.shapes()
    return model if adapter is None else fresh_lora(model, adapter, seed=0)


@lru_cache(maxsize=32)
def trained_parameters(spec: ModelSpec, adapter: LoraSpec | None) -> int:
    """The parameters that fine-tuning trains: those of the adapter, or all."""
    return sum(p.numel() for p in shapes(spec, adapter).parameters() if p.requires_grad)


def load_trained(spec: ModelSpec, folder: Path) -> Any:
    """The model that a fine-tuning saved in `folder`: `spec` with an adapter, or all weights."""
    if not (folder / "adapter_config.json").is_file():
        return replace(spec, path=str(folder), revision=None, prepared=None).load()
    from peft import PeftModel

    return PeftModel.from_pretrained(spec.load(), folder, is_trainable=True).eval()


def replace_lora(tuned: Any, spec: LoraSpec, seed: int) -> Any:
    """`tuned` with a fresh adapter in place of its own on the layers that `spec` targets.

    On all other layers the fine-tuning is merged into the weights. The authors' code does this to the small model.
    """
    import torch

    replaced = (spec.targets,) if isinstance(spec.targets, str) else tuple(spec.targets)
    for name, module in tuned.named_modules():
        if hasattr(module, "lora_B") and name.rsplit(".", 1)[-1] in replaced:
            with torch.no_grad():
                for lora_b in module.lora_B.values():
                    lora_b.weight.zero_()
    return fresh_lora(tuned.merge_and_unload(), spec, seed)
