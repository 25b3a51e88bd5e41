"""A pool of short samples and the tiny family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from support.tuning import SETTINGS

from staff.data.samples import Sample
from staff.data.tokens import TokenizedSamples, Tokens, read_tokens
from staff.models.family import Family
from staff.models.prepare import prepare
from staff.models.spec import ModelSpec
from staff.pool import Pool, Slice
from staff.store.store import Store

TINY = Family("tiny", ModelSpec("pkg://staff/assets/tiny/target"), ModelSpec("pkg://staff/assets/tiny/small"))


def sums(count: int, first: int = 0) -> list[Sample]:
    """Short prompts with answers of various lengths."""
    return [
        Sample(f"sum {i}", f"Add {i} to {i * i}:", f" {i + i * i}" * (1 + i % 4), ())
        for i in range(first, first + count)
    ]


def tiny_pool(store: Path | Store, count: int = 12, dev: int = 0, family: Family = TINY, **fields: Any) -> Pool:
    """A pool of `count` samples, and `dev` others as its validation slice.

    Args:
        fields: of `Pool`.
    """
    kept = store if isinstance(store, Store) else Store(store)
    family = prepare(family, kept)

    def read(samples: list[Sample], spec: ModelSpec) -> TokenizedSamples:
        return read_tokens(kept.get(Tokens(samples, spec, family.reading)))

    rows = {"pool": sums(count), **({"dev": sums(dev, first=count)} if dev else {})}
    slices = {
        name: Slice(read(samples, family.small), read(samples, family.target)) for name, samples in rows.items()
    }
    return Pool(slices, family, **{"settings": SETTINGS, "store": kept, "seed": 0, **fields})
