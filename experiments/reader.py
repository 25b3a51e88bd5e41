"""The samples of a run as its models read them, tokenised and without those that do not fit; and the stages that
evaluate the target.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from staff.data.samples import Sample
from staff.data.splits import Splits, answerable, check_vocabulary, fitting
from staff.data.task import Task
from staff.data.tokens import TokenizedSamples, Tokens, read_tokens
from staff.errors import UserError
from staff.evaluation.floors import ChooseConstant, Floors, typical_count, with_floors
from staff.evaluation.generator import Generator
from staff.evaluation.metrics import named_metric
from staff.evaluation.metrics.metric import Metric
from staff.evaluation.stage import Generate, Measure
from staff.models.adapters import LoraSpec
from staff.models.family import Family
from staff.models.state import ModelState
from staff.pool import Slice
from staff.scoring.stage import Score, ScoringSettings
from staff.signals.nll import AnswerNll
from staff.store.manifest import Artifact
from staff.store.store import Store

log = logging.getLogger("staff")

_tokens = lru_cache(maxsize=8)(read_tokens)
"""The runs of a sweep share their tokens, whose fingerprint takes a while in a large pool."""


@dataclass(frozen=True)
class Reader:
    """Reads samples for the models of a run.

    Attributes:
        family: the models that are fine-tuned on the coreset.
        selecting: the models that select, where they are of another family.
        max_length: the cut-off of fine-tuning in tokens.
    """

    task: Task
    family: Family
    selecting: Family | None
    max_length: int
    store: Store

    def trained(self, samples: Sequence[Sample]) -> dict[str, TokenizedSamples]:
        """The samples as the "target", the "small" model and the "selecting" target read them: those that fit all.

        Raises:
            UserError: a sample that does not fit and is not to be dropped.
        """
        families = {"target": self.family, "small": self.selecting or self.family}
        if self.selecting is not None:
            families["selecting"] = self.selecting
        specs = {name: f.small if name == "small" else f.target for name, f in families.items()}
        how = self.task.reading(samples)
        tokens = [
            self.store.get(Tokens(samples, specs[name], {**f.reading, **how})) for name, f in families.items()
        ]
        for name, artifact in zip(families, tokens, strict=True):
            check_vocabulary(_tokens(artifact), specs[name])
        names = {"target": "target", "small": "small model", "selecting": "target that selects"}
        windows = tuple((names[name], spec.window()) for name, spec in specs.items())
        read = dict(
            zip(families, _fitting(tuple(tokens), self.max_length, self.task.too_long, windows), strict=True)
        )
        return {"selecting": read["target"], **read}

    def slice(self, samples: Sequence[Sample], read: Mapping[str, TokenizedSamples]) -> Slice:
        """What methods see of the samples, `read` as by `trained`; with groups where the task knows them."""
        groups = None
        if self.task.group_field:
            group_of = {sample.id: sample.group for sample in samples}
            groups = np.array([group_of[id] for id in read["selecting"].ids])
        return Slice(read["small"], read["selecting"], groups)

    def asked(self, test: Sequence[Sample]) -> TokenizedSamples:
        """The test samples as the target reads them, those whose answer fits its context window."""
        read = self._by_target(test)
        keep = answerable(read, self.task.max_new_tokens, self.family.target.window(), self.task.too_long)
        return read if len(keep) == len(read) else read.take(keep)

    def references(self, test: Sequence[Sample]) -> TokenizedSamples:
        """The references that fit the target's window, each behind its prompt, as the target reads them."""
        read = self._by_target(self.task.reference_samples(test))
        fits = np.flatnonzero(read.lengths <= (self.family.target.window() or sys.maxsize))
        if len(fits) < len(read):
            log.warning("nll leaves out %d references beyond the target's window", len(read) - len(fits))
        return read.take(fits)

    def choices(self, test: Sequence[Sample]) -> TokenizedSamples:
        """Every choice behind its prompt, as the target reads them.

        Raises:
            UserError: one that does not fit the target's window.
        """
        read, window = self._by_target(self.task.choice_samples(test)), self.family.target.window() or sys.maxsize
        if (longest := int(read.lengths.max())) > window:
            id = read.ids[int(read.lengths.argmax())].rpartition("#")[0]
            raise UserError(
                f"sample {id!r} has {longest} tokens with one of its choices, more than the target's window of "
                f"{window}: shorten or remove it."
            )
        return read

    def _by_target(self, samples: Sequence[Sample]) -> TokenizedSamples:
        read = _tokens(self.store.get(Tokens(samples, self.family.target, self.family.reading)))
        check_vocabulary(read, self.family.target)
        return read


@lru_cache(maxsize=4)
def _fitting(
    tokens: tuple[Artifact, ...], max_length: int, too_long: str, windows: tuple[tuple[str, int | None], ...]
) -> list[TokenizedSamples]:
    """The samples of each artefact that fit in all of them."""
    read = [_tokens(artifact) for artifact in tokens]
    keep = fitting(read, max_length, too_long, dict(windows))
    return read if len(keep) == len(read[0]) else [samples.take(keep) for samples in read]


@dataclass(frozen=True)
class Evaluation:
    """How answers are generated and measured.

    Attributes:
        reader: reads samples as the target does.
        scoring, lora: how likelihoods are computed.
    """

    task: Task
    splits: Splits
    reader: Reader
    generator: Generator
    scoring: ScoringSettings
    lora: LoraSpec

    @cached_property
    def metrics(self) -> list[Metric]:
        return [named_metric(name) for name in self.task.metrics]

    @cached_property
    def asked(self) -> TokenizedSamples:
        """The test samples whose answers fit."""
        return self.reader.asked(self.splits.test)

    @cached_property
    def choices(self) -> TokenizedSamples:
        """Every choice behind its prompt."""
        return self.reader.choices(self._samples)

    @cached_property
    def references(self) -> TokenizedSamples:
        """Every reference answer behind its prompt."""
        return self.reader.references(self._samples)

    @cached_property
    def _samples(self) -> list[Sample]:
        ids = set(self.asked.ids)
        return [sample for sample in self.splits.test if sample.id in ids]

    @cached_property
    def needs(self) -> set[str]:
        """What the metrics are measured from."""
        return {metric.needs for metric in self.metrics}

    def answering(self, state: ModelState) -> Generate:
        return Generate(state, self.asked, self.generator, self.task.max_new_tokens)

    def measuring(self, answering: Generate) -> Measure:
        texts = {sample.id: sample.references for sample in self.splits.test}
        likelihood = self._likelihood(answering.state, self.references) if "likelihood" in self.needs else None
        if "choices" not in self.needs:
            return Measure(answering, self.metrics, texts, likelihood)
        choosing = self._likelihood(answering.state, self.choices)
        choices = {sample.id: sample.choices for sample in self.splits.test}
        return Measure(answering, self.metrics, texts, likelihood, choosing, choices)

    def floors(self, answering: Generate) -> Floors | None:
        """The floors under the metrics of answers; None where there are none."""
        answers = [sample.answer for sample in self.splits.pool]
        texts = {sample.id: sample.references for sample in self.splits.test}
        count = typical_count(texts.values())
        constants = tuple(ChooseConstant(metric, answers, count) for metric in with_floors(self.metrics))
        return Floors(answering, constants, texts) if constants else None

    def _likelihood(self, state: ModelState, samples: TokenizedSamples) -> Score:
        """The negative log-likelihood of every answer under the model."""
        return Score(state, samples, (AnswerNll(),), self.scoring, self.lora, 0)
