"""The interface of metrics. A metric of your own is named by its dotted path."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import numpy as np

from staff.data.samples import Sample
from staff.errors import UserError

References = Sequence[tuple[str, ...]]
Values = tuple[float, list[float]]
"""The headline value, and a value for each sample."""

UNREAD = 0.1
"""A metric is refused if it cannot compare more than this fraction of the references' letters."""

# Scripts without spaces between words, as Unicode names their characters.
_UNSPACED = ("CJK ", "HIRAGANA", "KATAKANA", "HALFWIDTH KATA", "THAI ", "LAO ", "KHMER ", "MYANMAR ", "TIBETAN ")


class Choices(NamedTuple):
    """What a model chose from, by sample: the texts, and the log-likelihood of each, in nats."""

    texts: Sequence[Sequence[str]]
    log_likelihoods: Sequence[np.ndarray]


@dataclass(frozen=True)
class Metric:
    """Compares answers with references, on a scale from 0 to 100 unless stated otherwise.

    Attributes:
        name: as in `task.metrics`.
        version: raised when the numbers change.
        higher_is_better: the metric's direction.
        margin: the difference, in the metric's `unit`, up to which two methods count as equal by default.
        needs: "answers", generated ones; "likelihood", that of the references under the model; "choices", that of
            each of a sample's choices.
        alternatives: names of metrics that read more scripts, the nearest first.
        of_samples: what a sample's value is, where the headline is not the mean of these: differences between
            methods rest on them.
        has_parts: whether a sample's value is of the metric's own kind, as that of a sentence for BLEU.
    """

    version: ClassVar[int]
    higher_is_better: ClassVar[bool] = True
    margin: ClassVar[float] = 1.0
    unit: ClassVar[str] = "point"
    needs: ClassVar[str] = "answers"
    of_samples: ClassVar[str] = ""
    has_parts: ClassVar[bool] = True

    name: str

    @property
    def alternatives(self) -> Sequence[str]:
        return ("chrf",)

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

    def measure_choices(self, choices: Choices, references: References) -> Values:
        """The same from the log-likelihood of each of a sample's choices."""
        raise NotImplementedError

    def check(self, samples: Sequence[Sample]) -> None:
        """Refuse samples that the metric cannot measure.

        Raises:
            UserError: naming a sample's id.
        """
        unread = self.unread(samples)
        if unread > UNREAD:
            from staff.evaluation.metrics import named_metric

            worst = max(samples, key=lambda sample: self.unread([sample]))
            others = (name for name in self.alternatives if named_metric(name).unread(samples) <= UNREAD)
            raise UserError(
                f"task.metrics {self.name} cannot compare {unread:.0%} of the letters in the references, such as "
                f"those of sample {worst.id!r}: take {next(others)} instead."
            )

    def unread(self, samples: Sequence[Sample]) -> float:
        """The fraction of the letters in the references that the metric cannot compare."""
        counts = Counter(letter for sample in samples for text in sample.references for letter in letters_of(text))
        unread = sum(count for letter, count in counts.items() if not self.is_read(letter))
        return unread / max(counts.total(), 1)

    def is_read(self, letter: str) -> bool:
        """Whether the metric can compare a letter."""
        return True


def letters_of(text: str, categories: str = "LM") -> list[str]:
    """The characters of a text in these Unicode categories; by default letters and marks."""
    return [character for character in text if unicodedata.category(character)[0] in categories]


def is_unspaced(letter: str) -> bool:
    """Whether a letter belongs to a script without spaces between words."""
    return unicodedata.name(letter, "").startswith(_UNSPACED)
