"""Fine-tunings of the tiny small model that take a second."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load_file

from staff.data.samples import Sample
from staff.data.tokens import TokenizedSamples, tokenize
from staff.models.spec import ModelSpec
from staff.store.cost import Meter
from staff.training.memory import finetuning_memory
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

SIZES = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
SIZES |= {"hidden_size": 128, "intermediate_size": 384, "vocab_size": 100}


def drawn(architecture: str, dtype: str, folder: Path) -> ModelSpec:
    """A model of four blocks with random weights, without a tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM

    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **SIZES, **special)).save_pretrained(folder)
    return ModelSpec(str(folder), dtype=dtype, attention="eager" if architecture == "gemma2" else "sdpa")


def told_and_peak(architecture: str, dtype: str, folder: Path, monkeypatch: Any, **changes: Any) -> tuple[int, int]:
    """The estimate of a fine-tuning's memory, and the most bytes that its tensors take, of two steps."""
    from experiments.benchmarks.common import peak_memory

    spec, tokenizer = drawn(architecture, dtype, folder / "model"), SPEC.tokenizer()
    monkeypatch.setattr(ModelSpec, "tokenizer", lambda _: tokenizer)
    rows = np.random.default_rng(0).integers(3, 100, (8, 256)).tolist()
    samples = TokenizedSamples.of_rows([str(i) for i in range(8)], rows, [248] * 8)
    settings = replace(SETTINGS, precision=dtype, **changes)
    told = finetuning_memory(spec, settings, samples.lengths, samples.answer_lengths).total
    return told, peak_memory(lambda: Finetune(spec, samples, settings, 1, 0).run(folder, Meter()))
