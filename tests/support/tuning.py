"""Fine-tunings of the tiny small model that take a second."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from staff.data.task import Sample
from staff.data.tokens import TokenizedSamples, tokenize
from staff.models.spec import ModelSpec
from staff.store.cost import Meter
from staff.training.settings import FinetuneSettings
from staff.training.stage import Finetune

SPEC = ModelSpec("pkg://staff/assets/tiny/small")
SETTINGS = FinetuneSettings(
    learning_rate=1e-3, batch_size=4, device_batch_size=4, epochs=1, small_epochs=1, max_length=512
)


def samples_of(count: int) -> TokenizedSamples:
    """Samples of various lengths, as the small model reads them."""
    rows = [
        Sample(str(i), f"Say {i} twice:" + " please" * (7 * i % 32), f" {i} and {i}" * (1 + i % 3), ())
        for i in range(count)
    ]
    return tokenize(rows, SPEC.tokenizer())


def tuned(
    samples: TokenizedSamples,
    folder: Path,
    settings: FinetuneSettings = SETTINGS,
    *,
    epochs: float = 2,
    seed: int = 0,
    spec: ModelSpec = SPEC,
    online: str | None = None,
) -> dict[str, Any]:
    """The weights of a fine-tuning that is run in `folder`."""
    folder.mkdir()
    with Meter() as meter:
        Finetune(spec, samples, settings, epochs, seed, online).run(folder, meter)
    assert meter.cost.tokens_backward == round(epochs * samples.lengths.sum()) and meter.cost.flops > 0
    return weights_of(folder)


def weights_of(folder: Path) -> dict[str, Any]:
    (file,) = [file for file in folder.glob("*.safetensors") if "online" not in file.name]
    return load_file(file)


def history(folder: Path) -> dict[str, Any]:
    """What a fine-tuning tells of itself."""
    return json.loads((folder / "training.json").read_text())


def farthest(first: dict[str, Any], second: dict[str, Any]) -> float:
    """The largest difference between two sets of weights."""
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


def difference(first: dict[str, Any], second: dict[str, Any]) -> float:
    """The norm of the difference by the norm of the first: a few roundings that Adam magnifies do not decide it."""
    assert first.keys() == second.keys()
    squares = [((first[name] - second[name]).square().sum(), first[name].square().sum()) for name in first]
    apart, whole = (float(sum(column)) for column in zip(*squares))
    return (apart / whole) ** 0.5


STILL = replace(SETTINGS, learning_rate=1e-12)
"""Weights stay where they are."""
