"""The interface of metrics. A metric of your own is named by its dotted path."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from staff.data.task import Sample
from staff.errors import UserError

References = Sequence[tuple[str, ...]]
Values = tuple[float, list[float]]
"""The headline value, and a value for each sample."""

UNREAD = 0.1
"""A metric is refused if it cannot compare more than this fraction of a reference's letters."""


@dataclass(frozen=True)
class Metric:
    """Compares answers with references, on a scale from 0 to 100 unless stated otherwise.

    Attributes:
        name: as in `task.metrics`.
        version: raised when the numbers change.
        higher_is_better: the metric's direction.
        margin: the difference, in the metric's `unit`, up to which two methods count as equal by default.
        needs: "answers", generated ones; "likelihood", that of the references under the model.
    """

    version: ClassVar[int]
    higher_is_better: ClassVar[bool] = True
    margin: ClassVar[float] = 1.0
    unit: ClassVar[str] = "point"
    needs: ClassVar[str] = "answers"

    name: str

    @property
    def sign(self) -> int:
        """1 where higher values are better, -1 where lower ones are."""
        return 1 if self.higher_is_better else -1

    @property
    def words(self) -> str:
        return "higher is better" if self.higher_is_better else "lower is better"

    def measure(self, predictions: Sequence[str], references: References) -> Values:
        """The headline value, and a value for each sample; each has one or more references."""
        raise NotImplementedError

    def measure_likelihood(self, nll: np.ndarray) -> Values:
        """The same from the negative log-likelihood of each sample's references.

        Args:
            nll: shape (N, 2): nats per token of the content, and nats of the end token, means over references.
        """
        raise NotImplementedError

    def check(self, samples: Sequence[Sample]) -> None:
        """Refuse samples that the metric cannot measure.

        Raises:
            UserError: naming the sample's id.
        """
        for sample in samples:
            unread = max((self.unread_letters(text) for text in sample.references), default=0.0)
            if unread > UNREAD:
                raise UserError(
                    f"task.metrics {self.name} cannot compare {unread:.0%} of the letters in a reference of sample "
                    f"{sample.id!r}: take chrf instead, which reads every script, or take the sample out."
                )

    def unread_letters(self, text: str) -> float:
        """The fraction of a text's letters that the metric cannot compare."""
        return 0.0


def letters_of(text: str) -> list[str]:
    """The letters and marks of a text (Unicode categories L and M)."""
    return [character for character in text if unicodedata.category(character)[0] in "LM"]
