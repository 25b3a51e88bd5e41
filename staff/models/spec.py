"""Which model, and how it is loaded."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from staff.errors import UserError
from staff.models.depth import DepthPruning
from staff.models.weights import (
    ATTENTIONS,
    NO_CODE,
    UNJOINED,
    check_config,
    check_weights,
    content_digest,
    load_safetensors,
    reason,
    weight_files,
)
from staff.runtime import processes
from staff.runtime.files import PACKAGE_PREFIX, local_path
from staff.runtime.hub import Repository
from staff.runtime.progress import naming_bars_of_transformers

if TYPE_CHECKING:
    from staff.store.manifest import Artifact

log = logging.getLogger(__name__)

PRECISIONS = ("float32", "bfloat16")
QUANTIZATIONS = ("nf4",)

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
"""Plain decoders with gated MLPs: their FLOPs and memory are by formula, and they have a decoding loop of our own.
Which models are scored in batches is found by a test (`staff.scoring.exact`)."""


@dataclass(frozen=True)
class ModelSpec:
    """Which model, and how it is loaded.

    Attributes:
        path: a local folder or GGUF file, a name on the Hugging Face hub, or pkg://PACKAGE/PATH for a folder or
            GGUF file in a Python package.
        revision: branch, tag or commit on the hub; the commit it resolves to is recorded.
        dtype: precision of the weights in memory.
        attention: attention implementation, as transformers names them; a model without "sdpa" uses "eager".
        gated: the hub asks for an accepted licence and a token.
        quantization: None, or "nf4": linear layers in 4 bits, as QLoRA has them (Dettmers et al. 2023,
            arXiv:2305.14314): normal floats, doubly quantised, computed with in bfloat16.
        from_target: for a small model made from blocks of the target; `path` is ignored.
        sharded: the processes of a run share out its weights; one alone holds them all.
        prepared: the artefact that the model is loaded from (`staff.models.prepare`).
    """

    path: str
    revision: str | None = None
    dtype: str = "float32"
    attention: str = "sdpa"
    gated: bool = False
    quantization: str | None = None
    sharded: bool = False
    from_target: DepthPruning | None = None
    prepared: Artifact | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path:
            raise UserError(f"family path={self.path!r} must be text: a folder, a GGUF file or a name on the hub.")
        if not isinstance(self.revision, str | None):
            raise UserError(f"family revision={self.revision!r} must be null or a branch, a tag or a commit.")
        if self.dtype not in PRECISIONS:
            raise UserError(f"family dtype={self.dtype!r} is unknown: choose {' or '.join(PRECISIONS)}.")
        if self.attention not in ATTENTIONS:
            raise UserError(f"family attention={self.attention!r} is unknown: choose {' or '.join(ATTENTIONS)}.")

    @property
    def name(self) -> str:
        """A short name for messages."""
        return self.path.rstrip("/").rsplit("/", 1)[-1]

    @property
    def local(self) -> Path | None:
        """The model's local folder or GGUF file; None for a name on the hub."""
        if self.prepared is not None:
            return self.prepared.path
        local, is_gguf = local_path(self.path), self.path.endswith(".gguf")
        if local.is_dir() or (is_gguf and local.is_file()):
            return local
        if is_gguf or self.path.startswith((PACKAGE_PREFIX, "/", "./", "../", "~")):
            kind = "file" if is_gguf else "folder: give one with config.json and weights, or a .gguf file"
            raise UserError(f"family path={self.path} is not a {kind}.")
        return None

    def identity(self) -> dict[str, Any]:
        """What determines the model's behaviour: its source and its precision."""
        identity = {**self.source(), "dtype": self.dtype, "attention": self.attention}
        return {**identity, "quantization": self.quantization} if self.quantization else identity

    def source(self) -> dict[str, Any]:
        """What identifies the model: the content of its files, the commit on the hub, or how it was prepared."""
        if self.prepared is not None:
            return {"prepared": self.prepared.fingerprint}
        if self.local is not None:
            return {"content": content_digest(self.local)}
        return {"hub": self.path, "commit": self.repository.commit()}

    def tokenizer_identity(self) -> dict[str, Any]:
        """What identifies the model's tokenizer; the same for models that share a tokenizer."""
        if self.local is None or self.local.is_file():
            return self.source()
        return {"content": content_digest(self.local, weights=False), "model_type": self.config().model_type}

    @property
    def repository(self) -> Repository:
        """The model on the hub, for a path that is a name there."""
        return Repository(self.path, "model", self.revision, self.gated)

    def pinned(self) -> ModelSpec:
        """The same model, with the commit of a name on the hub as its revision: one for all processes.

        Raises:
            UserError: neither the hub nor its local cache has the model.
        """
        if self.local is not None:
            return self
        return replace(self, revision=processes.broadcast_from_main(self.repository.commit))

    def config(self) -> Any:
        """The model's transformers configuration."""
        from transformers import AutoConfig

        return self._from_pretrained(AutoConfig.from_pretrained, **NO_CODE)

    def window(self) -> int | None:
        """The model's context window in tokens; None if its configuration sets no limit."""
        positions = getattr(self.config().get_text_config(), "max_position_embeddings", None)
        return positions if positions and positions > 0 else None

    def tokenizer(self) -> Any:
        """The model's tokenizer. One without a pad token pads with its end token, since padding is masked."""
        from transformers import AutoTokenizer

        tokenizer = self._from_pretrained(AutoTokenizer.from_pretrained, **NO_CODE)
        tokenizer.padding_side = "right"  # as training requires; generation pads on the left itself
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    @property
    def is_partitioned(self) -> bool:
        """Whether `load` gives each process a shard of the weights.

        All processes must then run the model in step, and adapters cannot be merged into it.
        """
        return self.sharded and processes.world_size() > 1

    def load(self) -> Any:
        """The model in evaluation mode, on the GPU if there is one."""
        import torch

        options = {"dtype": getattr(torch, self.dtype), "attn_implementation": _attention(self)}
        if self.quantization:
            options["quantization_config"] = _four_bits()
        if self.is_partitioned:
            from transformers.distributed.configuration_utils import DistributedConfig

            return self.weights(
                **options, distributed_config=DistributedConfig(fsdp_size=processes.world_size())
            ).eval()
        model = self.weights(**options)
        return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def shapes(self, device: str = "meta") -> Any:
        """The model's modules and shapes, without its weights. On a device other than meta, weights are random."""
        import torch
        from transformers import AutoModelForCausalLM

        options = {"dtype": getattr(torch, self.dtype), "attn_implementation": _attention(self)}
        with torch.device(device):
            return AutoModelForCausalLM.from_config(self.config(), **options)

    def check(self) -> None:
        """Refuse a model that cannot be trained and scored, by its configuration (`weights.check_config`)."""
        check_config(self.path, self.config())

    def check_weights(self) -> None:
        """Refuse weights on this machine that cannot be read or do not fit the model, by their files' headers."""

        def check(folder: str) -> None:
            files = [Path(folder) / name for name in weight_files(Path(folder))]
            if self.local is not None or all(file.is_file() for file in files):
                with naming_bars_of_transformers(f"checking {self.name}"):
                    check_weights(folder, self.shapes())

        if self.prepared is None and (self.local is None or self.local.is_dir()):
            self._from_pretrained(check)

    def weights(self, **options: Any) -> Any:
        """The model, loaded by transformers with these options.

        Raises:
            UserError: it cannot be loaded or downloaded, lacks weights, or is not trusted (`staff.models.weights`).
        """

        def load(folder: str, **options: Any) -> Any:
            if self.local is None:
                self.repository.fetch(weight_files(Path(folder)))
            with naming_bars_of_transformers(f"loading {self.name}"):
                return load_safetensors(folder, **options)

        model, unused = self._from_pretrained(load, **options)
        if unused:
            said = (self.path, len(unused), type(model).__name__, unused[0])
            log.warning("%s holds %d weights that %s does not use, such as %s", *said)
        return model

    def _from_pretrained(self, load: Callable[..., Any], **options: Any) -> Any:
        where = self.local or self.repository.fetch()
        if where.is_file():
            where, options["gguf_file"] = where.parent, where.name
        # For a damaged GGUF file the parser can raise any error.
        expected = (Exception,) if "gguf_file" in options else (OSError, ValueError, ImportError)
        try:
            return load(str(where), **options)
        except UserError:
            raise
        except Exception as error:
            if not isinstance(error, expected) and UNJOINED not in str(error):
                raise
            place = f"in {self.local}" if self.local else f"{self.path!r}"
            raise UserError(f"the model {place} cannot be loaded: {reason(error)}") from error


