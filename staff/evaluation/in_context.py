"""Answers in context: those of a model to queries after demonstrations, and its attention on each demonstration.

A prompt is the demonstrations with their answers, a blank line after each (in a chat: the ends of their turns), and
the prompt of one query. The answer is generated greedily, and ends where the model starts another sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from staff.data.tokens import TokenizedSamples
from staff.errors import UserError
from staff.evaluation.generator import Greedy
from staff.evaluation.metrics.metric import Metric
from staff.models.flops import forward_flops
from staff.models.spec import ARCHITECTURES
from staff.models.state import ModelState
from staff.runtime import processes
from staff.runtime.progress import progress
from staff.scoring.stage import placeholder
from staff.store.cost import Meter
from staff.store.manifest import Artifact
from staff.store.stage import Stage, identity

FILE = "in_context.npy"
AT_ONCE = 512
"""Prompts that are held in memory together."""


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
        shown = int(self._shown_lengths().max(initial=1))
        asked = self.asked.prompt_lengths[np.unique(self.queries[self.queries >= 0])]
        return max(0, (window - self.max_new_tokens - int(asked.max(initial=0))) // shown)

    def _shown_lengths(self) -> np.ndarray:
        """Tokens that each sample of the pool takes as a demonstration, without begin tokens, (N,)."""
        more = 0 if self.separator is None else len(self.separator) - 1
        return self.pool.lengths - self.pool.begin + more

    def lengths(self) -> np.ndarray:
        """Tokens of the prompt of each query, (E, q); 0 where there is none."""
        shown = np.where(self.demonstrations >= 0, self._shown_lengths()[self.demonstrations], 0).sum(axis=1)
        own = self.asked.prompt_lengths[self.queries]
        return np.where(self.queries >= 0, shown[:, None] + own, 0)

    def run(self, folder: Path, meter: Meter, *inputs: Artifact) -> None:
        spec, model = self.state.spec, self.state.load(*inputs)
        if self.state.adapted and not spec.quantization:
            model = model.merge_and_unload()
        tokenizer = spec.tokenizer()
        values = np.full((len(self.queries), self.demonstrations.shape[1] + self.queries.shape[1]), np.nan)
        attended = np.full((*self.queries.shape, self.demonstrations.shape[1]), np.nan)
        places = np.argwhere(self.queries >= 0)
        with progress(len(places), "answers in context") as bar:
            for start in range(0, len(places), AT_ONCE):
                some = places[start : start + AT_ONCE]
                prompts = [self._prompt(e, i) for e, i in some]
                answers = self._answers(model, tokenizer, prompts, meter)
                at = [self.queries[e, i] for e, i in some]
                texts = [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]
                references = [(self._reference(tokenizer, int(query)),) for query in at]
                evaluations, which = some.T
                values[evaluations, self.demonstrations.shape[1] + which] = self.metric.measure(texts, references)[
                    1
                ]
                attended[evaluations, which] = self._attention(model, some, prompts, answers, meter)
                bar.update(len(some))
        with np.errstate(invalid="ignore"):
            answered = np.isfinite(attended).any(axis=2, keepdims=True)
            total = np.where(answered, np.nan_to_num(attended), 0).sum(axis=1) / answered.sum(axis=1)
        values[:, : self.demonstrations.shape[1]] = np.where(self.demonstrations >= 0, total, np.nan)
        np.save(folder / FILE, values)

    def estimate(self, folder: Path, meter: Meter, *inputs: Artifact) -> None:
        """An upper bound: every answer is as long as the longest."""
        config, new = self.state.spec.config(), self.max_new_tokens
        lengths = self.lengths()[self.queries >= 0]
        flops = forward_flops(config, lengths + new - 1, new * len(lengths))
        flops += forward_flops(config, lengths + new, 0)
        meter.add(flops, tokens_forward=int((2 * (lengths + new) - 1).sum()))
        drawn = placeholder(int(self.demonstrations.max(initial=0)) + 1, self.label)
        shown = np.where(self.demonstrations >= 0, drawn[self.demonstrations], np.nan)
        np.save(folder / FILE, np.hstack([shown, np.where(self.queries >= 0, 1.0, np.nan)]))

    def _shown(self, j: int) -> np.ndarray:
        """The tokens of sample j of the pool as a demonstration."""
        row = self.pool.row(j)[self.pool.begin :]
        return row if self.separator is None else np.append(row[:-1], self.separator)

    def _prompt(self, evaluation: int, i: int) -> list[int]:
        query = int(self.queries[evaluation, i])
        row = self.asked.row(query)[: int(self.asked.prompt_lengths[query])]
        shown = [self._shown(j) for j in self.demonstrations[evaluation] if j >= 0]
        begin = self.asked.begin
        return np.concatenate([row[:begin], *shown, row[begin:]]).astype(np.int64).tolist()

    def _reference(self, tokenizer: Any, query: int) -> str:
        answer = self.asked.row(query)[self.asked.prompt_lengths[query] :]
        return tokenizer.decode(answer, skip_special_tokens=True).strip()

    def _answers(self, model: Any, tokenizer: Any, prompts: list[list[int]], meter: Meter) -> list[list[int]]:
        """Generated answers, each up to the separator."""
        ends = self.asked.end_tokens
        how: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "end_tokens": ends, "meter": meter}
        answers = Greedy().generate(model, tokenizer, prompts, **how)
        return [before(answer, self.separator) for answer in answers]

    def _attention(
        self, model: Any, places: np.ndarray, prompts: list[list[int]], answers: list[list[int]], meter: Meter
    ) -> np.ndarray:
        """The attention of each answer on each demonstration per token of both, mean over heads, (n, b); NaN of an
        empty answer."""
        mass = np.full((len(prompts), self.demonstrations.shape[1]), np.nan)
        rows = processes.shard([k for k in range(len(prompts)) if answers[k]])
        lengths = []
        for k in rows:
            shown = self.demonstrations[places[k][0]]
            sizes = np.where(shown >= 0, self._shown_lengths()[shown], 0)
            ends = self.asked.begin + np.cumsum(sizes)
            lengths.append(len(prompts[k]) + len(answers[k]))
            answer = range(len(prompts[k]), lengths[-1])
            total = received(model, self.block, prompts[k] + answers[k], answer)
            total = np.concatenate([[0.0], np.cumsum(total)])
            with np.errstate(invalid="ignore"):
                mass[k] = (total[ends] - total[ends - sizes]) / np.where(sizes > 0, sizes, np.nan)
        for others in processes.all_gather(mass):
            mass = np.where(np.isnan(mass), others, mass)
        done = np.array([forward_flops(model.config, lengths, 0), sum(lengths)])
        flops, tokens = processes.all_reduce_sum(done)
        meter.add(float(flops), tokens_forward=int(tokens))
        return mass


def before(answer: Sequence[int], separator: Sequence[int] | None) -> list[int]:
    """The tokens of an answer before the first separator in it."""
    mark = list(separator or [])
    for start in range(len(answer) - len(mark) + 1 if mark else 0):
        if list(answer[start : start + len(mark)]) == mark:
            return list(answer[:start])
    return list(answer)


def received(model: Any, block: int, tokens: Sequence[int], rows: range) -> np.ndarray:
    """The attention that each token receives from those in `rows`, mean over these and over heads, (len(tokens),).

    Only eager attention returns its weights. Those of other blocks are dropped at once.
    """
    import torch

    attention = model.get_decoder().layers[block].self_attn
    found: list[Any] = []
    hook = attention.register_forward_hook(lambda module, args, output: found.append(output[1]))
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            model.get_decoder()(input_ids=torch.tensor([tokens], device=model.device), use_cache=False)
    finally:
        hook.remove()
        model.set_attn_implementation(implementation)
    weights = found[0][0, :, rows.start : rows.stop].float()  # (heads, rows, tokens)
    return weights.mean(dim=(0, 1)).double().cpu().numpy()


def read_in_context(answered: Artifact) -> np.ndarray:
    """What `AnswersInContext` stored: attention and metrics, (E, b + q), NaN where there is none."""
    return np.load(answered.path / FILE)
