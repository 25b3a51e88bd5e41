"""Exact match of the final number (GSM8K, Cobbe et al. 2021)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import ClassVar

from staff.data.samples import Sample
from staff.errors import UserError
from staff.evaluation.metrics.metric import Metric, References, Values

# A minus after a digit, a letter or a bracket is a subtraction: the last number of "10-4" is 4.
_NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\$-?)?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def final_number(text: str) -> Decimal | None:
    """The final number of a GSM8K answer: the first after `####`, otherwise the last; None if there is none.

    Thousands separators, dollar signs and a full stop at the end are ignored.
    """
    text = text.replace("−", "-")
    marked = _NUMBER.search(text.partition("####")[2])
    numbers = [marked] if marked else list(_NUMBER.finditer(text))
    if not numbers:
        return None
    return Decimal(numbers[-1].group().replace(",", "").replace("$", ""))


@dataclass(frozen=True)
class ExactNumber(Metric):
    """100 if the final number equals that of a reference (18 equals 18.00), otherwise 0; headline: the mean."""

    version: ClassVar[int] = 1

    def measure(self, predictions: Sequence[str], references: References) -> Values:
        scores = []
        for targets, prediction in zip(references, predictions, strict=True):
            number = final_number(prediction)
            scores.append(100.0 if number is not None and number in map(final_number, targets) else 0.0)
        return sum(scores) / len(scores), scores

    def check(self, samples: Sequence[Sample]) -> None:
        for sample in samples:
            if all(final_number(text) is None for text in sample.references):
                raise UserError(
                    f"sample {sample.id!r} has no number in its reference for task.metrics {self.name} to compare: "
                    f"remove {self.name}, or fix the sample."
                )