def check_quantization() -> None:
    """Refuse QLoRA on a machine that does not support it.

    Raises:
        UserError: the package bitsandbytes or a GPU is missing.
    """
    import torch

    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("finetune=qlora needs the package bitsandbytes: pip install 'staff-coresets[qlora]'.")
    if not torch.cuda.is_available():
        raise UserError("finetune=qlora needs a CUDA GPU, and there is none here: choose finetune=lora.")


def _four_bits() -> Any:
    import torch
    from transformers import BitsAndBytesConfig

    check_quantization()
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def is_sharded(model: Any) -> bool:
    """Whether this process has only a shard of the model's weights."""
    # Private, as transformers says it nowhere else; tests/test_promises.py reads it.
    return getattr(model, "_is_fsdp_managed_module", False)


@cache
def _attention(spec: ModelSpec) -> str:
    """The attention implementation that is used.

    Raises:
        UserError: the model does not support the one that was chosen, or a package is missing.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = spec.config()
    for attention in (spec.attention, "eager"):
        try:
            with torch.device("meta"):
                AutoModelForCausalLM.from_config(config, attn_implementation=attention)
            return attention
        except (ValueError, ImportError) as error:
            if spec.attention != "sdpa":
                raise UserError(
                    f"family attention={spec.attention} cannot be used with {spec.name} ({reason(error)}): "
                    "choose sdpa or eager."
                ) from error
    raise UserError(
        f"family path={spec.path} (model type {config.model_type!r}) is not a causal language model that "
        "transformers knows: name a decoder."
    )
