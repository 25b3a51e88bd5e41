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

The second table is of fine-tuning alone, without dropout and at a constant learning rate, on the same batches:

- Trainer: transformers' `Trainer` as it comes, with its collator and the model's own loss;
- SFTTrainer: TRL's, on the same tokens, with the loss of completions alone, and no gradient checkpointing;
- SFTTrainer, padding-free: the same with TRL's flattened batches, where --padding_free 1 asks for them.

--trl names a folder of site-packages that has TRL, which is no dependency of ours. "loss" is the largest relative
difference of a logged loss from ours.
"""

from __future__ import annotations

import importlib
import json
import sys
from argparse import Namespace
from contextlib import nullcontext, redirect_stdout
from dataclasses import fields, replace
from functools import partial
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import numpy as np
from scipy.stats import rankdata, spearmanr
from transformers import DataCollatorForSeq2Seq, Trainer

from experiments.benchmarks.common import alternating, arguments, configured, row, table, write
from staff.data.tokens import IGNORED
from staff.models.adapters import fresh_lora
from staff.store.store import Store
from staff.training.stage import HISTORY, Finetune

if TYPE_CHECKING:
    from experiments.single import Run


def logits_everywhere() -> Any:
    """A context in which no architecture is known to the trainer: it is transformers' own."""
    return patch("staff.training.trainer.batches", lambda config: None)


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


class Peers:
    """Fine-tuning of the small model by each way; all return the logged losses."""

    def __init__(self, run: Run, epochs: int) -> None:
        lora = replace(run.settings.lora, dropout=0.0)
        settings = replace(run.settings, lora=lora, scheduler="constant", warmup_ratio=0.0, length_grouped=False)
        self.samples = run.tokenized["small"]
        self.stage = Finetune(run.family.small, self.samples, settings, epochs, seed=0)

    def ours(self) -> np.ndarray:
        with TemporaryDirectory() as folder:
            history = json.loads((Store(Path(folder)).get(self.stage).path / HISTORY).read_text())
        return np.array([entry["loss"] for entry in history["log"] if "loss" in entry])

    def trainer(self) -> np.ndarray:
        rows = [
            {"input_ids": self.samples.row(i).tolist(), "labels": self.samples.labels(i).tolist()}
            for i in range(len(self.samples))
        ]
        collator = DataCollatorForSeq2Seq(self.stage.spec.tokenizer())
        return self._losses(Trainer, self.stage.training_arguments, rows, data_collator=collator)

    def trl(self, padding_free: bool) -> np.ndarray:
        from datasets import Dataset

        trl: Any = importlib.import_module("trl")
        rows = Dataset.from_list(
            [
                {
                    "input_ids": self.samples.row(i).tolist(),
                    "completion_mask": (self.samples.labels(i) != IGNORED).astype(int).tolist(),
                }
                for i in range(len(self.samples))
            ]
        )

        def arguments(folder: Path) -> Any:
            plain = self.stage.training_arguments(folder)
            shared = {field.name: getattr(plain, field.name) for field in fields(plain) if field.init}
            own = {"completion_only_loss": True, "max_length": None, "padding_free": padding_free}
            return trl.SFTConfig(**shared, **own)

        return self._losses(trl.SFTTrainer, arguments, rows, processing_class=self.stage.spec.tokenizer())

    def _losses(self, kind: Any, arguments: Any, rows: Any, **settings: Any) -> np.ndarray:
        model = fresh_lora(self.stage.spec.load(), self.stage.settings.lora, self.stage.seed)
        with TemporaryDirectory() as folder, redirect_stdout(StringIO()):
            trainer = kind(model=model, args=arguments(Path(folder)), train_dataset=rows, **settings)
            trainer.train()
        return np.array([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def against_peers(run: Run, options: Namespace) -> list[str]:
    peers = Peers(run, options.epochs)
    ways = {"Trainer": peers.trainer, "ours": peers.ours}
    if options.trl:
        ways["SFTTrainer"] = partial(peers.trl, False)
        if options.padding_free:
            ways["SFTTrainer, padding-free"] = partial(peers.trl, True)
    seconds, losses = alternating(ways, options.rounds)
    return [
        row(
            f"{run.choices['family']} small, {run.choices['task']}",
            name,
            seconds[name],
            f"{seconds[name] / seconds['ours']:.2f} x",
            f"{np.max(np.abs(losses[name] / losses['ours'] - 1)):.0e}",
        )
        for name in ways
    ]


def main() -> None:
    options, cases = arguments(__doc__, samples=256, epochs=3, rounds=2, trl="", padding_free=0)
    sys.path.append(options.trl)
    lines = table("model, data", "way", "seconds", "Trainer / way", "rank correlation", "same tenth")
    peers = table("model, data", "way", "seconds", "way / ours", "loss")
    for case in cases:
        small = f"finetune.small_epochs={options.epochs}", f"task.train_limit={options.samples}"
        run = configured(*case, *small)
        new = [compare(run, options.rounds), against_peers(run, options)]
        lines, peers = lines + new[0], peers + new[1]
        print(*new[0], *new[1], sep="\n", flush=True)
    write(options.name, __doc__, lines, peers)


if __name__ == "__main__":
    main()
