"""The stages that answer test prompts and measure the answers.

The authors sampled answers and used another tokenizer for ROUGE. So absolute values are not comparable with theirs,
but differences between methods are (section 5.1).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pandas as pd

from staff.data.tokens import TokenizedSamples
from staff.evaluation.generator import Generator, reads_padding
from staff.evaluation.metrics import measure
from staff.evaluation.metrics.metric import Choices, Metric
from staff.models.flops import forward_flops
from staff.models.state import ModelState
from staff.scoring.stage import Score, read_scores
from staff.store.cost import Meter
from staff.store.manifest import Artifact
from staff.store.stage import Stage, identity, plain

PREDICTIONS = "predictions.parquet"
METRICS = "metrics.json"
CHOICES, LOG_LIKELIHOODS = "choices", "log_likelihoods"


@dataclass(frozen=True)
class Generate(Stage):
    """A model's answers to the prompts of samples."""

    kind: ClassVar[str] = "evaluation"
    version: ClassVar[int] = 2

    state: ModelState
    samples: TokenizedSamples
    generator: Generator
    max_new_tokens: int

    @property
    def label(self) -> str:
        return f"answer {len(self.samples)} test prompts, {self.state.words}"

    @property
    def inputs(self) -> tuple[Stage, ...]:
        return self.state.inputs

    def key(self) -> dict[str, Any]:
        return {
            "state": self.state.key(),
            "samples": self.samples.fingerprint,
            "generator": self.generator.key(),
            "max_new_tokens": self.max_new_tokens,
            # Answers of models that read padding were once made in padded batches.
            **({"prompts": "one at a time"} if reads_padding(self.state.spec.config()) else {}),
        }

    def run(self, folder: Path, meter: Meter, *inputs: Artifact) -> None:
        spec, model = self.state.spec, self.state.load(*inputs)
        # Adapters are not merged into quantised weights, which would be rounded to 4 bits again.
        if self.state.adapted and not spec.quantization and not spec.is_partitioned:
            model = model.merge_and_unload()
        tokenizer = spec.tokenizer()
        answers = self.generator.generate(
            model,
            tokenizer,
            self.samples.prompts(),
            max_new_tokens=self.max_new_tokens,
            end_tokens=self.samples.end_tokens,
            meter=meter,
        )
        texts = [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]
        table = {"id": self.samples.ids, "prediction": texts, "tokens": [len(answer) for answer in answers]}
        pd.DataFrame(table).to_parquet(folder / PREDICTIONS)

    def estimate(self, folder: Path, meter: Meter, *inputs: Artifact) -> None:
        """An upper bound: every answer has `max_new_tokens`."""
        processed = (self.samples.prompt_lengths + self.max_new_tokens - 1).tolist()
        flops = forward_flops(self.state.spec.config(), processed, self.max_new_tokens * len(processed))
        meter.add(flops, tokens_forward=sum(processed))


def read_predictions(answered: Artifact) -> pd.DataFrame:
    """The answers that `Generate` stored: a row for each sample, with id, prediction and number of tokens."""
    return pd.read_parquet(answered.path / PREDICTIONS)


@dataclass(frozen=True)
class Measure(Stage):
    """Metrics of stored answers and stored scores. Nothing is generated again for a new metric, and no other
    fingerprint changes.

    Attributes:
        references: by the sample's id.
        likelihood: the signal "nll" of every reference, in the order of the answers and of each one's references;
            None where no metric needs it.
        choosing: the signal "nll" of every choice, likewise.
        choices: by the sample's id; empty without `choosing`.
    """

    kind: ClassVar[str] = "metrics"
    version: ClassVar[int] = 1
    one_process: ClassVar[bool] = True

    answers: Generate
    metrics: Sequence[Metric]
    references: dict[str, tuple[str, ...]] = field(repr=False)
    likelihood: Score | None = None
    choosing: Score | None = None
    choices: dict[str, tuple[str, ...]] = field(default_factory=dict, repr=False)

    @property
    def label(self) -> str:
        return f"measure {', '.join(metric.name for metric in self.metrics)}"

    @property
    def inputs(self) -> tuple[Stage, ...]:
        return (self.answers, *self.scored)

    @property
    def scored(self) -> tuple[Score, ...]:
        """The scores that the metrics read."""
        return tuple(stage for stage in (self.likelihood, self.choosing) if stage is not None)

    def key(self) -> dict[str, Any]:
        key = {"metrics": [identity(metric) for metric in self.metrics], "references": plain(self.references)}
        return {**key, "choices": plain(self.choices)} if self.choices else key

    def run(self, folder: Path, meter: Meter, *inputs: Artifact) -> None:
        answers = read_predictions(inputs[0])
        answers["references"] = [self.references[id] for id in answers["id"]]
        nll, scored = None, list(inputs[1:])
        if self.likelihood is not None:
            nll = self._means(read_scores(scored.pop(0))["nll"], answers["id"].tolist())
        if self.choosing is not None:
            choices = [self.choices[id] for id in answers["id"]]
            answers[CHOICES] = choices
            answers[LOG_LIKELIHOODS] = self._sums(read_scores(scored.pop(0))["nll"], choices)
        texts = answers["prediction"].tolist(), answers["references"].tolist()
        headline, per_sample = measure(self.metrics, *texts, nll, choices_of(answers))
        answers.join(per_sample).to_parquet(folder / PREDICTIONS)
        (folder / METRICS).write_text(json.dumps(headline))

    def _means(self, scores: np.ndarray, ids: list[str]) -> np.ndarray:
        """Means over the references of each answer, shape (N, 2); NaN where none of them fits the window."""
        assert self.likelihood is not None
        place = {id: row for row, id in enumerate(ids)}
        owners = np.array([place[id.rpartition("#")[0]] for id in self.likelihood.samples.ids], dtype=np.int64)
        sums, counts = np.zeros((len(ids), 2)), np.bincount(owners, minlength=len(ids))
        np.add.at(sums, owners, scores)
        with np.errstate(invalid="ignore"):
            return sums / counts[:, None]

    def _sums(self, scores: np.ndarray, choices: Sequence[Sequence[str]]) -> list[np.ndarray]:
        """Log-likelihoods of the content of each answer's choices, in nats, (choices,) each."""
        assert self.choosing is not None
        sums = -scores[:, 0].astype(np.float64) * (self.choosing.samples.answer_lengths - 1)
        return np.split(sums, np.cumsum([len(texts) for texts in choices])[:-1])

    def estimate(self, folder: Path, meter: Meter, *inputs: Artifact) -> None:
        """Does nothing: a dry run has no answers."""


def choices_of(answers: pd.DataFrame) -> Choices | None:
    """The choices in a table of predictions; None where it has none."""
    if CHOICES not in answers:
        return None
    return Choices([tuple(texts) for texts in answers[CHOICES]], [*answers[LOG_LIKELIHOODS]])


def read_measured(measured: Artifact) -> tuple[dict[str, float], pd.DataFrame]:
    """What `Measure` stored: the headline value of every metric, and a table of the predictions.

    The table has a row for each sample: id, prediction, number of tokens, references and the value of every metric.
    """
    return json.loads((measured.path / METRICS).read_text()), pd.read_parquet(measured.path / PREDICTIONS)
