"""Models and data sets of the hub that a plan can count with although they are not at hand.

The shapes of the shipped families' models and the lengths of the shipped tasks' samples lie in `sizes/`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from staff.errors import UserError
from staff.models.spec import ModelSpec
from staff.runtime.hub import Repository, asked_once

if TYPE_CHECKING:
    from omegaconf import DictConfig

SIZES = Path(__file__).parent / "sizes"
TOKEN = r" ?[A-Za-z]{1,10}|\d| ?[^\s\w]{1,2}|\s+|\w{1,2}"
"""What counts as a token where the tokenizer is not at hand. On the English tasks this gives within 5 % of the
tokens of SmolLM2's tokenizer."""
CHAT = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@dataclass(frozen=True)
class KnownShape(ModelSpec):
    """A model of which the configuration alone is known. Its tokens are counted by a rule of thumb (`TOKEN`)."""

    def source(self) -> dict[str, Any]:
        return {"shape": self.path}

    def pinned(self) -> KnownShape:
        return self

    def config(self) -> Any:
        from transformers import AutoConfig

        return AutoConfig.for_model(**sizes_of("models")[self.path])

    def tokenizer(self) -> Any:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers
        from transformers import PreTrainedTokenizerFast

        special = ["<unk>", "<s>", "</s>", "<|end|>"]
        tokenizer = Tokenizer(models.WordLevel({token: at for at, token in enumerate(special)}, unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(TOKEN), "isolated")
        names = dict(zip(("unk_token", "bos_token", "eos_token"), special, strict=False))
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            **names,
            pad_token="</s>",
            extra_special_tokens=["<|end|>"],
            chat_template=CHAT,
            name_or_path=self.path,
        )


def with_stand_ins(cfg: DictConfig, folder: Path) -> list[str]:
    """Replace, in the configuration, what the hub does not give, where its sizes are known.

    Args:
        folder: where samples are written.

    Returns:
        what is replaced, in words.
    """
    from omegaconf import OmegaConf

    replaced = []
    families = [cfg.family, *([cfg.selection_family] if cfg.get("selection_family") else [])]
    for spec in [family[role] for family in families for role in ("target", "small")]:
        cut_from_target = (spec.get("from_target") or {}).get("keep_layers") is not None
        if spec.path in sizes_of("models") and not cut_from_target and not _has_model(spec.path, spec.revision):
            replaced.append(f"the model {spec.path}: its shape is known, its tokens are estimated")
            spec["_target_"] = f"{KnownShape.__module__}.{KnownShape.__qualname__}"
    of_hub = cfg.task.get("hub") in sizes_of("tasks") and cfg.task.data_dir is None and cfg.task.train_file is None
    if of_hub and not _has_data(cfg.task.hub, cfg.task.revision):
        replaced.append(f"the data set {cfg.task.hub}: the number and the lengths of its samples are known")
        # Resolved before, since a task may name other fields where it reads files.
        task = OmegaConf.create(OmegaConf.to_container(cfg.task, resolve=True))
        cfg.task = OmegaConf.merge(task, {"data_dir": str(_data(cfg.task.hub, folder))})
    return replaced


@cache
def sizes_of(kind: str) -> dict[str, Any]:
    return json.loads((SIZES / f"{kind}.json").read_text())


@cache
def _has_model(path: str, revision: str | None) -> bool:
    """Whether the hub, or its cache, gives the model's configuration."""
    try:
        with asked_once():
            ModelSpec(path, revision).config()
    except UserError:
        return False
    return True


@cache
def _has_data(hub: str, revision: str | None) -> bool:
    try:
        with asked_once():
            Repository(hub, "dataset", revision).commit()
    except UserError:
        return False
    return True


def _data(hub: str, folder: Path) -> Path:
    into, known = folder / hub.replace("/", "--"), sizes_of("tasks")[hub]
    if into.is_dir():
        return into
    into.mkdir()
    number = count()
    for split, rows in known["rows"].items():
        texts = [_row(known, next(number), last=at == rows - 1) for at in range(rows)]
        (into / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    return into


def _row(known: dict[str, Any], at: int, last: bool) -> dict[str, Any]:
    """A row whose fields have as many tokens as one of those measured; the last is the longest."""
    row: dict[str, Any] = {"id": str(at)}
    for field, lengths in known["tokens"].items():
        length = known["longest"][field] if last else lengths[at % len(lengths)]
        *path, name = field.split(".")
        within = row
        for part in path:
            within = within.setdefault(part, {})
        within[name] = _text(length, at)
    return row


def _text(length: int, at: int) -> str:
    """A text of `length` tokens, another for every number."""
    digits = [*f"{at:06}"][-length:] if length else []
    return "".join(digits) + " a" * (length - len(digits))
