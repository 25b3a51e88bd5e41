"""Accuracy and macro-averaged F1 of class names, as answers or by the likelihood of each choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from staff.data.samples import Sample
from staff.errors import UserError
from staff.evaluation.metrics.exact import normalised
from staff.evaluation.metrics.metric import Choices, Metric, References, Values


@dataclass(frozen=True)
class MacroF1(Metric):
    """The mean over classes of F1, 0 to 100. A class is a `normalised` first reference.

    An answer that is no class counts as a miss of its sample's class. The value of a sample is 100 where the answer
    is its class, else 0; the headline is not their mean.
    """

    version: ClassVar[int] = 1
    of_samples: ClassVar[str] = "right answers, which is accuracy"
    has_parts: ClassVar[bool] = False

    def measure(self, predictions: Sequence[str], references: References) -> Values:
        true = [normalised(targets[0]) for targets in references]
        said = [normalised(prediction) for prediction in predictions]
        scores = [100.0 * (a == b) for a, b in zip(true, said, strict=True)]
        f1 = []
        for name in sorted(set(true)):
            hits = sum(a == b == name for a, b in zip(true, said))
            f1.append(200.0 * hits / (true.count(name) + said.count(name)))
        return sum(f1) / len(f1), scores


@dataclass(frozen=True)
class ChoiceAccuracy(Metric):
    """100 where the likeliest of a sample's choices is a reference, else 0; the headline is the mean.

    `choice_accuracy` is `acc` of lm-evaluation-harness (Gao et al. 2024): the likeliest choice has the highest sum
    of log-likelihoods of its tokens, without the end token. `choice_accuracy_norm` is its `acc_norm`: the sum is
    divided by the choice's characters. The first of equals is chosen.
    """

    version: ClassVar[int] = 1
    needs: ClassVar[str] = "choices"

    def measure_choices(self, choices: Choices, references: References) -> Values:
        texts = self._chosen(choices)
        right = [set(map(normalised, targets)) for targets in references]
        scores = [100.0 * (normalised(text) in names) for text, names in zip(texts, right, strict=True)]
        return sum(scores) / len(scores), scores

    def _chosen(self, choices: Choices) -> list[str]:
        found = []
        for texts, sums in zip(*choices, strict=True):
            lengths = [len(text) if self.name.endswith("_norm") else 1 for text in texts]
            found.append(texts[int(np.argmax(np.asarray(sums) / lengths))])
        return found

    def check(self, samples: Sequence[Sample]) -> None:
        for sample in samples:
            if not sample.choices:
                raise UserError(
                    f"task.metrics {self.name} chooses among the answers that task.choices lists or "
                    "task.choices_field names: set one of them."
                )
            names = set(map(normalised, sample.choices))
            if strange := [text for text in sample.references if normalised(text) not in names]:
                raise UserError(
                    f"the answer {strange[0]!r} of sample {sample.id!r} is not among its choices "
                    f"({', '.join(sample.choices)}): add it to them, or correct the sample."
                )


@dataclass(frozen=True)
class ChoiceMacroF1(ChoiceAccuracy):
    """`MacroF1` of the choices that `ChoiceAccuracy` finds likeliest."""

    version: ClassVar[int] = 1
    of_samples: ClassVar[str] = MacroF1.of_samples
    has_parts: ClassVar[bool] = False

    def measure_choices(self, choices: Choices, references: References) -> Values:
        return MacroF1(self.name).measure(self._chosen(choices), references)
