"""A Trainer that runs everything after the last block's attention at label positions only."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any, cast

import numpy as np
import torch
from accelerate.data_loader import SeedableRandomSampler, prepare_data_loader
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Sampler
from transformers import DataCollatorForSeq2Seq, Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler, get_length_grouped_indices

from staff.data.tokens import IGNORED, TokenizedSamples
from staff.errors import UserError
from staff.runtime import processes
from staff.scoring.exact import batches
from staff.scoring.positions import Positions, last_block, last_block_at
from staff.store.cost import peak_memory_bytes
from staff.store.stage import TrainingLogged, emit
from staff.training.objective import Objective
from staff.training.online import OnlineEfforts
from staff.training.reports import Speed

log = logging.getLogger(__name__)


class ShardedBatches(Sampler[list[int]]):
    """The batches of one process: its shard of every step's samples, `device_batch_size` at a time.

    A step's samples are those that a single process would take. All processes get equally many batches, some empty.

    Args:
        order: sampler of an epoch's samples; that of the main process is used.
        batch_size: samples of a step, over all processes.
        device_batch_size: samples of a batch, at most.
    """

    def __init__(self, order: Any, batch_size: int, device_batch_size: int) -> None:
        self._order, self._step, self._device = order, batch_size, device_batch_size

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self._order, "set_epoch"):
            self._order.set_epoch(epoch)

    def _batches(self, samples: int) -> int:
        """Batches per process of a step with this number of samples."""
        return -(-samples // (processes.world_size() * self._device))

    def __iter__(self) -> Iterator[list[int]]:
        order = [int(index) for index in self._order]
        order = processes.broadcast_from_main(lambda: order)
        for start in range(0, len(order), self._step):
            step = order[start : start + self._step]
            shard = processes.shard(step)
            for batch in range(self._batches(len(step))):
                yield shard[batch * self._device : (batch + 1) * self._device]

    def __len__(self) -> int:
        whole, rest = divmod(len(self._order), self._step)
        return whole * self._batches(self._step) + self._batches(rest)


class ScheduledOrder(Sampler[int]):
    """The samples of each epoch by a schedule, in random order.

    Args:
        schedule: positions by epoch, (epochs, m).
        lengths: tokens of every sample, (N,), to group samples of similar length; None: uniformly random.
        batch_size: samples of an optimiser step.
    """

    def __init__(self, schedule: np.ndarray, lengths: Sequence[int] | None, batch_size: int) -> None:
        self._schedule, self._lengths, self._batch = schedule, lengths, batch_size
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        # Drawn by torch's global generator, whose state `Checkpoints` restores.
        rows = self._schedule[self._epoch].tolist()
        if self._lengths is None:
            order = torch.randperm(len(rows)).tolist()
        else:
            order = get_length_grouped_indices([self._lengths[row] for row in rows], self._batch)
        return iter([rows[i] for i in order])

    def __len__(self) -> int:
        return self._schedule.shape[1]


class ShardingTrainer(Trainer):
    """A `Trainer` whose steps hold the same samples in several processes as in one.

    The sampler of `Trainer` would fill up the last step of an epoch with samples that were seen already.

    Args:
        warmup_start: of the learning rate, as in `staff.training.settings.FinetuneSettings`.
        schedule: as in `staff.training.stage.Finetune`.
    """

    def __init__(self, *, warmup_start: str, schedule: np.ndarray | None = None, **settings: Any) -> None:
        self._schedule = schedule
        super().__init__(**settings)
        self._warmup_start = warmup_start

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        known = self.lr_scheduler is not None
        theirs = super().create_scheduler(num_training_steps, optimizer)
        if not known and self._warmup_start == "first_step":
            warmup = self.args.get_warmup_steps(num_training_steps)
            self.lr_scheduler = rising_from_first_step(theirs, warmup)
        return self.lr_scheduler

    def get_train_dataloader(self) -> DataLoader:
        if processes.world_size() == 1:
            return super().get_train_dataloader()
        args, rows = self.args, cast(Any, self.train_dataset)
        if self._schedule is not None:
            order: Any = self._scheduled_order()
        elif args.train_sampling_strategy == "group_by_length":
            order = LengthGroupedSampler(self._step_samples, dataset=rows, lengths=list(rows["length"]))
        else:
            order = SeedableRandomSampler(rows, data_seed=args.data_seed)
        batches: Any = ShardedBatches(order, self._step_samples, args.per_device_train_batch_size)
        loader = DataLoader(
            rows, batch_sampler=batches, collate_fn=self.data_collator, pin_memory=args.dataloader_pin_memory
        )
        return prepare_data_loader(loader, num_processes=1, process_index=0)

    @property
    def _step_samples(self) -> int:
        """Samples of an optimiser step, over all processes."""
        args = self.args
        return args.per_device_train_batch_size * args.gradient_accumulation_steps * processes.world_size()

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        # Private, as Trainer has no public way to set an order; tests/test_finetune.py follows a schedule.
        return super()._get_train_sampler(train_dataset) if self._schedule is None else self._scheduled_order()

    def _scheduled_order(self) -> ScheduledOrder:
        assert self._schedule is not None
        grouped = self.args.train_sampling_strategy == "group_by_length"
        lengths = list(cast(Any, self.train_dataset)["length"]) if grouped else None
        return ScheduledOrder(self._schedule, lengths, self._step_samples)


def rising_from_first_step(scheduler: Any, warmup: int) -> LambdaLR:
    """The schedule with warm-up shifted by one step: the k-th step has k / warmup of the rate.

    Args:
        scheduler: a LambdaLR whose rate rises from zero over `warmup` steps, or is constant.
    """

    def ahead(factor: Callable[[int], float]) -> Callable[[int], float]:
        return lambda step: factor(step + 1 if step < warmup else step)

    return LambdaLR(scheduler.optimizer, [ahead(factor) for factor in scheduler.lr_lambdas])


class AnswerTrainer(ShardingTrainer):
    """A Trainer with the same loss that computes no logits of the prompt.

    For long prompts and large vocabularies these are most of the memory, and for small models much of the time.

    Args:
        ids: ids of the training samples; "row" of a batch has positions in it.
        objective: the loss of each answer token.
        efforts: collects efforts in the last epoch.
    """

    def __init__(
        self,
        *,
        tokenizer: Any,
        ids: Sequence[str],
        objective: Objective,
        efforts: OnlineEfforts | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(data_collator=_collator(tokenizer), **settings)
        self.ids, self.objective, self.efforts = ids, objective, efforts
        self._speed = Speed()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log as `Trainer` does, and emit loss, gradient norm, learning rate, speed and memory."""
        super().log(logs, start_time)
        if "loss" in logs:
            measured = {"tokens_per_second": self._speed.read(), "memory_gb": peak_memory_bytes() / 1e9}
            emit(TrainingLogged(self.state.global_step, {**logs, **measured}))

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: Any = False, num_items_in_batch: Any = None
    ) -> Any:
        self._speed.count(inputs["attention_mask"])
        positions = Positions.of_predictions(inputs["labels"])
        tokens = len(positions.targets) if num_items_in_batch is None else num_items_in_batch
        if processes.world_size() > 1:  # gradients are averaged over processes, but the loss is a sum
            tokens = tokens / processes.world_size()
        watching, rows = nullcontext(), inputs["row"]
        if self.efforts is not None and len(rows) and self.state.epoch >= self.args.num_train_epochs - 1:
            watching = self.efforts.watching(rows, positions, tokens)
        with watching:
            logits = self._answer_logits(model, inputs, positions)
        losses = self.objective.compute(logits, positions.targets)
        total = losses.sum()
        with processes.raise_on_all_ranks():
            if not torch.isfinite(total):
                self._refuse(positions.mean(losses), rows)
        return total / tokens

    def _answer_logits(self, model: Any, inputs: Any, positions: Positions) -> Tensor:
        """Logits at the positions that predict answer tokens: (L, V)."""
        plain = self.accelerator.unwrap_model(model)
        if batches(plain.config) is None:
            outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
            return positions.gather(outputs.logits)[0]
        with last_block_at(plain, positions):
            # No attention mask: padding is on the right of all labels, so a causal model does not attend to it.
            return model(input_ids=inputs["input_ids"], use_cache=False).logits.squeeze(0)

    def _refuse(self, losses: Tensor, rows: Tensor) -> None:
        name = self.ids[int(rows[int((~torch.isfinite(losses)).nonzero()[0])])]
        raise UserError(
            f"the loss of sample {name!r} is not finite in step {self.state.global_step + 1}: remove it, "
            f"or, where others fail as well, lower finetune.learning_rate={self.args.learning_rate}."
        )


