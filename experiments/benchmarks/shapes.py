"""Models of known shapes with weights drawn at random, and samples as long as DialogSum's: neither needs a hub."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from experiments.stand_ins import KnownShape, sizes_of
from staff.data.tokens import TokenizedSamples
from staff.models.adapters import LoraSpec
from staff.models.spec import ModelSpec
from staff.training.memory import available_memory

NAMES = (
    "HuggingFaceTB/SmolLM2-135M-Instruct",
    "google/gemma-2b",
    "google/gemma-7b",
    "meta-llama/Llama-2-13b-hf",
)
PRECISIONS = ("float32", "bfloat16")
LORA = LoraSpec(rank=8, alpha=16, dropout=0.0, targets="all-linear")
ROOM = 1.1
"""Of the weights, so that anything can be computed with them."""


@dataclass(frozen=True)
class Drawn(KnownShape):
    """A model of a known shape whose weights are drawn at random, the same at every loading.

    Attributes:
        shrunk: two narrow blocks and a small vocabulary, for a processor.
    """

    shrunk: bool = False

    def config(self) -> Any:
        config = super().config()
        if self.shrunk:
            heads, keys = config.num_attention_heads, config.num_key_value_heads
            config.update({"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 512})
            config.update({"num_attention_heads": 4, "num_key_value_heads": max(1, 4 * keys // heads)})
            config.update({"head_dim": 8})
        return config

    def load(self) -> Any:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return self.shapes(device).eval()


def drawn(tiny: bool) -> Iterator[Drawn]:
    """Every shape in every precision, small ones first."""
    for name in NAMES:
        for precision in PRECISIONS:
            yield Drawn(name, dtype=precision, shrunk=tiny)


def dialogues(count: int, spec: ModelSpec, seed: int = 0) -> TokenizedSamples:
    """Samples of random tokens, as long as dialogues and summaries of DialogSum, give or take a tenth, so that
    hardly two batches have the same shape."""
    rng, lengths = np.random.default_rng(seed), sizes_of("tasks")["knkarthick/dialogsum"]["tokens"]
    scale = rng.uniform(0.9, 1.1, count) / (8 if getattr(spec, "shrunk", False) else 1)
    at = rng.integers(len(lengths["dialogue"]), size=count)
    prompts = (np.array(lengths["dialogue"])[at] * scale).astype(int) + 12  # and the words of the task
    whole = prompts + (np.array(lengths["summary"])[at] * scale).astype(int) + 1
    return random_tokens(whole, prompts, spec, rng)


def random_tokens(lengths: np.ndarray, prompts: np.ndarray, spec: ModelSpec, rng: np.random.Generator) -> Any:
    """Samples of these lengths, (N,), of which so many tokens are the prompt, (N,)."""
    vocabulary = spec.config().vocab_size
    rows = [rng.integers(4, vocabulary, length).tolist() for length in lengths]  # 0 to 3 are special
    return TokenizedSamples.of_rows([str(i) for i in range(len(rows))], rows, prompts.tolist())


def fits(spec: ModelSpec) -> bool:
    """Whether the device has room for the weights."""
    weights = spec.shapes().num_parameters() * (4 if spec.dtype == "float32" else 2)
    return ROOM * weights < available_memory()


def released(way: Callable[[], Any]) -> Any:
    """What `way` returns, or a sentence where memory runs out; memory of the device is freed afterwards."""
    try:
        return way()
    except torch.OutOfMemoryError:
        return "does not fit"
    finally:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def peak_memory(way: Callable[[], Any]) -> int:
    """The most bytes that tensors take while `way` runs, beyond those before on a processor, in all on a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        way()
        return torch.cuda.max_memory_allocated()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        way()
    held = most = 0
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.name() == "[memory]":
            held += event.nbytes()  # type: ignore[attr-defined]
            most = max(most, held)
    return most


class Deadline:
    """Whether there is time for another case."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    @property
    def passed(self) -> bool:
        return time.monotonic() > self._end
