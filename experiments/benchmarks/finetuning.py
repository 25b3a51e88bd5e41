"""What fine-tuning the small model and scoring with it cost, nine tenths of STAFF's overhead, and what reduces it.

    python -m experiments.benchmarks.finetuning task=dialogsum task.data_dir=FOLDER -- task=gsm8k ...

takes settings of a run, with `--` between cases. The small model is fine-tuned on the first --samples of each pool
for --epochs, in interleaved rounds:

- Trainer: transformers' own, with logits at all positions;
- ours: the last block after its attention, and the head, at label positions alone; the same weights;
- grouped: ours, with batches of samples of similar length (`finetune.length_grouped=true`); other batches, other
  weights;
- online: ours, with the efforts taken from the backward passes of the last epoch (`method.scores=online`), which
  saves the scoring pass.

Times are processor time and include the scoring pass, except for online. The last two columns compare each way's
efforts with ours: Spearman's correlation, and the fraction of samples in the same tenth by rank.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
from scipy.stats import rankdata, spearmanr

from experiments.benchmarks.common import alternating, arguments, configured, row, table, write
from staff.store.store import Store

if TYPE_CHECKING:
    from experiments.single import Run


def logits_everywhere() -> Any:
    """A context in which no architecture is known to the trainer: it is transformers' own."""
    return patch("staff.training.trainer.ARCHITECTURES", ())


def efforts(run: Run, *, everywhere: bool = False, grouped: bool = False, online: bool = False) -> np.ndarray:
    """Efforts of the small model after its fine-tuning, computed in a store of their own: (N,)."""
    settings = replace(run.settings, length_grouped=grouped)
    trainer = logits_everywhere() if everywhere else nullcontext()
    with TemporaryDirectory() as folder:
        pool = replace(run.pool, settings=settings, store=Store(Path(folder)))
        with trainer:
            pool.store.get(pool.training("small", online="last_v_b" if online else None))
        return pool.ask("effort", of="small@online" if online else "small")


def tenths(scores: np.ndarray) -> np.ndarray:
    return (10 * (rankdata(scores) - 0.5) / len(scores)).astype(int)


def compare(run: Run, rounds: int) -> list[str]:
    ways = {
        "Trainer": partial(efforts, run, everywhere=True),
        "ours": partial(efforts, run),
        "grouped": partial(efforts, run, grouped=True),
        "online": partial(efforts, run, online=True),
    }
    seconds, scores = alternating(ways, rounds)
    return [
        row(
            f"{run.choices['family']} small, {run.choices['task']}",
            name,
            seconds[name],
            f"{seconds['Trainer'] / seconds[name]:.2f} x",
            f"{spearmanr(scores[name], scores['ours'])[0]:.4f}",
            f"{np.mean(tenths(scores[name]) == tenths(scores['ours'])):.2f}",
        )
        for name in ways
    ]


def main() -> None:
    options, cases = arguments(__doc__, samples=256, epochs=3, rounds=2)
    lines = table("model, data", "way", "seconds", "Trainer / way", "rank correlation", "same tenth")
    for case in cases:
        small = f"finetune.small_epochs={options.epochs}", f"task.train_limit={options.samples}"
        lines += compare(configured(*case, *small), options.rounds)
        print(*lines[-4:], sep="\n", flush=True)
    write(options.name or "finetuning", __doc__, lines)


if __name__ == "__main__":
    main()
