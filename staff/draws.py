"""Random draws that depend on the seed, the purpose and the sample alone."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=4)
def _hashes(ids: tuple[str, ...]) -> np.ndarray:
    digest = b"".join(hashlib.blake2b(id.encode(), digest_size=8).digest() for id in ids)
    return np.frombuffer(digest, dtype=np.uint64)


class Draws:
    """Random draws keyed by seed, purpose and sample id.

    Every sample has a random number for each purpose. It depends neither on the order of the pool nor on earlier
    draws. Drawing k samples takes those with the k lowest numbers; ties between scores are broken by the same
    numbers.

    Args:
        seed: the selection seed.
        ids: the samples' ids, unique, in pool order.
    """

    def __init__(self, seed: int, ids: Sequence[str]):
        self._hashes = _hashes(tuple(ids))
        self._priorities: dict[str, np.ndarray] = {}
        self.seed = seed

    def priorities(self, purpose: str) -> np.ndarray:
        """The random number of each sample, uniform over 64 bits, shape (pool size,), uint64."""
        if purpose not in self._priorities:
            self._priorities[purpose] = self._mix(purpose)
        return self._priorities[purpose]

    def _mix(self, purpose: str) -> np.ndarray:
        key = np.random.default_rng([self.seed, zlib.crc32(purpose.encode())]).integers(
            2**64, dtype=np.uint64, size=2
        )
        # The finaliser of SplitMix64. It is a bijection, so distinct samples keep distinct numbers.
        z = (self._hashes + key[0]) ^ key[1]
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))

    def choose(self, purpose: str, candidates: np.ndarray, count: int) -> np.ndarray:
        """`count` of `candidates` (positions), drawn uniformly without replacement; all if there are fewer."""
        return candidates[np.argsort(self.priorities(purpose)[candidates])[:count]]

    def highest_first(self, scores: np.ndarray, purpose: str = "ties") -> np.ndarray:
        """All positions by descending score, equal scores in random order."""
        return np.lexsort((self.priorities(purpose), -scores))

    def all_but_highest(self, scores: np.ndarray, fraction: float) -> np.ndarray:
        """All positions except those of the floor(fraction N) highest scores, ascending."""
        dropped = len(scores) - left_after_dropping(fraction, len(scores))
        return np.sort(self.highest_first(scores)[dropped:])


def left_after_dropping(fraction: float, pool_size: int) -> int:
    """N - floor(fraction N), in exact arithmetic."""
    return pool_size - int(Fraction(str(fraction)) * pool_size)
