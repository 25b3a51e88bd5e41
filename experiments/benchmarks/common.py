"""What the benchmarks share: options, interleaved clocks, tables, the file with the result, and models and samples
of known shapes that need no hub: weights are drawn at random, and samples are as long as DialogSum's.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from scipy.stats import rankdata

from experiments.sizes import KnownShape, sizes_of
from staff.data.tokens import TokenizedSamples
from staff.models.adapters import LoraSpec
from staff.models.spec import ModelSpec
from staff.runtime.machine import processor_name
from staff.training.memory import available_memory

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from experiments.single import Run


FOLDER = Path("results/benchmarks")


def arguments(doc: str | None, **defaults: int | str) -> tuple[argparse.Namespace, list[list[str]]]:
    """The benchmark's options, and the settings of each case.

    Settings are what remains of the command line, in Hydra's syntax; `--` separates two cases.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--name", help=f"name of the section in {FOLDER}; by default the benchmark's")
    cases: list[list[str]] = [[]]
    for argument in sys.argv[1:]:
        cases.append([]) if argument == "--" else cases[-1].append(argument)
    options, cases[0] = parser.parse_known_args(cases[0])
    return options, [case for case in cases if case] or [[]]


def configured(*settings: str) -> Run:
    """The run that these settings compose, with its data, models and store. Nothing of it is carried out yet."""
    from hydra import compose, initialize_config_dir
    from omegaconf import open_dict

    from experiments.configuration import CONF
    from experiments.setup import Setup
    from experiments.single import Run

    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("config", list(settings), return_hydra_config=True)
    choices = dict(cfg.hydra.runtime.choices)
    with open_dict(cfg):
        del cfg["hydra"]
    return Run(Setup.of(cfg, choices))


def configured_method(name: str) -> DictConfig:
    """The configuration of this preset."""
    from hydra import compose, initialize_config_dir

    from experiments.configuration import CONF

    with initialize_config_dir(CONF, version_base="1.3"):
        return compose("config", [f"method={name}"]).method


def clock() -> float:
    """Seconds of processor time over all cores, or on a GPU the synchronised wall clock.

    Other work on the machine disturbs processor time less than wall time.
    """
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def alternating(ways: Mapping[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Median seconds of each way over interleaved rounds, and what each returned last.

    A round before the first warms up and is not measured.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    values: dict[str, Any] = {}
    gc.freeze()  # collections between the measurements then skip all that is loaded already
    try:
        for turn in range(rounds + 1):
            for name, way in ways.items():
                gc.collect()
                started = clock()
                values[name] = way()
                if turn:
                    seconds[name].append(clock() - started)
    finally:
        gc.unfreeze()
    return {name: float(np.median(taken)) for name, taken in seconds.items()}, values


def spearman(x: np.ndarray, y: np.ndarray, given: np.ndarray | None = None) -> float:
    """Spearman's correlation of x and y, with the ranks of a third variable regressed out of both."""
    design = np.ones((len(x), 1)) if given is None else np.stack([np.ones(len(x)), rankdata(given)], axis=1)
    residuals = [v - design @ np.linalg.lstsq(design, v, rcond=None)[0] for v in (rankdata(x), rankdata(y))]
    return float(np.corrcoef(*residuals)[0, 1])


def machine() -> str:
    """The device and the versions, in one sentence."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name()
    return (
        f"{device}, {os.cpu_count()} cores of which {torch.get_num_threads()} used, {platform.system()}; "
        f"Python {sys.version.split()[0]}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"NumPy {np.__version__}."
    )


def command() -> str:
    """The command line of the benchmark, with FOLDER in place of absolute paths."""
    said = " ".join(["python -m", f"experiments.benchmarks.{called()}", *sys.argv[1:]])
    return re.sub(r"(?<=[= ])/\S+", "FOLDER", said)


def called() -> str:
    """The name of the benchmark that runs."""
    return Path(sys.argv[0]).stem


def write(name: str | None, doc: str | None, *tables: list[str]) -> None:
    """Print tables, and write them with the benchmark's description, its command and the machine.

    They are the section `name` of README.md in results/benchmarks, and replace the one that it has by that name. By
    default the section is the benchmark's own, which alone has the description.
    """
    name = name or called()
    about = doc if name == called() else f"See [{called()}](#{called()}) for what is measured."
    made = f"Made by `{command()}`."
    text = "\n".join(
        [f"## {name}\n\n{about}", made, "", *("\n".join([*table, ""]) for table in tables), machine(), ""]
    )
    FOLDER.mkdir(parents=True, exist_ok=True)
    file = FOLDER / "README.md"
    before = file.read_text() if file.exists() else "# Benchmarks\n\n"
    head, *sections = re.split(r"^(?=## )", before, flags=re.MULTILINE)
    known = {section.partition("\n")[0]: section.rstrip("\n") + "\n" for section in sections}
    known[f"## {name}"] = text
    contents = " · ".join(f"[{title[3:]}](#{title[3:]})" for title in known)
    head = re.sub("^Contents: .*$", f"Contents: {contents}.", head, flags=re.MULTILINE)
    file.write_text(head + "\n".join(known.values()))
    print(text)


def table(*header: str) -> list[str]:
    """The first two lines of a Markdown table: the first column is left-aligned, the others are right-aligned."""
    return [row(*header), "|---|" + "---:|" * (len(header) - 1)]


def row(*cells: Any) -> str:
    """A row of a Markdown table; floats with three significant digits."""
    return "| " + " | ".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells) + " |"


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
