"""Cost of every method once its signals are there: 100,000 samples, 576 dimensions, a coreset of 10,000.

`python -m experiments.benchmarks.methods` selects by every preset, each in a process of its own. Signals are drawn
with seed 0, embeddings around centres of about twenty samples; drawing them is not measured. "seconds" is the wall
time of `select`, "CPU seconds" its processor time over all cores, which other work disturbs less. Peak memory is
that of the process, with interpreter and signals. The bounds are 5 minutes and 4 GB, and 45 minutes for facility
location. `delift` refuses pools of this size; `data_whisperer` is given attention and metrics. A benchmark that was
interrupted goes on.

--python PATH names an interpreter with submodlib-py or apricot-select. Facility location of both is then measured
beside ours on 5,000 samples, which their dense matrices allow. --shrink 100 divides sizes by 100. --only NAME,NAME.
"""

from __future__ import annotations

import json
import subprocess
import time
import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from staff.errors import UserError
from staff.selection import Draws, SelectionMethod, run_method
from staff.signals import named_all
from staff.store.cost import Meter

SIZE, BUDGET, DIMENSIONS, EPOCHS, DEV_SIZE = 100_000, 10_000, 576, 4, 200
BESIDE = 5_000
SLOW = "facility_location"
APART = ("precomputed", "imported", "oracle", "full", "raw")
"""Need a file or a planted pool, or select nothing."""

THEIRS = {
    "submodlib": """
from submodlib import FacilityLocationFunction
f = FacilityLocationFunction(n=len(x), mode="dense", data=x, metric="cosine")
f.maximize(budget=budget, optimizer="LazyGreedy", show_progress=False)""",
    "apricot": """
from apricot import FacilityLocationSelection
FacilityLocationSelection(budget, metric="cosine", optimizer="lazy").fit(x)""",
}


@dataclass
class DrawnPool:
    """Answers every question with numbers drawn by it, and adds up the seconds that this takes."""

    size: int
    drawing: float = 0.0
    processing: float = 0.0
    ids: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.ids = [f"sample {i}" for i in range(self.size)]
        rng = np.random.default_rng(0)
        self.answer_lengths = rng.integers(5, 200, self.size)
        self.lengths = self.answer_lengths + rng.integers(20, 400, self.size)
        self.groups = np.where(np.arange(self.size) % 5 == 0, "fifth", "rest")
        self.dev_groups = np.resize(["fifth", "rest"], DEV_SIZE)

    def epochs(self, of: str) -> int:
        return EPOCHS

    def learning_rates(self, of: str) -> np.ndarray:
        return 1e-4 * np.arange(EPOCHS, 0, -1)

    def ask(self, signal: Any, of: str, at: Any = None, view: str = "pool", **options: Any) -> Any:
        started = time.perf_counter(), time.process_time()
        if signal == "in_context":
            answers = [np.random.default_rng(0).random(np.hstack(list(options.values())[:2]).shape)]
        else:
            several = isinstance(signal, list | tuple)
            rows = len(at) if at is not None else self.size if view == "pool" else DEV_SIZE
            answers = [_drawn(one, of, rows) for one in named_all(signal if several else [signal], options)]
        self.drawing += time.perf_counter() - started[0]
        self.processing += time.process_time() - started[1]
        return answers if isinstance(signal, list | tuple) else answers[0]


def _drawn(signal: Any, of: str, rows: int) -> np.ndarray:
    rng = np.random.default_rng(zlib.crc32(f"{signal.name} {of} {rows}".encode()))
    epochs = (EPOCHS,) if of.endswith("@epochs") else ()
    if not signal.shape(SimpleNamespace(hidden_size=DIMENSIONS)):
        return rng.lognormal(0, 0.5, (rows, *epochs))
    return rng.standard_normal((rows, *epochs, DIMENSIONS), dtype=np.float32) if epochs else clustered(rows, rng)


