"""Duplicate samples: exact ones, up to case and white space, and near ones.

Near duplicates are found by MinHash (Broder 1997) over runs of five words, as Lee et al. 2022 (arXiv:2107.06499) do
for training data: samples whose estimated Jaccard similarity is at least 0.8.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from staff.data.samples import Sample
from staff.errors import UserError

log = logging.getLogger(__name__)

SIMILAR = 0.8
PERMUTATIONS = 128
WORDS = 5
NEAR_LIMIT = 100_000
"""Samples beyond which near duplicates are looked for only if asked: the search takes 0.2 ms and 5 KB for each."""


@dataclass(frozen=True)
class Duplicates:
    """Positions in a pool, ascending.

    Attributes:
        repeated: samples that are there earlier in the pool, prompt and answer.
        held_out: samples whose prompt is also among those held out.
        near_repeated: beyond those, samples that are much like an earlier one; None: not counted.
        near_held_out: beyond those, samples that are much like one held out; None: not counted.
    """

    repeated: np.ndarray
    held_out: np.ndarray
    near_repeated: np.ndarray | None = None
    near_held_out: np.ndarray | None = None

    def counts(self) -> dict[str, int | None]:
        """How many, for the record."""
        return {name: None if found is None else len(found) for name, found in vars(self).items()}

    def words(self) -> str:
        """How many, in one line; empty where there are none."""
        said = {
            "repeat an earlier one": self.repeated,
            "have the prompt of a test or validation sample": self.held_out,
            "are much like an earlier one": self.near_repeated,
            "are much like a test or validation sample": self.near_held_out,
        }
        return ", ".join(f"{len(found)} {what}" for what, found in said.items() if found is not None and len(found))

    def to_drop(self, deduplicate: str) -> np.ndarray:
        """Positions to leave out, where duplicates are dropped "exact" or "near" (those as well)."""
        found = [self.repeated, self.held_out]
        if deduplicate == "near":
            found += [part for part in (self.near_repeated, self.near_held_out) if part is not None]
        return np.unique(np.concatenate(found)) if deduplicate != "none" else np.empty(0, np.int64)


def duplicates(pool: Sequence[Sample], held_out: Sequence[Sample], near: bool | None = None) -> Duplicates:
    """The samples of a pool that repeat one another, or samples that are held out for a test or a validation slice.

    Args:
        near: whether near duplicates are looked for; None: if datasketch is installed, and in pools of at most
            `NEAR_LIMIT` samples.

    Raises:
        UserError: near duplicates are wanted, and datasketch is not installed.
    """
    if near and not near_available():
        raise UserError("task.deduplicate=near needs datasketch: pip install 'staff-coresets[duplicates]'.")
    first: dict[bytes, int] = {}
    repeated = np.array(
        [at for at, s in enumerate(pool) if first.setdefault(_content_digest(s), at) < at], np.int64
    )
    asked = {normalised(sample.prompt) for sample in held_out}
    exposed = [at for at, sample in enumerate(pool) if normalised(sample.prompt) in asked] if asked else []
    found = Duplicates(repeated, np.array(exposed, np.int64))
    if near is False or not near_available():
        log.debug("near duplicates are not counted, for want of datasketch")
        return found
    if near is None and len(pool) > NEAR_LIMIT:
        return found
    return Duplicates(found.repeated, found.held_out, *_near(pool, held_out, set(found.to_drop("exact").tolist())))


def near_available() -> bool:
    """Whether the library that finds near duplicates is installed."""
    return importlib.util.find_spec("datasketch") is not None


def _content_digest(sample: Sample) -> bytes:
    return hashlib.blake2b("\0".join(content(sample)).encode(), digest_size=16).digest()


def content(sample: Sample) -> tuple[str, str]:
    """What makes two samples the same: prompt and answer, normalised."""
    return normalised(sample.prompt), normalised(sample.answer)


def normalised(text: str) -> str:
    """A text without what spelling and layout add: compatible characters, case, runs of white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _near(pool: Sequence[Sample], held_out: Sequence[Sample], known: set[int]) -> tuple[np.ndarray, np.ndarray]:
    from datasketch import MinHashLSH  # pyright: ignore[reportMissingImports]

    # What a template says in every prompt is no likeness.
    prompts = [sample.prompt for sample in pool]
    start = _alike_at_start(prompts)
    end = _alike_at_start([prompt[start:][::-1] for prompt in prompts])

    def signatures(sample: Sample) -> tuple[Any, Any]:
        return _signatures(sample.prompt[start : len(sample.prompt) - end], sample.answer)

    apart, index = (MinHashLSH(threshold=SIMILAR, num_perm=PERMUTATIONS) for _ in range(2))
    hidden: dict[str, Any] = {}
    for at, sample in enumerate(held_out):
        hidden |= {f"{at} {part}": signed for part, signed in enumerate(signatures(sample))}
    for name, signed in hidden.items():
        apart.insert(name, signed)
    seen: dict[str, Any] = {}
    repeated, exposed = [], []
    for at, sample in enumerate(pool):
        if at in known:
            continue
        asked, signed = signatures(sample)
        if any(_alike(part, hidden, map(str, apart.query(part))) for part in (asked, signed)):
            exposed.append(at)
        if _alike(signed, seen, map(str, index.query(signed))):
            repeated.append(at)
        else:
            seen[str(at)] = signed
            index.insert(str(at), signed)
    return np.array(repeated, np.int64), np.array(exposed, np.int64)


def _alike_at_start(texts: Sequence[str]) -> int:
    """How many characters all texts begin with alike; 0 where all are the same text."""
    low, high = min(texts), max(texts)
    pairs = enumerate(zip(low, high, strict=False))
    return 0 if low == high else next((at for at, (one, other) in pairs if one != other), len(low))


def _signatures(prompt: str, answer: str) -> tuple[Any, Any]:
    """Of a prompt, and of prompt and answer together."""
    asked, whole = _words(prompt), _words(f"{prompt} {answer}")
    of_prompt = _empty().copy()
    of_prompt.update_batch(_runs(asked))
    of_both = of_prompt.copy()
    of_both.update_batch(_runs(whole[max(0, len(asked) - WORDS + 1) :]))
    return of_prompt, of_both


def _runs(words: list[str]) -> list[bytes]:
    return [" ".join(words[at : at + WORDS]).encode() for at in range(max(1, len(words) - WORDS + 1))]


WITHOUT_SPACES = "[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]"
"""Letters of scripts that put no space between words: Thai, Lao, Burmese, Khmer, Japanese, Chinese."""


def _words(text: str) -> list[str]:
    """Words; of scripts without spaces, letters."""
    return re.sub(f"({WITHOUT_SPACES})", r" \1 ", normalised(text)).split()


@cache
def _empty() -> Any:
    """The signature of no text. Its copies share its permutations: to draw them takes as long as all the rest."""
    from datasketch import MinHash  # pyright: ignore[reportMissingImports]
    from xxhash import xxh32_intdigest

    return MinHash(PERMUTATIONS, hashfunc=xxh32_intdigest)


def _alike(signed: Any, others: dict[str, Any], candidates: Iterable[str]) -> bool:
    return any(signed.jaccard(others[name]) >= SIMILAR for name in candidates)
