"""Macro-averaged F1 of answers that are class names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from staff.evaluation.metrics.exact import normalised
from staff.evaluation.metrics.metric import Metric, References, Values


@dataclass(frozen=True)
class MacroF1(Metric):
    """The mean over classes of F1, 0 to 100. A class is a `normalised` first reference.

    An answer that is no class counts as a miss of its sample's class. The value of a sample is 100 where the answer
    is its class, else 0; the headline is not their mean.
    """

    version: ClassVar[int] = 1

    def measure(self, predictions: Sequence[str], references: References) -> Values:
        true = [normalised(targets[0]) for targets in references]
        said = [normalised(prediction) for prediction in predictions]
        scores = [100.0 * (a == b) for a, b in zip(true, said, strict=True)]
        f1 = []
        for name in sorted(set(true)):
            hits = sum(a == b == name for a, b in zip(true, said))
            f1.append(200.0 * hits / (true.count(name) + said.count(name)))
        return sum(f1) / len(f1), scores