def checkpoint_blocks(model: Any) -> None:
    """Turn on gradient checkpointing for every block except the one that `last_block_at` hooks into.

    The hooks are gone when a block is run again, and the last block's memory is needed before that of the others.
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if batches(model.config):
        last_block(model).gradient_checkpointing = False


def _collator(tokenizer: Any) -> Callable[[list[dict[str, Any]]], Any]:
    """A collator that pads to the longest sample and names the samples of a batch in "row".

    A batch without samples gets one token without a label. It adds nothing to the loss, but all processes must run
    equally many passes.
    """
    pad = DataCollatorForSeq2Seq(tokenizer)
    empty = {"input_ids": [tokenizer.pad_token_id], "prompt_length": 1}

    def collate(features: list[dict[str, Any]]) -> Any:
        samples = features or [empty]
        batch = pad([{"input_ids": sample["input_ids"], "labels": _labels(sample)} for sample in samples])
        batch["row"] = torch.tensor([feature["row"] for feature in features], dtype=torch.int64)
        return batch

    return collate


def _labels(sample: dict[str, Any]) -> list[int]:
    tokens, start = sample["input_ids"], sample["prompt_length"]
    if "labelled" not in sample:
        return [IGNORED] * start + tokens[start:]
    return [token if wanted else IGNORED for token, wanted in zip(tokens, sample["labelled"], strict=True)]


class Rows:
    """The samples as a map-style data set, which shares their token ids. By "length", the lengths of all."""

    def __init__(self, samples: TokenizedSamples) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, at: int | str) -> Any:
        samples = self._samples
        if at == "length":
            return samples.lengths.tolist()
        i = int(at)
        row = {"input_ids": samples.row(i).tolist(), "prompt_length": int(samples.prompt_lengths[i]), "row": i}
        return row if samples.labelled is None else {**row, "labelled": samples.label_mask(i).tolist()}
