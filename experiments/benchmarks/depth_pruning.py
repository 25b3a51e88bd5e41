"""How well small models cut out of the target predict its scores, and what they cost.

`python -m experiments.benchmarks.depth_pruning null 2 [0,1,3] -- family=tiny` takes small models and then any
settings of a run. A small model is null for the family's own, or what `family.small.from_target.keep_layers` takes.
Each is fine-tuned on the pool, and its effort scores are compared with the raw target's over the whole pool by
Spearman's correlation: as it is, and with the ranks of the answers' lengths regressed out of both, since long
answers have small gradients in every model. Correlations are means over --seeds; seconds and FLOPs are those of the
first seed. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

import numpy as np

from experiments.benchmarks.common import configured, machine, row, spearman, table
from staff.store.manifest import Artifact
from staff.store.stage import Stage
from staff.store.store import Store


class RecordingStore(Store):
    """A store that remembers the last artefact it gave, by kind of stage."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.last: dict[str, Artifact] = {}

    def get(self, stage: Stage) -> Artifact:
        self.last[stage.kind] = super().get(stage)
        return self.last[stage.kind]


def cost(artifact: Artifact) -> str:
    return f"{artifact.cost.seconds:.0f} s, {artifact.cost.flops / 1e12:.2f}"


def measure(small: str, seeds: list[int], settings: list[str]) -> tuple[str, str]:
    """The row of a small model, and that of the raw target."""
    which = "family.small.from_target" + ("=null" if small == "null" else f".keep_layers={small}")
    correlations, costs = [], []
    for seed in seeds:
        run = configured(*settings, which, f"seed={seed}")
        run.store = store = RecordingStore(run.store.root)
        of_small, by_small = run.pool.ask("effort", of="small"), store.last["scores"]
        of_target, by_target = run.pool.ask("effort", of="target"), store.last["scores"]
        lengths = run.pool.answer_lengths
        pairs = (of_small, of_target, None), (of_small, of_target, lengths), (lengths, of_target, None)
        correlations.append([spearman(*pair) for pair in pairs])
        costs.append([cost(artifact) for artifact in (store.last["finetune"], by_small, by_target)])
    plain, partial, length = np.mean(correlations, axis=0)
    (tuning, scoring, raw), spec = costs[0], run.family.small
    size = sum(p.numel() for p in spec.shapes().parameters()) / 1e6
    of_row = row(spec.name, f"{size:.1f}", tuning, scoring, f"{plain:.2f}", f"{partial:.2f}")
    return of_row, row(f"{run.family.target.name}, raw", "", "", raw, f"{length:.2f} by length alone", "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("small", nargs="+", help="null for the family's own, or a value of keep_layers")
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    options, settings = parser.parse_args(sys.argv[1:at]), sys.argv[at + 1 :]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    rows = [measure(small, options.seeds, settings) for small in options.small]
    header = "parameters, M", "fine-tuning, TFLOPs", "scoring, TFLOPs", "Spearman", "given length"
    print(*table("small model", *header), *(of_row for of_row, _ in rows), rows[-1][1], "", machine(), sep="\n")


if __name__ == "__main__":
    main()
