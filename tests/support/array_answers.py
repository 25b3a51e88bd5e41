"""A pool that answers `ask` from arrays, for tests of selection methods."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

EPOCHS, DIMENSIONS, DEV_SIZE = 4, 8, 6


class ArrayAnswers:
    """Answers what `given` holds, and any other question with numbers drawn by the question.

    Args:
        n: samples in the pool.
        given: answers by signal, or by "signal/view" for another view than the pool.
        constant: every drawn answer is 0.5.
        groups: group label of each sample.
    """

    def __init__(
        self,
        n: int,
        given: Mapping[str, np.ndarray] | None = None,
        *,
        constant: bool = False,
        groups: Sequence[str] | None = None,
    ):
        self.ids = [f"sample {i}" for i in range(n)]
        self.given = dict(given or {})
        self.constant = constant
        self.groups = None if groups is None else np.asarray(groups)
        self.answer_lengths = np.full(n, 9) if constant else np.random.default_rng(n).integers(3, 60, n)
        self.bad_sample: int | None = None
        self.asked: list[tuple[str, str, str, dict[str, Any]]] = []
        self._order = np.arange(n)

    def ask(self, signal: Any, of: str, at: np.ndarray | None = None, view: str = "pool", **options: Any) -> Any:
        if isinstance(signal, list):
            return [self.ask(each, of, at, view, **options) for each in signal]
        self.asked.append((signal, of, view, options))
        key = signal if view == "pool" else f"{signal}/{view}"
        values = self.given[key] if key in self.given else self._drawn(signal, of, view, options)
        if view == "pool":
            values = values[self._order]
            if self.bad_sample is not None:
                values = np.array(values, dtype=float)
                values[self.bad_sample] = np.nan
        return values if at is None else values[at]

    def _drawn(self, signal: str, of: str, view: str, options: dict[str, Any]) -> np.ndarray:
        rows = len(self.ids) if view == "pool" else DEV_SIZE
        shape = (rows, *((EPOCHS,) if of.endswith("@epochs") else ()))
        shape += (DIMENSIONS,) if signal == "embedding" else ()
        if self.constant:
            return np.full(shape, 0.5)
        question = repr((signal, of, view, sorted(options.items())))
        rng = np.random.default_rng(zlib.crc32(question.encode()))
        return rng.normal(size=shape) if signal == "embedding" else rng.lognormal(0, 0.5, shape)

    def reordered(self, order: np.ndarray) -> ArrayAnswers:
        """The same samples in another order."""
        other = ArrayAnswers(len(order), self.given, constant=self.constant)
        other.ids = [self.ids[i] for i in order]
        other.answer_lengths = self.answer_lengths[order]
        other.groups = None if self.groups is None else self.groups[order]
        other._order = self._order[order]
        return other
