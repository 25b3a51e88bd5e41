"""The files of a model. Weights are read as safetensors or GGUF, never as a pickle, and no model code is executed.

The options of transformers ask for this. But three files can make it read other weights: an index or a
configuration that names them, and an adapter. They are checked first.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from staff.errors import UserError
from staff.store.manifest import sha256

ATTENTIONS = ("sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention")
"""Attention implementations of transformers and of packages. For other names transformers downloads code."""

NO_CODE = {"trust_remote_code": False}
"""An option of every loader. Without it, transformers asks on the terminal."""

_ADAPTER, _CONFIG, _GENERATION = "adapter_config.json", "config.json", "generation_config.json"
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


UNJOINED = "automatic conversion of the weights"
"""In the error of transformers for weights that it cannot join, such as those of experts."""


def attention_of(config: Any) -> str:
    """The attention implementation of a loaded model, by its configuration."""
    # Private, as transformers has a public way to set it alone; tests/test_promises.py reads it.
    return config._attn_implementation


def load_safetensors(folder: str, **options: Any) -> tuple[Any, list[str]]:
    """A causal language model, read only from safetensors or GGUF files, and the names of weights it does not use.

    Args:
        options: as for `from_pretrained` of transformers.

    Raises:
        ValueError: an adapter, a file that names weights in another format or folder, or a weight that is missing
            or of another shape.
    """
    from transformers import AutoModelForCausalLM

    _refuse_adapter(folder)
    if "gguf_file" not in options:
        check_weights(folder)
    options |= {"ignore_mismatched_sizes": True, "output_loading_info": True, "use_safetensors": True, **NO_CODE}
    with _unreported():
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, **options)
    model, found = loaded
    check_found(found)
    return model, sorted(found["unexpected_keys"])


def _refuse_adapter(folder: str) -> None:
    if (Path(folder) / _ADAPTER).is_file():
        raise ValueError(f"it has an adapter, {_ADAPTER}; merge it into the weights, or remove it")


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


@cache
def content_digest(model: Path, weights: bool = True) -> str:
    """SHA-256 of a GGUF file, or of the names and contents of the files in a model's folder.

    Args:
        weights: whether to include the weights and the model's configuration, besides the tokenizer's files.
    """
    if model.is_file():
        return sha256(model)
    digest = hashlib.sha256()
    suffixes = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja")
    for file in sorted(model.iterdir()):
        of_model = file.suffix in (".safetensors", ".bin") or file.name in (_CONFIG, "generation_config.json")
        if file.suffix in suffixes and (weights or not of_model) and file.name != "manifest.json":
            digest.update(file.name.encode() + bytes.fromhex(sha256(file)))
    return digest.hexdigest()


def check_config(path: str, config: Any) -> None:
    """Refuse a model whose kind or weights cannot be fine-tuned to predict the next token.

    Raises:
        UserError: an encoder, or packed weights.
    """
    # BERT and its kin have a head that predicts the next token, but their attention sees it.
    of_bert = {"is_decoder", "add_cross_attention"} <= type(config).__dataclass_fields__.keys()
    if config.is_encoder_decoder or (of_bert and not config.is_decoder):
        what = "an encoder-decoder" if config.is_encoder_decoder else "an encoder"
        raise UserError(
            f"family path={path} is {what} (model type {config.model_type!r}): name a decoder, which predicts the "
            "next token from those before it."
        )
    if packed := getattr(config, "quantization_config", None):
        method = packed.get("quant_method") if isinstance(packed, dict) else packed.quant_method
        raise UserError(
            f"family path={path} is quantised ({method}), and packed weights have no exact gradients: name the "
            "model that it was made from; finetune=qlora quantises that itself."
        )


def check_weights(folder: str, model: Any = None) -> None:
    """Refuse weights that `load_safetensors` would, by the headers of the files.

    Args:
        model: the model on the meta device, which the weights must fit; None: their names and shapes may be any.

    Raises:
        ValueError, OSError: as `load_safetensors`.
    """
    from safetensors import SafetensorError, safe_open

    _refuse_adapter(folder)
    _check_generation(Path(folder))
    shapes = {}
    for name in weight_files(Path(folder)):
        if not (file := Path(folder) / name).is_file():
            raise OSError(f"no file named {name}" if name == _WHOLE else f"{name} is missing; copy it there")
        try:
            with safe_open(file, "pt") as weights:
                shapes |= {weight: weights.get_slice(weight).get_shape() for weight in weights.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{name} is damaged or incomplete ({error}); copy it again") from None
    if model is not None:
        _check_fit(model, shapes)


def _check_fit(model: Any, shapes: Mapping[str, Sequence[int]]) -> None:
    """Refuse weights of these names and shapes if the model would lack one.

    Transformers matches them as it does in a load: some are renamed, joined, tied or ignored.
    """
    import torch

    described = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    options = {"config": model.config, "state_dict": described, "device_map": "meta"}
    with _unreported():
        _, found = type(model).from_pretrained(
            None, **options, output_loading_info=True, ignore_mismatched_sizes=True
        )
    check_found(found)


def check_found(found: Mapping[str, Any]) -> None:
    """Refuse a model with weights that were not in its files, which transformers initialises at random.

    Args:
        found: what `from_pretrained` tells with `output_loading_info`.

    Raises:
        ValueError: a weight is missing or of another shape.
    """
    if wrong := sorted(found["mismatched_keys"]):
        name, held, wanted = wrong[0][0], *map(list, wrong[0][1:])
        raise ValueError(
            f"its weights have other shapes than its config.json says, such as {name}, {held} for {wanted}; copy "
            "both from one model"
        )
    if missing := sorted(found["missing_keys"]):
        raise ValueError(f"it lacks {len(missing)} of its weights, such as {missing[0]}; save or download it again")


@contextmanager
def _unreported() -> Iterator[None]:
    """Keep transformers from printing its table of missing and unused weights."""

    def keeps(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in str(record.msg)

    logger = logging.getLogger("transformers.modeling_utils")
    logger.addFilter(keeps)
    try:
        yield
    finally:
        logger.removeFilter(keeps)


def _check_generation(folder: Path) -> None:
    from transformers import GenerationConfig

    if (folder / _GENERATION).is_file():
        try:
            GenerationConfig.from_pretrained(str(folder))
        except (ValueError, TypeError) as error:
            said = str(error).strip().partition("\n")[0]
            raise ValueError(f"its {_GENERATION} has settings that exclude one another ({said}); mend it") from None


def reason(error: Exception) -> str:
    """Why a model cannot be loaded and how to fix it, in one clause."""
    if "trust_remote_code" in str(error):
        return "it needs code of its own, which is never executed; choose a model that transformers supports"
    if "no file named model.safetensors" in str(error) or "cannot be loaded with `safetensors`" in str(error):
        return "it has no safetensors weights, and a pickle, which can contain code, is never read; convert them"
    if UNJOINED in str(error):
        return "its weights do not fit together: one is missing or of another shape; save or download it again"
    if "backend tokenizer" in str(error):
        return "it has no tokenizer that can be read; copy tokenizer.json and tokenizer_config.json beside it"
    if "model_type" in str(error):
        return "it has no config.json that names its model_type; name the folder of a whole model"
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _content(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
