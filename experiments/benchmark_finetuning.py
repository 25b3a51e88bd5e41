"""What fine-tuning the small model and scoring with it takes, nine tenths of STAFF's overhead, and what cuts it.

    python -m experiments.benchmark_finetuning task=dialogsum task.data_dir=FOLDER -- task=gsm8k ...

takes settings of a run, `--` between cases, and fine-tunes the small model on the first --samples of each pool for
--epochs, in interleaved rounds:

- Trainer: transformers' own, logits everywhere;
- ours: what follows the last block's attention at label positions alone, the same weights;
- grouped: ours, with batches of samples of similar length (`finetune.length_grouped=true`): other batches, other
  weights;
- online: ours, with the efforts taken from the last epoch's backward passes (`method.scores=online`), which spares
  the scoring pass.

Times are the processor's and include the scoring pass, apart from online. The last columns compare with ours the
efforts of the others: Spearman's correlation, and how many samples lie in the same tenth by rank.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import numpy as np
from scipy.stats import rankdata, spearmanr
from staff.artifacts import Store

from experiments.benchmarking import alternating, arguments, configured, row, table, write
from experiments.single import Run
from staff.pool import Pool


def efforts(run: Run, architectures: tuple[str, ...] | None, grouped: bool, online: bool) -> np.ndarray:
    """Efforts of the small model after fine-tuning it, in a store of their own."""
    with TemporaryDirectory() as folder:
        settings = replace(run.settings, length_grouped=grouped)
        samples, family, scoring = run.tokenized["small"], run.family, run.scoring
        pool = Pool(samples, samples, family, settings, Store(Path(folder)), run.cfg.selection_seed, scoring)
        if architectures is not None:
            with patch("staff.trainer.ARCHITECTURES", architectures):
                pool.tuned("small")
        return pool.scores("effort", "small", None, online=online)


def tenths(scores: np.ndarray) -> np.ndarray:
    return (10 * (rankdata(scores) - 0.5) / len(scores)).astype(int)


def compare(run: Run, rounds: int) -> list[str]:
    ways = {
        "Trainer": partial(efforts, run, (), False, False),
        "ours": partial(efforts, run, None, False, False),
        "grouped": partial(efforts, run, None, True, False),
        "online": partial(efforts, run, None, False, True),
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
    asked, cases = arguments(__doc__, samples=256, epochs=3, rounds=2)
    lines = table("model, data", "way", "seconds", "Trainer / way", "rank correlation", "same tenth")
    for case in cases:
        small = f"finetune.small_epochs={asked.epochs}", f"task.train_limit={asked.samples}"
        lines += compare(configured(*case, *small), asked.rounds)
        print(*lines[-4:], sep="\n", flush=True)
    write(asked.name or "finetuning", __doc__, lines)


if __name__ == "__main__":
    main()
