"""What the benchmarks share: options and settings, interleaved clocks, tables, and the file with the result."""

from __future__ import annotations

import argparse
import gc
import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from scipy.stats import rankdata

from staff.runtime.machine import processor_name

if TYPE_CHECKING:  # Hydra is imported where it is used: the benchmarks of a GPU do without
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
    parser.add_argument("--name", help=f"name of the file in {FOLDER}; by default the benchmark's")
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
    from experiments.single import Run

    with initialize_config_dir(CONF, version_base="1.3"):
        cfg = compose("config", list(settings), return_hydra_config=True)
    choices = dict(cfg.hydra.runtime.choices)
    with open_dict(cfg):
        del cfg["hydra"]
    return Run(cfg, choices)


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


def write(name: str, doc: str | None, *tables: list[str]) -> None:
    """Print tables, and write them with the benchmark's description and the machine to results/benchmarks."""
    text = "\n".join([f"# {doc}", *("\n".join([*table, ""]) for table in tables), machine(), ""])
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / f"{name}.md").write_text(text)
    print(text)


def table(*header: str) -> list[str]:
    """The first two lines of a Markdown table: the first column is left-aligned, the others are right-aligned."""
    return [row(*header), "|---|" + "---:|" * (len(header) - 1)]


def row(*cells: Any) -> str:
    """A row of a Markdown table; floats with three significant digits."""
    return "| " + " | ".join(f"{cell:.3g}" if isinstance(cell, float) else str(cell) for cell in cells) + " |"
