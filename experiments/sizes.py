"""Sizes and speeds for a plan where models, data sets or a device are not available.

`sizes.json` has the shapes of the shipped families' models and the lengths of the shipped tasks' samples. How fast
a device carries out a stage lies in `speeds.json`, which `python -m experiments.benchmarks.gpu plan` measures and
writes; where nothing was measured, it is assumed. Importing it needs neither Hydra nor torch.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from staff.errors import UserError
from staff.models.spec import ModelSpec
from staff.runtime.hub import Repository, asked_once

if TYPE_CHECKING:
    from omegaconf import DictConfig


SIZES = Path(__file__).with_name("sizes.json")
TOKEN = r" ?[A-Za-z]{1,10}|\d| ?[^\s\w]{1,2}|\s+|\w{1,2}"
"""What counts as a token where the tokenizer is not here. On the English tasks this gives within 5 % of the
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

    def tokenizer_identity(self) -> dict[str, Any]:
        return {"rule": TOKEN}

    def config(self) -> Any:
        return copy.deepcopy(_config(self.path))

    def check_weights(self) -> None:
        """Nothing: there are no weights."""

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


def with_placeholders(cfg: DictConfig, folder: Path) -> list[str]:
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
def _config(path: str) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(**sizes_of("models")[path])


@cache
def sizes_of(kind: str) -> dict[str, Any]:
    return json.loads(SIZES.read_text())[kind]


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


SPEEDS = Path(__file__).with_name("speeds.json")
ASSUMED = {"finetune": 0.4, "scores": 0.24, "evaluation": 0.05}
"""Fractions of the peak where nothing was measured. Decoding is bound by memory, not by arithmetic. A model too
small to fill the GPU reaches less."""
ANSWER = 64
"""New tokens of the answers that were measured."""
NEAR = 2.0
"""A model counts as measured up to so many times more or fewer parameters than those that were."""


class Gpu(NamedTuple):
    """Dense FLOP/s in bfloat16 and in float32 (plain, as torch computes by default), and bytes of memory, by the
    vendor's data sheet."""

    bfloat16: float
    float32: float
    memory: float

    def peak(self, precision: str) -> float:
        """FLOP/s in this precision."""
        return self.bfloat16 if precision == "bfloat16" else self.float32


GPUS = {
    "h100": Gpu(989e12, 67e12, 80e9),
    "h200": Gpu(989e12, 67e12, 141e9),
    "a100": Gpu(312e12, 19.5e12, 80e9),
    "l40s": Gpu(362e12, 91.6e12, 48e9),
    "rtx4090": Gpu(165e12, 82.6e12, 24e9),
    # No data sheet: matrix products of 2,048 x 2,048 on one thread of the processor that speeds.json names.
    "cpu": Gpu(1e11, 1e11, float("inf")),
}


class Speed(NamedTuple):
    """Seconds of a stage: a constant, such as for loading the model, and its FLOPs at a fraction of the peak.

    The constant of answers is that of `ANSWER` new tokens, whose steps take their time however few the prompts are.
    """

    constant: float
    utilisation: float
    measured: bool

    def seconds(self, flops: float, peak: float, constants: float = 1.0) -> float:
        return constants * self.constant + flops / (peak * self.utilisation)


def speed_on(gpu: str, stage: str, precision: str, parameters: float) -> Speed:
    """The speed of a kind of stage, for a model with that many parameters.

    Between the sizes that were measured on this device, the constant and the utilisation are interpolated in the
    logarithm of the parameters. Beyond them the nearest size counts: as measured up to `NEAR` times, then as
    assumed.

    Args:
        gpu: a key of `GPUS`.
        stage: a key of `ASSUMED`.
    """
    points = sorted(
        (point["parameters"], point["constant"], point["utilisation"])
        for point in _measured().get(gpu, {}).get("speeds", [])
        if (point["stage"], point["precision"]) == (stage, precision)
    )
    if not points:
        return Speed(0.0, ASSUMED[stage], False)
    sizes, constants, utilisations = np.array(points).T
    at, known = np.log(parameters), np.log(sizes)
    near = known[0] - np.log(NEAR) <= at <= known[-1] + np.log(NEAR)
    utilisation = float(np.exp(np.interp(at, known, np.log(utilisations))))
    return Speed(float(np.interp(at, known, constants)), utilisation, bool(near))


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Constant and slope, neither negative, through (FLOPs, seconds)."""
    flops, seconds = np.array(points, dtype=float).T
    slope = float(np.polyfit(flops, seconds, 1)[0]) if np.ptp(flops) > 0 else 0.0
    constant = float((seconds - slope * flops).mean())
    if slope <= 0 or constant < 0:
        return 0.0, float(seconds.sum() / flops.sum())
    return constant, slope


def keep(gpu: str, machine: str, speeds: list[dict[str, Any]]) -> None:
    """Write what was measured on a device to `SPEEDS`, in place of earlier measurements of the same."""
    known = json.loads(SPEEDS.read_text())
    new = {_combination(point) for point in speeds}
    before = [point for point in known.get(gpu, {}).get("speeds", []) if _combination(point) not in new]
    known[gpu] = {"machine": machine, "speeds": sorted([*before, *speeds], key=_combination)}
    SPEEDS.write_text(as_text(known))
    _measured.cache_clear()


def as_text(known: dict[str, Any]) -> str:
    """The JSON of `SPEEDS`, with a line for each measurement."""
    parts = []
    for gpu, entry in known.items():
        rows = ",\n   ".join(json.dumps(point) for point in entry["speeds"])
        rest = {name: value for name, value in entry.items() if name != "speeds"}
        head = "".join(f"  {json.dumps(name)}: {json.dumps(value)},\n" for name, value in rest.items())
        parts.append(f' {json.dumps(gpu)}: {{\n{head}  "speeds": [\n   {rows}\n  ]\n }}')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _combination(point: dict[str, Any]) -> tuple[str, str, float]:
    return point["stage"], point["precision"], point["parameters"]


@cache
def _measured() -> dict[str, Any]:
    return json.loads(SPEEDS.read_text())
