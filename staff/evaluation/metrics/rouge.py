"""ROUGE (Lin 2004), as the package rouge-score computes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from staff.evaluation.metrics.metric import Metric, References, Values, letters_of


@dataclass(frozen=True)
class Rouge(Metric):
    """F1 of rouge-score with Porter stemming, the best over a sample's references. The headline is the mean.

    The package keeps only the letters a-z and digits, so references in other scripts are refused.
    """

    version: ClassVar[int] = 1

    def measure(self, predictions: Sequence[str], references: References) -> Values:
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer([self.name], use_stemmer=True)
        scores = [
            100 * scorer.score_multi(targets, prediction)[self.name].fmeasure
            for targets, prediction in zip(references, predictions, strict=True)
        ]
        return sum(scores) / len(scores), scores

    def unread_letters(self, text: str) -> float:
        letters = "".join(letters_of(text))
        return sum(not "a" <= character <= "z" for character in letters.lower()) / max(len(letters), 1)
