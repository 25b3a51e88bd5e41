"""Untrusted inputs: weights are read as safetensors or GGUF, never as a pickle, and no model code is executed.

The options of transformers ask for this. But three files can make it read other weights: an index or a
configuration that names them, and an adapter. They are checked first.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ATTENTIONS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
"""Attention implementations of transformers and of packages. For other names transformers downloads code."""

NO_CODE = {"trust_remote_code": False}
"""An option of every loader. Without it, transformers asks on the terminal."""

_ADAPTER, _CONFIG, _INDEX = "adapter_config.json", "config.json", "model.safetensors.index.json"


def load_safetensors(place: str, revision: str | None = None, **options: Any) -> Any:
    """A causal language model, read only from safetensors or GGUF files.

    Args:
        place: a folder, or a name on the hub.
        options: as for `from_pretrained` of transformers.

    Raises:
        ValueError: an adapter, or a file that names weights in another format or folder.
    """
    from transformers import AutoModelForCausalLM

    if _find(place, _ADAPTER, revision):
        raise ValueError(f"it has an adapter, {_ADAPTER}; merge it into the weights, or remove it")
    explicit = _content(place, _CONFIG, revision).get("transformers_weights")
    for name in [explicit or "x.safetensors", *_content(place, _INDEX, revision).get("weight_map", {}).values()]:
        if not str(name).endswith(".safetensors") or len(Path(name).parts) > 1:
            raise ValueError(f"it names weights in {name!r}, not a safetensors file beside it; convert them")
    options = {**options, **NO_CODE, "use_safetensors": True, "revision": revision}
    return AutoModelForCausalLM.from_pretrained(place, **options)


def reason(error: Exception) -> str:
    """Why a model cannot be loaded and how to fix it, in one clause."""
    if "trust_remote_code" in str(error):
        return "it needs code of its own, which is never executed; choose a model that transformers supports"
    if "no file named model.safetensors" in str(error) or "cannot be loaded with `safetensors`" in str(error):
        return "it has no safetensors weights, and a pickle, which can contain code, is never read; convert them"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _content(place: str, name: str, revision: str | None) -> dict[str, Any]:
    file = _find(place, name, revision)
    return json.loads(Path(file).read_text(encoding="utf-8")) if file else {}


def _find(place: str, name: str, revision: str | None) -> str | None:
    """The path of one of the model's files, downloaded if needed; None if there is none, or no network."""
    from transformers.utils.hub import cached_file

    silent = ("gated_repo", "missing_entries", "connection_errors")
    how = {f"_raise_exceptions_for_{what}": False for what in silent}
    return cached_file(place, name, revision=revision, **how)
