"""How well small models cut out of the target speak for it, and what they cost.

`python -m experiments.benchmark_depth_pruning null 2 [0,1,3] -- family=tiny` takes small models, each null for the
family's own or what `family.small.from_target.keep_layers` takes, and then any settings of a run. Each is
fine-tuned on the pool, and its effort scores are compared with the raw target's over the whole pool: Spearman's
correlation, as it is and with the ranks of the answers' lengths regressed out of both, since long answers have
small gradients whatever the model. Means over --seeds; seconds and FLOPs are those of the first. Prints a Markdown
table.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from hydra import compose, initialize_config_dir
from omegaconf import open_dict
from scipy.stats import rankdata
from staff.artifacts import Artifact, Store

from experiments.run import CONF
from experiments.single import Run


class Noting(Store):
    """A store that remembers what was got from it."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.got: list[Artifact] = []

    def get(self, *args: Any, **kwargs: Any) -> Artifact:
        self.got.append(super().get(*args, **kwargs))
        return self.got[-1]


def correlate(x: np.ndarray, y: np.ndarray, given: np.ndarray | None = None) -> float:
    """Spearman's correlation of x and y, with the ranks of a third variable regressed out of both."""
    known = np.ones((len(x), 1)) if given is None else np.stack([np.ones(len(x)), rankdata(given)], axis=1)
    residuals = [v - known @ np.linalg.lstsq(known, v, rcond=None)[0] for v in (rankdata(x), rankdata(y))]
    return float(np.corrcoef(*residuals)[0, 1])


def cost(artifact: Artifact) -> str:
    return f"{artifact.cost.seconds:.0f} s, {artifact.cost.flops / 1e12:.2f}"


def measure(small: str, seeds: list[int], overrides: list[str]) -> tuple[str, str]:
    """The row of a small model, and that of the raw target."""
    which = "family.small.from_target" + ("=null" if small == "null" else f".keep_layers={small}")
    correlations, costs = [], []
    for seed in seeds:
        with initialize_config_dir(CONF, version_base="1.3"):
            cfg = compose("config", [*overrides, which, f"seed={seed}"], return_hydra_config=True)
        with open_dict(cfg):
            del cfg["hydra"]
        run = Run(cfg, {})
        run.store = Noting(run.store.root)
        tuned = run.pool.tuned("small")
        ours, target = run.pool.scores("effort", "small"), run.pool.scores("effort", "target")
        lengths = run.pool.for_target.answer_lengths
        correlations.append([correlate(ours, target), correlate(ours, target, lengths), correlate(lengths, target)])
        costs.append((tuned, *run.store.got[-2:]))
    plain, partial, length = np.mean(correlations, axis=0)
    spec, (tuned, scored, raw) = run.family.small, costs[0]
    size = sum(p.numel() for p in spec.load().parameters()) / 1e6
    row = f"| {spec.name} | {size:.1f} | {cost(tuned)} | {cost(scored)} | {plain:.2f} | {partial:.2f} |"
    return row, f"| {run.family.target.name}, raw | | | {cost(raw)} | {length:.2f} by length alone | |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("small", nargs="+", help="null for the family's own, or a value of keep_layers")
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args, overrides = parser.parse_args(sys.argv[1:at]), sys.argv[at + 1 :]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    rows = [measure(small, args.seeds, overrides) for small in args.small]
    print("| small model | parameters, M | fine-tuning, TFLOPs | scoring, TFLOPs | Spearman | given length |")
    print("|---|---:|---:|---:|---:|---:|", *[row for row, _ in rows], rows[-1][1], sep="\n")
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    print(
        f"\n{platform.processor() or platform.machine()}, {threads}; Python {platform.python_version()}, ", end=""
    )
    print(f"torch {torch.__version__}, transformers {transformers.__version__}.")


if __name__ == "__main__":
    main()
