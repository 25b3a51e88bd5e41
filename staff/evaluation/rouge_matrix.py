"""ROUGE-L of many answers against many references at once, for what needs every pair.

The numbers are those of rouge-score, to the last digit. Only the longest common subsequence
is found in another way: by bits, with all references side by side in one integer (Crochemore et al., A fast and
practical bit-vector algorithm for the longest common subsequence problem, 2001).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from staff.evaluation.metrics.rouge import tokenizer


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
