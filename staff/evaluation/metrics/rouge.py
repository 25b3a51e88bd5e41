"""ROUGE (Lin 2004), as the package rouge-score computes it, with a tokenizer for every script.

`rouge_l_matrix` scores many answers against many references at once. Its numbers are those of rouge-score, to the
last digit. Only the longest common subsequence is found in another way: by bits, with all references side by side
in one integer (Crochemore et al., A fast and practical bit-vector algorithm for the longest common subsequence
problem, 2001).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import import_module
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from staff.data.samples import Sample
from staff.errors import UserError
from staff.evaluation.metrics.metric import UNREAD, Metric, References, Values, is_unspaced, letters_of

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

    def check(self, samples: Sequence[Sample]) -> None:
        """Refuse references of a script that the tokenizer drops, and references without words, such as emoji."""
        super().check(samples)
        wordless = [sample for sample in samples if not any(map(self._has_words, sample.references))]
        if len(wordless) > UNREAD * len(samples):
            raise UserError(
                f"task.metrics {self.name} finds no word in the references of {len(wordless)} of {len(samples)} "
                f"test samples, such as {wordless[0].id!r}: take chrf or exact instead."
            )

    def _has_words(self, text: str) -> bool:
        return bool(letters_of(text, "LMN") if "_" in self.name else re.search("[a-z0-9]", text.lower()))

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


def rouge_l_matrix(
    answers: Sequence[str], references: Sequence[tuple[str, ...]], metric: str = "rougeL"
) -> np.ndarray:
    """ROUGE-L F1 of every answer against every sample's references, the best of these, from 0 to 100.

    Args:
        metric: `rougeL`, or with the ending of another tokenizer.

    Returns:
        Shape (answers, samples).
    """
    tokenize = tokenizer(metric).tokenize
    texts = [text for group in references for text in group]
    starts = np.cumsum([0, *map(len, references)])[:-1]
    found = _Texts([tokenize(text) for text in texts])
    rows = {text: np.maximum.reduceat(100 * found.f1(tokenize(text)), starts) for text in set(answers)}
    return np.stack([rows[text] for text in answers])


def of_every_pair(metric: str) -> bool:
    """Whether every pair of answers and references is scored in a moment (`rouge_l_matrix`)."""
    return metric.partition("_")[0] == "rougeL"


class _Texts:
    """Token lists side by side in one integer: a bit a token, and one that stops carries to the next list."""

    def __init__(self, texts: Sequence[Sequence[str]]):
        self.lengths = np.array([len(tokens) for tokens in texts])
        ends = np.cumsum(self.lengths + 1)
        self._starts, self._bits = ends - self.lengths - 1, int(ends[-1])
        places: dict[str, list[int]] = {}
        for start, tokens in zip(self._starts.tolist(), texts):
            for place, token in enumerate(tokens, start):
                places.setdefault(token, []).append(place)
        self._masks = {token: self._integer(at) for token, at in places.items()}
        self._all = self._integer(np.delete(np.arange(self._bits), ends - 1))

    def _integer(self, places: Sequence[int] | np.ndarray) -> int:
        bits = np.zeros(self._bits, dtype=np.uint8)
        bits[places] = 1
        return int.from_bytes(np.packbits(bits, bitorder="little").tobytes(), "little")

    def common(self, tokens: Sequence[str]) -> np.ndarray:
        """Length of the longest common subsequence of `tokens` and each text, shape (texts,)."""
        free, every = self._all, self._all
        for token in tokens:
            if (mask := self._masks.get(token)) is not None:
                met = free & mask
                free = ((free + met) | (free - met)) & every
        raw = np.frombuffer((every ^ free).to_bytes(-(-self._bits // 8), "little"), dtype=np.uint8)
        bits = np.unpackbits(raw, bitorder="little")[: self._bits]
        return np.add.reduceat(bits, self._starts, dtype=np.int64)

    def f1(self, tokens: Sequence[str]) -> np.ndarray:
        """F1 of `tokens` against each text, computed in the order of rouge-score; 0 where nothing is shared."""
        scores = np.zeros(len(self.lengths))
        shared = self.common(tokens) if tokens else scores
        some = shared > 0
        precision, recall = shared[some] / len(tokens or [""]), shared[some] / self.lengths[some]
        scores[some] = 2 * precision * recall / (precision + recall)
        return scores
