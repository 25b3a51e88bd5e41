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

_ADAPTER, _CONFIG = "adapter_config.json", "config.json"
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def load_safetensors(folder: str, **options: Any) -> Any:
    """A causal language model, read only from safetensors or GGUF files.

    Args:
        options: as for `from_pretrained` of transformers.

    Raises:
        ValueError: an adapter, or a file that names weights in another format or folder.
    """
    from transformers import AutoModelForCausalLM

    if (Path(folder) / _ADAPTER).is_file():
        raise ValueError(f"it has an adapter, {_ADAPTER}; merge it into the weights, or remove it")
    weight_files(Path(folder))
    return AutoModelForCausalLM.from_pretrained(folder, **options, **NO_CODE, use_safetensors=True)


def weight_files(folder: Path) -> list[str]:
    """The names of a model's weights, which its configuration or its index may give.

    Raises:
        ValueError: one of them is in another format or folder.
    """
    explicit = _content(folder / _CONFIG).get("transformers_weights")
    shards = _content(folder / _INDEX).get("weight_map", {}).values()
    for name in [*([explicit] if explicit else []), *shards]:
        if not str(name).endswith(".safetensors") or len(Path(name).parts) > 1:
            raise ValueError(f"it names weights in {name!r}, not a safetensors file beside it; convert them")
    return [explicit] if explicit else sorted(set(shards)) or [_WHOLE]


def reason(error: Exception) -> str:
    """Why a model cannot be loaded and how to fix it, in one clause."""
    if "trust_remote_code" in str(error):
        return "it needs code of its own, which is never executed; choose a model that transformers supports"
    if "no file named model.safetensors" in str(error) or "cannot be loaded with `safetensors`" in str(error):
        return "it has no safetensors weights, and a pickle, which can contain code, is never read; convert them"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _content(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
