"""Answers in context: those of a model to queries after demonstrations, and its attention on each demonstration.

A prompt is the demonstrations with their answers, a blank line after each (in a chat: the ends of their turns), and
the prompt of one query. The answer is generated greedily, and ends where the model starts another sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from staff.data.tokens import TokenizedSamples
from staff.errors import UserError
from staff.evaluation.generator import default_batch_tokens, end_tokens_of
from staff.evaluation.metrics.metric import Metric
from staff.models.flops import forward_flops
from staff.models.spec import ARCHITECTURES
from staff.models.state import ModelState
from staff.runtime import processes
from staff.runtime.machine import without_cudnn_attention
from staff.runtime.progress import progress
from staff.scoring.stage import placeholder
from staff.store.cost import Meter
from staff.store.manifest import Artifact
from staff.store.stage import Stage, identity

if TYPE_CHECKING:
    from staff.evaluation.behind import Behind

FILE = "in_context.npy"


@dataclass(frozen=True)
class AnswersInContext(Stage):
    """Of each of E evaluations, the attention on b demonstrations and the metric of the answers to q queries.

    Attributes:
        pool: the samples that demonstrations are from.
        asked: the samples that queries are from.
        demonstrations: positions in `pool`, (E, b), -1 for none.
        queries: positions in `asked`, (E, q), -1 for none.
        metric: of an answer against that of the sample.
        separator: tokens in place of a demonstration's end token; None: the end token stays.
        layer: the block whose attention is read, from 0; None: the one at two fifths of the depth.
    """

    kind: ClassVar[str] = "in_context"
    version: ClassVar[int] = 1

    state: ModelState
    pool: TokenizedSamples
    asked: TokenizedSamples
    demonstrations: np.ndarray = field(repr=False)
    queries: np.ndarray = field(repr=False)
    metric: Metric
    separator: Sequence[int] | None
    layer: int | None = None

    def __post_init__(self) -> None:
        if self.metric.needs != "answers":
            raise UserError(f"metric={self.metric.name!r} measures no answers: choose one such as rougeL or exact.")

    @property
    def label(self) -> str:
        return f"answer {int((self.queries >= 0).sum())} queries in context, {self.state.words}"

    @property
    def inputs(self) -> tuple[Stage, ...]:
        return self.state.inputs

    def key(self) -> dict[str, Any]:
        plan = [np.ascontiguousarray(a, dtype=np.int64).tobytes() for a in (self.demonstrations, self.queries)]
        return {
            "state": self.state.key(),
            "samples": [self.pool.fingerprint, self.asked.fingerprint],
            "demonstrations": sha256(plan[0]).hexdigest(),
            "queries": sha256(plan[1]).hexdigest(),
            "metric": identity(self.metric),
            "separator": None if self.separator is None else [int(token) for token in self.separator],
            "layer": self.block,
        }

    @property
    def block(self) -> int:
        """The index of the block whose attention is read: 13 of 32, as the paper has it for Llama-3-8B.

        Raises:
            UserError: the model has no such block.
        """
        blocks = self.state.spec.config().get_text_config().num_hidden_layers
        if self.layer is None:
            return min(blocks - 1, round(0.4 * blocks))
        if type(self.layer) is not int or not 0 <= self.layer < blocks:
            raise UserError(
                f"layer={self.layer!r} is not a block of {self.state.spec.name}: choose 0 to {blocks - 1}, or null."
            )
        return self.layer

    @property
    def max_new_tokens(self) -> int:
        """As many as the longest answer of the queried samples has."""
        return int(self.asked.answer_lengths[np.unique(self.queries[self.queries >= 0])].max(initial=1))

    def check(self) -> None:
        """Refuse, before a model loads, what it cannot read.

        Raises:
            UserError: an architecture whose attention is not read, sharded weights, or prompts beyond the window.
        """
        spec = self.state.spec
        if (kind := spec.config().get_text_config().model_type) not in ARCHITECTURES:
            raise UserError(
                f"the attention of {spec.name} (model type {kind!r}) cannot be read: choose a model of type "
                f"{', '.join(ARCHITECTURES)}, or another method."
            )
        if spec.is_partitioned:
            raise UserError("attention cannot be read from sharded weights: set finetune.fsdp=false.")
        window, longest = spec.window(), int(self.lengths().max(initial=0)) + self.max_new_tokens
        if window is None or longest <= window:
            return
        fit = self._fitting(window)
        mend = f"set method.demonstrations={fit}" if fit else "lower finetune.max_length with task.too_long=drop"
        shown = self.demonstrations.shape[1]
        raise UserError(
            f"{shown} demonstrations, a query and its answer take up to {longest} tokens, and {spec.name} has "
            f"{window} positions, for {fit or 'no'} demonstration{'s' * (fit != 1)} of any length: {mend}."
        )

    def _fitting(self, window: int) -> int:
        """How many demonstrations fit with the longest query and answer, however long they are."""
        shown = int(self._shown_lengths(np.arange(len(self.pool))).max(initial=1))
        asked = self.asked.prompt_lengths[np.unique(self.queries[self.queries >= 0])]
        return max(0, (window - self.max_new_tokens - int(asked.max(initial=0))) // shown)

    def _shown_lengths(self, demonstrations: np.ndarray) -> np.ndarray:
        """Tokens that samples of the pool take as demonstrations, without begin tokens; 0 for -1."""
        more = 0 if self.separator is None else len(self.separator) - 1
        return np.where(demonstrations >= 0, self.pool.lengths[demonstrations] - self.pool.begin + more, 0)

    def _prefix_lengths(self) -> np.ndarray:
        """Tokens that the prompts of each evaluation begin with, (E,)."""
        return self.asked.begin + self._shown_lengths(self.demonstrations).sum(axis=1)

    def lengths(self) -> np.ndarray:
        """Tokens of the prompt of each query, (E, q); 0 where there is none."""
        own = self.asked.prompt_lengths[self.queries] - self.asked.begin
        return np.where(self.queries >= 0, self._prefix_lengths()[:, None] + own, 0)

    def run(self, folder: Path, meter: Meter, *inputs: Artifact) -> None:
        model = self.state.load(*inputs)
        if self.state.adapted and not self.state.spec.quantization:
            model = model.merge_and_unload()
        places = np.argwhere(self.queries >= 0)
        shown = self.demonstrations.shape[1]
        values = np.full((len(self.queries), shown + self.queries.shape[1]), np.nan)
        attended = np.full((*self.queries.shape, shown), np.nan)
        tokenizer, texts = self.state.spec.tokenizer(), []
        answers = self._answers(model, tokenizer, meter)
        for e, i in places:
            answer = answers[e, i]
            texts.append(tokenizer.decode(answer.tokens, skip_special_tokens=True).strip())
            attended[e, i] = answer.attention
        references = [(self._reference(tokenizer, int(self.queries[e, i])),) for e, i in places]
        values[places[:, 0], shown + places[:, 1]] = self.metric.measure(texts, references)[1]
        with np.errstate(invalid="ignore"):
            answered = np.isfinite(attended).any(axis=2, keepdims=True)
            total = np.where(answered, np.nan_to_num(attended), 0).sum(axis=1) / answered.sum(axis=1)
        values[:, :shown] = np.where(self.demonstrations >= 0, total, np.nan)
        np.save(folder / FILE, values)

    def estimate(self, folder: Path, meter: Meter, *inputs: Artifact) -> None:
        """An upper bound: every answer is as long as the longest."""
        lengths = self.lengths()[self.queries >= 0]
        self._count(meter, lengths + self.max_new_tokens, len(lengths) * (self.max_new_tokens + 1))
        drawn = placeholder(int(self.demonstrations.max(initial=0)) + 1, self.label)
        shown = np.where(self.demonstrations >= 0, drawn[self.demonstrations], np.nan)
        np.save(folder / FILE, np.hstack([shown, np.where(self.queries >= 0, 1.0, np.nan)]))

    def _shown(self, j: int) -> np.ndarray:
        """The tokens of sample j of the pool as a demonstration."""
        row = self.pool.row(j)[self.pool.begin :]
        return row if self.separator is None else np.append(row[:-1], self.separator)

    def _prefix(self, evaluation: int) -> list[int]:
        """The tokens that the prompts of an evaluation begin with."""
        shown = [self._shown(j) for j in self.demonstrations[evaluation] if j >= 0]
        asked = int(self.queries[evaluation].max())
        return np.concatenate([self.asked.row(asked)[: self.asked.begin], *shown]).astype(np.int64).tolist()

    def _query(self, query: int) -> list[int]:
        """The rest of the prompt of a query."""
        return self.asked.row(query)[self.asked.begin : int(self.asked.prompt_lengths[query])].tolist()

    def _reference(self, tokenizer: Any, query: int) -> str:
        answer = self.asked.row(query)[self.asked.prompt_lengths[query] :]
        return tokenizer.decode(answer, skip_special_tokens=True).strip()

    def _answers(self, model: Any, tokenizer: Any, meter: Meter) -> dict[tuple[int, int], Behind]:
        """The answer to each query by evaluation and column, with the attention on each demonstration. Each process
        answers a part of the batches."""
        from staff.evaluation.behind import answers_behind

        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        stop = end_tokens_of(tokenizer, base.generation_config, self.asked.end_tokens)
        new, answers = self.max_new_tokens, {}
        batches = self._batches(default_batch_tokens(base))
        with (
            processes.raise_on_all_ranks(),
            without_cudnn_attention(),
            progress(int((self.queries >= 0).sum()), "answers in context") as bar,
        ):
            for batch in processes.shard(batches):
                columns = [np.flatnonzero(self.queries[e] >= 0) for e in batch]
                queries = [[self._query(int(self.queries[e, i])) for i in of] for e, of in zip(batch, columns)]
                prefixes = [self._prefix(e) for e in batch]
                found = answers_behind(base, self.block, prefixes, queries, new, stop, self.separator)
                places = [(int(e), int(i)) for e, of in zip(batch, columns) for i in of]
                for place, answer in zip(places, found, strict=True):
                    attention = self._of_demonstrations(place[0], answer.attention)
                    answers[place] = answer._replace(attention=attention)
                bar.update(len(places) * processes.world_size())
        for others in processes.all_gather(answers):
            answers |= others
        lengths, read = self.lengths(), {place: answer.read for place, answer in answers.items()}
        totals = np.array([lengths[place] + more for place, more in read.items()])
        self._count(meter, totals, len(read) + sum(read.values()))
        return answers

    def _batches(self, batch_tokens: int) -> list[list[int]]:
        """Evaluations of similar length, the longest first; (longest prompt + answer) x queries is up to
        `batch_tokens`, or there is one evaluation."""
        longest, counts = self.lengths().max(axis=1) + self.max_new_tokens, (self.queries >= 0).sum(axis=1)
        batches: list[list[int]] = []
        room = 0
        for e in sorted(np.flatnonzero(counts), key=lambda e: -longest[e]):
            if counts[e] > room:
                batches.append([])
                room = batch_tokens // longest[e]
            batches[-1].append(int(e))
            room -= counts[e]
        return batches

    def _of_demonstrations(self, evaluation: int, attention: np.ndarray) -> np.ndarray:
        """The attention on each demonstration per token, (b,), from that on each token of the prefix; NaN of an
        empty answer."""
        sizes = self._shown_lengths(self.demonstrations[evaluation])
        ends = self.asked.begin + np.cumsum(sizes)
        total = np.concatenate([[0.0], np.cumsum(attention)])
        with np.errstate(invalid="ignore"):
            return (total[ends] - total[ends - sizes]) / np.where(sizes > 0, sizes, np.nan)

    def _count(self, meter: Meter, lengths: np.ndarray, positions: int) -> None:
        """Add the cost of reading `lengths` tokens for the queries, with logits at `positions`; a prefix is read
        once for all queries of an evaluation."""
        config, counts = self.state.spec.config(), (self.queries >= 0).sum(axis=1)
        again = np.repeat(self._prefix_lengths(), np.maximum(counts - 1, 0))
        flops = forward_flops(config, lengths, positions) - forward_flops(config, again, 0)
        meter.add(flops, tokens_forward=int(lengths.sum() - again.sum()))


def read_in_context(answered: Artifact) -> np.ndarray:
    """What `AnswersInContext` stored: attention and metrics, (E, b + q), NaN where there is none."""
    return np.load(answered.path / FILE)
