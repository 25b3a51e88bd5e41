"""Benchmarks of a GPU, in pieces, without a network: `python -m experiments.benchmarks.gpu [PIECE ...]`.

- tests: those that a GPU changes.
- qlora: fine-tuning, scores and answers of a model in 4 bits; needs bitsandbytes.
- scoring, finetuning, generation: at the shapes of SmolLM2-135M, Gemma-2b, Gemma-7b and Llama-2-13b, in float32 and
  bfloat16, beside the authors' procedure or transformers' own, and beside a bound. Weights are drawn at random.
- memory: the estimates before a fine-tuning beside its measured peak.
- plan: the speeds of all stages by size of model, which `staff-plan` reads (experiments/speeds.json).

Without a PIECE all of them run, each in a process of its own. They write a table and its JSON to
results/benchmarks/gpu-CARD/. They need torch, transformers, peft, accelerate, pandas, SciPy, psutil and pytest; not
Hydra, OmegaConf, datasets, wandb or rouge-score.

--tiny shrinks the shapes to seconds on a processor, and writes to results/benchmarks/tiny/. Without a GPU shapes
are always shrunk, but for `plan`, which then measures one core with the tiny family and SmolLM2.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from experiments.benchmarks.common import FOLDER, Deadline, machine, row, table

Rows = Iterator[dict[str, Any]]
PIECES = {
    "tests": ("gpu_checks", 150),
    "qlora": ("gpu_checks", 60),
    "scoring": ("gpu_speed", 270),
    "finetuning": ("gpu_speed", 240),
    "generation": ("gpu_speed", 210),
    "memory": ("gpu_checks", 120),
    "plan": ("gpu_checks", 240),
}
"""The module of each piece, and the seconds after which it starts no further case: 22 minutes together."""
LIMIT = 480
"""Seconds after which a piece is stopped. The rows that it has written stay."""


def folder_name(tiny: bool) -> str:
    """The folder of the results: by the card, "tiny", or "cpu"."""
    if tiny:
        return "tiny"
    if not torch.cuda.is_available():
        return "cpu"
    return "gpu-" + re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def versions() -> str:
    """The machine, and the versions of the packages that the pieces use."""

    def of(package: str) -> str:
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            return f"no {package}"

    return f"{machine()} {', '.join(of(package) for package in ('peft', 'accelerate', 'bitsandbytes'))}."


def carry_out(name: str, tiny: bool) -> bool:
    """Run a piece, writing its table and JSON after every row. Returns whether no row is a failure."""
    module, seconds = PIECES[name]
    piece: Callable[[bool, Deadline], Rows] = getattr(import_module(f"experiments.benchmarks.{module}"), name)
    folder = FOLDER / folder_name(tiny)
    folder.mkdir(parents=True, exist_ok=True)
    rows, about = [], versions()
    for new in piece(tiny, Deadline(seconds)):
        rows.append(new)
        print(json.dumps(new), flush=True)
        (folder / f"{name}.json").write_text(json.dumps({"machine": about, "tiny": tiny, "rows": rows}, indent=1))
        columns = list(dict.fromkeys(column for of_row in rows for column in of_row))
        lines = [*table(*columns), *(row(*(of_row.get(column, "") for column in columns)) for of_row in rows)]
        text = [f"# {(piece.__doc__ or name).strip()}", *lines, about]
        (folder / f"{name}.md").write_text("\n".join([text[0], "", *text[1:-1], "", text[-1], ""]))
    return not any(of_row.get("result") == "failed" for of_row in rows)


def in_processes(tiny: bool) -> bool:
    """Run every piece in a process of its own. Returns whether all of them succeeded."""
    well = True
    for name in PIECES:
        command = [sys.executable, "-m", "experiments.benchmarks.gpu", name, *(["--tiny"] if tiny else [])]
        try:
            well &= subprocess.run(command, timeout=LIMIT).returncode == 0
        except subprocess.TimeoutExpired:
            print(f"{name}: stopped after {LIMIT} s", flush=True)
            well = False
    return well


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pieces", nargs="*", choices=[*PIECES, []], default=[], help="by default all")
    parser.add_argument("--tiny", action="store_true", help="shrunk shapes")
    asked = parser.parse_args()
    if not asked.pieces:
        sys.exit(0 if in_processes(asked.tiny) else 1)
    shrunk = {name: asked.tiny or (name != "plan" and not torch.cuda.is_available()) for name in asked.pieces}
    well = [carry_out(name, shrunk[name]) for name in asked.pieces]
    sys.exit(0 if all(well) else 1)


if __name__ == "__main__":
    main()
