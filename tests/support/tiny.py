"""A pool of the embedded family, of short dialogues, with groups and a validation slice."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from staff.data.tokens import tokenize
from staff.pool import Pool, Slice
from staff.selection import SelectionMethod
from staff.store.store import Store

CONF = Path(__file__).resolve().parents[2] / "conf"
DEV_SIZE = 6


def composed(*overrides: str) -> Any:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=list(overrides))


@cache
def method_named(name: str) -> SelectionMethod:
    """The preset as it is configured for the embedded family."""
    return instantiate(composed(f"method={name}").method, _convert_="all")


def tiny_pool(store: Path | Store, size: int = 40, dev: bool = True, seed: int = 0) -> Pool:
    """The shortest dialogues of the embedded excerpt, in two groups; the longest six of them are the validation
    slice. Models are fine-tuned for two epochs."""
    cfg = composed("finetune.epochs=2", "finetune.small_epochs=2")
    family, settings, task = (instantiate(cfg[part], _convert_="all") for part in ("family", "finetune", "task"))
    rows = sorted(task.load("train"), key=lambda sample: len(sample.prompt))[: size + DEV_SIZE]
    small, target = (tokenize(rows, spec.tokenizer()) for spec in (family.small, family.target))
    groups = np.where(np.arange(len(rows)) % 4 == 0, "quarter", "rest")
    parts = {"pool": np.arange(size), "dev": np.arange(size, size + DEV_SIZE)}
    slices = {name: Slice(small.take(at), target.take(at), groups[at]) for name, at in parts.items()}
    if not dev:
        del slices["dev"]
    return Pool(slices, family, settings, store if isinstance(store, Store) else Store(store), seed)


def planted_pool(store: Path, size: int = 12, dev: int = 4) -> Pool:
    """Short planted questions: `size` of them are the pool, `dev` others the validation slice."""
    cfg = composed("task=planted", "task.size=300")
    family, settings, task = (instantiate(cfg[part], _convert_="all") for part in ("family", "finetune", "task"))
    rows = task.load("train")[: size + dev]
    small, target = (tokenize(rows, spec.tokenizer()) for spec in (family.small, family.target))
    parts = {"pool": np.arange(size), "dev": np.arange(size, size + dev)}
    slices = {name: Slice(small.take(at), target.take(at)) for name, at in parts.items()}
    return Pool(slices, family, settings, Store(store), 0)
