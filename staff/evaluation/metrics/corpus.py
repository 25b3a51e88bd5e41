"""BLEU and chrF, as sacrebleu computes them (Post 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any, ClassVar

from staff.evaluation.metrics.metric import Metric, References, Values, is_unspaced


@dataclass(frozen=True)
class Corpus(Metric):
    """A metric of sacrebleu with its default settings. The headline is the corpus value, not a mean."""

    version: ClassVar[int] = 1
    of_samples: ClassVar[str] = "sentence values"

    def measure(self, predictions: Sequence[str], references: References) -> Values:
        corpus, sentence = self._scorers()
        streams = list(zip_longest(*references))  # all first references, all second references, ...
        scores = [
            sentence.sentence_score(prediction, targets).score
            for targets, prediction in zip(references, predictions, strict=True)
        ]
        return corpus.corpus_score(predictions, streams).score, scores

    def _scorers(self) -> tuple[Any, Any]:
        """The scorers of the corpus and of a sentence."""
        raise NotImplementedError


@dataclass(frozen=True)
class Bleu(Corpus):
    """BLEU. A sentence's value skips n-gram orders for which it is too short (`effective_order`).

    The tokenizer "13a" splits at spaces and ASCII punctuation. A sentence in a script without spaces would be a
    single token, so such references are refused.
    """

    def _scorers(self) -> tuple[Any, Any]:
        from sacrebleu.metrics.bleu import BLEU

        return BLEU(force=True), BLEU(effective_order=True)  # force: no warning about tokenised input

    def is_read(self, letter: str) -> bool:
        return not is_unspaced(letter)


@dataclass(frozen=True)
class Chrf(Corpus):
    """chrF, which compares characters, so it works for every script."""

    def _scorers(self) -> tuple[Any, Any]:
        from sacrebleu.metrics.chrf import CHRF

        return CHRF(), CHRF()
