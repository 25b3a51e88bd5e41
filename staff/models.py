"""A family's models: the target LLM and its small sibling, and the LoRA adapters put on them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from staff.errors import UserError

PACKAGE_PREFIX = "pkg://"
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class ModelSpec:
    """Which model, and how it is loaded.

    Attributes:
        path: a local folder, a name on the Hugging Face hub, or pkg://PACKAGE/FOLDER for one that a Python
            package carries.
        revision: branch, tag or commit on the hub; the commit it resolves to is recorded.
        dtype: precision of the weights in memory.
        attention: attention implementation, as transformers names them.
        gated: the hub asks for an accepted licence and a token.
    """

    path: str
    revision: str | None = None
    dtype: str = "float32"
    attention: str = "sdpa"
    gated: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in PRECISIONS:
            raise UserError(f"family dtype={self.dtype!r} is unknown: choose {' or '.join(PRECISIONS)}.")

    @property
    def name(self) -> str:
        """A short name for messages."""
        return self.path.rstrip("/").rsplit("/", 1)[-1]

    @property
    def folder(self) -> Path | None:
        """The model's local folder; None for a name on the hub."""
        local = local_path(self.path)
        if local.is_dir():
            return local
        if self.path.startswith((PACKAGE_PREFIX, "/", "./", "../", "~")):
            raise UserError(f"family path={self.path} is not a folder: give one with config.json and weights.")
        return None

    def identity(self) -> dict[str, Any]:
        """What determines the model's behaviour: content of its files or commit on the hub, and precision."""
        if self.folder is not None:
            source = {"content": _folder_digest(self.folder)}
        else:
            commit = self.revision
            if commit is None or len(commit) != 40:
                commit = getattr(self.config(), "_commit_hash", None)
            source = {"hub": self.path, "commit": commit or self.revision}
        return {**source, "dtype": self.dtype, "attention": self.attention}

    def config(self) -> Any:
        """The model's transformers configuration; loads no weights."""
        from transformers import AutoConfig

        return self._load(AutoConfig)

    def tokenizer(self) -> Any:
        """The model's tokenizer. One without a pad token pads with its end token: padding is masked anyway."""
        from transformers import AutoTokenizer

        tokenizer = self._load(AutoTokenizer)
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def load(self) -> Any:
        """The model in evaluation mode, on the GPU where there is one."""
        import torch
        from transformers import AutoModelForCausalLM

        model = self._load(
            AutoModelForCausalLM, dtype=getattr(torch, self.dtype), attn_implementation=self.attention
        )
        return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def _load(self, loader: Any, **options: Any) -> Any:
        where = self.folder or self.path
        if self.folder is None:
            options["revision"] = self.revision
        try:
            return loader.from_pretrained(where, **options)
        except (OSError, ValueError) as error:
            if self.folder is not None:
                raise UserError(f"the model in {where} cannot be loaded: {_first_line(error)}") from error
            licence = " It is gated: accept its licence on the hub and log in with a token." if self.gated else ""
            raise UserError(
                f"the model {self.path!r} cannot be had from the Hugging Face hub ({_first_line(error)}).{licence} "
                "Or give a local folder: family.target.path=FOLDER family.small.path=FOLDER."
            ) from error


@dataclass(frozen=True)
class Family:
    """A target LLM and a small model of the same family; `small` may be left out where no method asks for it."""

    name: str
    target: ModelSpec
    small: ModelSpec


@dataclass(frozen=True)
class LoraSpec:
    """A LoRA adapter: rank r, alpha (scaling is alpha / r), dropout, and the linear layers it is put on."""

    rank: int
    alpha: int
    dropout: float = 0.0
    targets: str | Sequence[str] = "all-linear"


def fresh_lora(model: Any, spec: LoraSpec, seed: int) -> Any:
    """`model` with a new adapter: A drawn from `seed`, B zero. The caller's random state is left alone."""
    import torch
    from peft import LoraConfig, get_peft_model

    targets = spec.targets if isinstance(spec.targets, str) else list(spec.targets)
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,
        lora_dropout=spec.dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return get_peft_model(model, config).eval()


def load_tuned(spec: ModelSpec, folder: Path, kind: str) -> Any:
    """The model that a fine-tuning of `kind` ("lora" or "full") left in `folder`."""
    if kind == "full":
        return replace(spec, path=str(folder), revision=None).load()
    from peft import PeftModel

    return PeftModel.from_pretrained(spec.load(), folder, is_trainable=True).eval()


def replace_lora(tuned: Any, spec: LoraSpec, seed: int) -> Any:
    """A fresh adapter in place of the tuned one on the layers that `spec` targets; elsewhere the tuning stays,
    merged into the weights. This is what the authors' code does to the small model."""
    import torch

    replaced = (spec.targets,) if isinstance(spec.targets, str) else tuple(spec.targets)
    for name, module in tuned.named_modules():
        if hasattr(module, "lora_B") and name.rsplit(".", 1)[-1] in replaced:
            with torch.no_grad():
                for lora_b in module.lora_B.values():
                    lora_b.weight.zero_()
    return fresh_lora(tuned.merge_and_unload(), spec, seed)


def plain(settings: Any) -> Any:
    """A dataclass as JSON has it, for fingerprints."""
    return json.loads(json.dumps(asdict(settings)))


def local_path(path: str) -> Path:
    """A path as the configuration has it: pkg://PACKAGE/FOLDER lies inside an installed package."""
    if not path.startswith(PACKAGE_PREFIX):
        return Path(path).expanduser()
    package, _, rest = path.removeprefix(PACKAGE_PREFIX).partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{path}: the package {package!r} is not installed; install it or give another path.")
    return Path(next(iter(spec.submodule_search_locations))) / rest


@cache
def _folder_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of the files a model is loaded from."""
    digest = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".gguf"):
            digest.update(file.name.encode())
            with file.open("rb") as content:
                digest.update(hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
