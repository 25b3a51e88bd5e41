"""transformers' Trainer, with what follows the last attention run only where there are labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, Trainer

from staff.errors import UserError
from staff.gradients import ARCHITECTURES, Positions, last_block, last_block_at, token_losses
from staff.online import OnlineEfforts


class AnswerTrainer(Trainer):
    """The Trainer's loss at less work: no logits of the prompt, which for a long prompt and a large vocabulary are
    most of the memory and, for a small model, much of the time.

    Args:
        ids: of the training samples; a batch tells by "row" which of them it holds.
        efforts: watches the last epoch.
    """

    def __init__(self, *, ids: Sequence[str], efforts: OnlineEfforts | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        self.ids, self.efforts = ids, efforts

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: Any = False, num_items_in_batch: Any = None
    ) -> Any:
        positions = Positions.of_predictions(inputs["labels"])
        tokens = len(positions.targets) if num_items_in_batch is None else num_items_in_batch
        watching = nullcontext()
        if self.efforts is not None and self.state.epoch >= self.args.num_train_epochs - 1:
            watching = self.efforts.watching(inputs["row"], positions, tokens)
        with watching, last_block_at(self.accelerator.unwrap_model(model), positions):
            # No attention mask: padding is on the right, where a causal model does not look from a label.
            logits = model(input_ids=inputs["input_ids"], use_cache=False).logits[0]
        losses = token_losses(logits, positions.targets)
        total = losses.sum()
        if not torch.isfinite(total):
            self._refuse(positions.mean(losses), inputs["row"])
        return total / tokens

    def _refuse(self, losses: Tensor, rows: Tensor) -> None:
        name = self.ids[int(rows[int((~torch.isfinite(losses)).nonzero()[0])])]
        raise UserError(
            f"the loss of sample {name!r} is not finite in step {self.state.global_step + 1}: take it out, "
            f"or, where others fail as well, lower finetune.learning_rate={self.args.learning_rate}."
        )


def trainer_for(
    model: Any, tokenizer: Any, ids: Sequence[str], efforts: OnlineEfforts | None, **settings: Any
) -> Any:
    """An AnswerTrainer, or for an architecture that it does not know, transformers' own."""
    if model.config.model_type not in ARCHITECTURES:
        return Trainer(model=model, data_collator=_collator(tokenizer, rows=False), **settings)
    collator = _collator(tokenizer, rows=True)
    return AnswerTrainer(model=model, ids=ids, efforts=efforts, data_collator=collator, **settings)


def checkpoint_blocks(model: Any) -> None:
    """Gradient checkpointing of every block but the last of those that `last_block_at` knows: its hooks are gone
    when a block is run again, and its memory is needed before the first of the others is."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if model.config.model_type in ARCHITECTURES:
        last_block(model).gradient_checkpointing = False


def _collator(tokenizer: Any, rows: bool) -> Callable[[list[dict[str, Any]]], Any]:
    """Pads to the longest sample; with `rows` a batch also tells which samples it holds."""
    pad = DataCollatorForSeq2Seq(tokenizer)

    def collate(features: list[dict[str, Any]]) -> Any:
        batch = pad([{name: feature[name] for name in ("input_ids", "labels")} for feature in features])
        if rows:
            batch["row"] = torch.tensor([feature["row"] for feature in features])
        return batch

    return collate
