"""ROUGE (Lin 2004), as the package rouge-score computes it, with a tokenizer for every script."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from types import SimpleNamespace
from typing import Any, ClassVar

from staff.evaluation.metrics.metric import Metric, References, Values, is_unspaced, letters_of

TOKENIZERS = {"intl": "TokenizerV14International", "zh": "TokenizerZh", "char": "TokenizerChar"}
"""Tokenizers of sacrebleu, by the ending of the metric's name."""


@dataclass(frozen=True)
class Rouge(Metric):
    """F1 of rouge-score, the best over a sample's references. The headline is the mean.

    `rougeL` tokenises as the package does: letters a-z and digits, with Porter stemming, for English. A name that
    ends in a tokenizer of sacrebleu reads other scripts, lower-cased, without stemming and punctuation:

    - `rougeL_intl` (mteval-v14): words, for every script with spaces between words;
    - `rougeL_zh`: Chinese characters one by one, everything else as words;
    - `rougeL_char`: all characters one by one, for every script.
    """

    version: ClassVar[int] = 1

    def measure(self, predictions: Sequence[str], references: References) -> Values:
        from rouge_score.rouge_scorer import RougeScorer

        kind = self.name.partition("_")[0]
        scorer = RougeScorer([kind], tokenizer=tokenizer(self.name))
        scores = [
            100 * scorer.score_multi(targets, prediction)[kind].fmeasure
            for targets, prediction in zip(references, predictions, strict=True)
        ]
        return sum(scores) / len(scores), scores

    @property
    def alternatives(self) -> Sequence[str]:
        kind = self.name.partition("_")[0]
        return (*(f"{kind}_{name}" for name in TOKENIZERS), "chrf")

    def is_read(self, letter: str) -> bool:
        match self.name.partition("_")[2]:
            case "intl":
                return not is_unspaced(letter)
            case "zh":
                return not is_unspaced(letter) or unicodedata.name(letter, "").startswith("CJK ")
            case "char":
                return True
        return "a" <= letter.lower() <= "z"


class CachedTokenizer:
    """Words of a text for ROUGE, as rouge-score takes a tokenizer; each text and each word is processed once."""

    def __init__(self, name: str) -> None:
        self.tokenize = lru_cache(maxsize=2**16)(_of_sacrebleu(name) if name else _of_rouge_score())


def tokenizer(metric: str) -> CachedTokenizer:
    """That of a ROUGE metric, one for this process."""
    return _tokenizer(metric.partition("_")[2])


_tokenizer = cache(CachedTokenizer)


def _of_rouge_score() -> Any:
    from nltk.stem.porter import PorterStemmer
    from rouge_score.tokenize import tokenize

    stemmer = SimpleNamespace(stem=cache(PorterStemmer().stem))
    return lambda text: tokenize(text, stemmer)


def _of_sacrebleu(name: str) -> Any:
    split = getattr(import_module(f"sacrebleu.tokenizers.tokenizer_{name}"), TOKENIZERS[name])()
    return lambda text: [word for word in split(text.lower()).split() if letters_of(word, "LMN")]