def clustered(rows: int, rng: np.random.Generator) -> np.ndarray:
    """Embeddings around centres of about twenty samples, (rows, DIMENSIONS) float32."""
    centres = rng.standard_normal((max(1, rows // 20), DIMENSIONS), dtype=np.float32)
    values = rng.standard_normal((rows, DIMENSIONS), dtype=np.float32)
    return values + centres[rng.integers(0, len(centres), rows)]


def measure(method: SelectionMethod, size: int, budget: int) -> dict[str, Any]:
    """Seconds and bytes of a selection, or why it was refused."""
    pool = DrawnPool(size)
    started = time.process_time()
    try:
        with Meter() as meter:
            run_method(method, pool, budget, Draws(0, pool.ids))  # type: ignore[arg-type]
    except UserError as error:
        return {"refused": str(error)}
    cpu = time.process_time() - started - pool.processing
    return {"seconds": meter.cost.seconds - pool.drawing, "cpu": cpu, "bytes": meter.cost.peak_memory_bytes}


def beside(python: str, name: str, size: int, budget: int) -> dict[str, Any]:
    """The same of another library's facility location, in a process of its interpreter."""
    program = f"""
import json, resource, time, numpy as np
x, budget = np.load("{{}}"), {budget}
started = time.perf_counter(), time.process_time()
{THEIRS[name]}
print(json.dumps({{{{"seconds": time.perf_counter() - started[0], "cpu": time.process_time() - started[1],
    "bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}}}}))
"""
    file = Path(f"beside-{size}.npy").absolute()
    np.save(file, clustered(size, np.random.default_rng(0)))
    try:
        ran = subprocess.run([python, "-c", program.format(file)], capture_output=True, text=True)
    finally:
        file.unlink()
    if ran.returncode:
        return {"refused": (ran.stderr.strip().splitlines() or ["it was killed"])[-1]}
    return json.loads(ran.stdout.splitlines()[-1])


def main() -> None:
    # Imported here, so that the measured processes, which import this file, do not load torch.
    from hydra.utils import instantiate

    from experiments.benchmarks.common import FOLDER, arguments, configured_method, row, table, write
    from experiments.configuration import CONF

    options, _ = arguments(__doc__, shrink=1, python="", only="")
    size, budget = SIZE // options.shrink, BUDGET // options.shrink
    presets = sorted(file.stem for file in Path(CONF, "method").glob("*.yaml") if file.stem not in APART)
    presets = options.only.split(",") if options.only else sorted(presets, key=lambda name: name.startswith(SLOW))
    name = options.name or "methods"
    kept = FOLDER / f"{name}.rows.json"  # of a benchmark that was interrupted
    FOLDER.mkdir(parents=True, exist_ok=True)
    done: dict[str, Any] = json.loads(kept.read_text()) if kept.exists() else {}
    small = BESIDE // options.shrink
    cases = [(preset, "", size, budget) for preset in presets]
    if options.python:
        cases += [
            (SLOW, "", small, small // 10),
            *((other, options.python, small, small // 10) for other in THEIRS),
        ]
    lines = table("method", "pool", "coreset", "seconds", "CPU seconds", "peak memory, MB")
    refused = []
    for case, python, n, m in cases:
        key = f"{case} {n}"
        if key not in done:
            if python:
                done[key] = beside(python, case, n, m)
            else:
                method = instantiate(configured_method(case), _convert_="all")
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as executor:
                    done[key] = executor.submit(measure, method, n, m).result()
            kept.write_text(json.dumps(done))
        this = done[key]
        if "refused" in this:
            refused.append(f"`{case}` at {n:,}: {this['refused']}")
            continue
        memory = f"{this['bytes'] / 1e6:,.0f}"
        lines.append(row(case, f"{n:,}", f"{m:,}", this["seconds"], this["cpu"], memory))
        print(lines[-1], flush=True)
    blas = np.show_config(mode="dicts")["Build Dependencies"]["blas"]
    write(name, __doc__, [*lines, "", *refused, "", f"BLAS: {blas['name']} {blas['version']}."])
    kept.unlink()


if __name__ == "__main__":
    main()
