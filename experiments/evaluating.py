"""The stages that evaluate the target of a run: they answer the test prompts, and measure."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from experiments.reader import Reader
from staff.data.splits import Splits
from staff.data.task import Sample, Task
from staff.data.tokens import TokenizedSamples
from staff.evaluation.floors import ChooseConstant, Floors, with_floors
from staff.evaluation.generator import Generator
from staff.evaluation.metrics import named_metric
from staff.evaluation.metrics.metric import Metric
from staff.evaluation.stage import Generate, Measure
from staff.models.adapters import LoraSpec
from staff.models.state import ModelState
from staff.scoring.stage import Score, ScoringSettings
from staff.signals.nll import AnswerNll


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
        constants = tuple(ChooseConstant(metric, answers) for metric in with_floors(self.metrics))
        texts = {sample.id: sample.references for sample in self.splits.test}
        return Floors(answering, constants, texts) if constants else None

    def _likelihood(self, state: ModelState, samples: TokenizedSamples) -> Score:
        """The negative log-likelihood of every answer under the model."""
        return Score(state, samples, (AnswerNll(),), self.scoring, self.lora, 0)
