"""Exact match of short answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from staff.evaluation.metrics.metric import Metric, References, Values


def normalised(text: str) -> str:
    """`text` as `exact` compares it: case-folded, white space collapsed, without spaces at the ends and without one
    final full stop."""
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


@dataclass(frozen=True)
class Exact(Metric):
    """100 where the whole `normalised` text is that of a reference, else 0; headline: the mean."""

    version: ClassVar[int] = 1

    def measure(self, predictions: Sequence[str], references: References) -> Values:
        scores = []
        for targets, prediction in zip(references, predictions, strict=True):
            text = normalised(prediction)
            scores.append(100.0 if text and text in map(normalised, targets) else 0.0)
        return sum(scores) / len(scores), scores
