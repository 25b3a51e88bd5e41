"""What the benchmarks share: samples and models as a run has them, interleaved clocks, and the file they end in."""

from __future__ import annotations

import argparse
import gc
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from hydra import compose, initialize_config_dir
from omegaconf import open_dict
from staff.cost import processor_name

from experiments.run import CONF
from experiments.single import Run

FOLDER = Path("results/benchmarks")


def arguments(doc: str | None, **defaults: int | str) -> tuple[argparse.Namespace, list[list[str]]]:
    """Options by name, and settings of a run; `--` between the settings of one case and those of the next."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=type(value), default=value)
    parser.add_argument("--name", help=f"of the file in {FOLDER}; by default the benchmark's")
    known, settings = parser.parse_known_args()
    cases: list[list[str]] = [[]]
    for setting in settings:
        cases.append([]) if setting == "--" else cases[-1].append(setting)
    return known, [case for case in cases if case] or [[]]


def configured(*settings: str) -> Run:
    """The run that these settings compose: its data, family and store; nothing of it is carried out yet."""
    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("config", list(settings), return_hydra_config=True)
    choices = dict(cfg.hydra.runtime.choices)
    with open_dict(cfg):
        del cfg["hydra"]
    return Run(cfg, choices)


def clock() -> float:
    """Seconds that the processor spent on this process, all cores together, which other work on the machine
    disturbs less than the clock; on a GPU the clock, synchronised."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def alternating(ways: Mapping[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, float], dict[str, Any]]:
    """Median seconds of each way over interleaved rounds, the first not counted, and what each returned last."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    values: dict[str, Any] = {}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            gc.collect()
            started = clock()
            values[name] = way()
            if turn:
                seconds[name].append(clock() - started)
    return {name: float(np.median(taken)) for name, taken in seconds.items()}, values


def machine() -> str:
    """What it ran on, and with which versions."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name()
    return (
        f"{device}, {os.cpu_count()} cores of which {torch.get_num_threads()} used, {platform.system()}; "
        f"Python {sys.version.split()[0]}, torch {torch.__version__}, transformers {transformers.__version__}."
    )


def write(name: str, doc: str | None, *tables: list[str]) -> None:
    """Print Markdown tables and keep them, with what they are and what they ran on, in results/benchmarks."""
    text = "\n".join([f"# {doc}", *("\n".join([*table, ""]) for table in tables), machine(), ""])
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{name}.md").write_text(text)
    print(text)


def table(*header: str) -> list[str]:
    """The first two lines of a Markdown table: the first column to the left, the others to the right."""
    return [row(*header), "|---|" + "---:|" * (len(header) - 1)]


def row(*cells: Any) -> str:
    return "| " + " | ".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells) + " |"
