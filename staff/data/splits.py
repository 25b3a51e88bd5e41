"""The splits of a task as a run has them: the pool, the validation slice, and the test samples, kept apart."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from staff.data.duplicates import Duplicates, content, duplicates
from staff.data.task import Sample, Task
from staff.errors import UserError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Splits:
    """Samples by what they are for.

    Attributes:
        pool: to choose from.
        dev: the validation slice, in no method's pool; empty where the task has none.
        test: for the evaluation; empty where there is none.
        duplicates: as found in the pool, before any was dropped.
        dropped: samples of the training rows that were dropped as duplicates.
    """

    pool: list[Sample]
    dev: list[Sample] = field(default_factory=list)
    test: list[Sample] = field(default_factory=list)
    duplicates: Duplicates | None = None
    dropped: int = 0

    @property
    def test_prompts_in_pool(self) -> int:
        """Test samples whose prompt is also in the pool: they measure memory, not learning."""
        prompts = {sample.prompt for sample in self.pool}
        return sum(sample.prompt in prompts for sample in self.test)


_last: dict[str, Splits] = {}
"""The splits that were read last, by what they were read from."""


def load_splits(task: Task, evaluated: bool = True) -> Splits:
    """Read a task's splits, drop duplicates from the pool where asked, and carve the validation slice.

    The runs of a sweep share one reading: what was read last is kept until a file changes.

    Args:
        evaluated: False: no test split is read.

    Raises:
        UserError: bad data, or a validation slice that shares samples with the pool or leaves none.
    """
    has_dev = task.dev_file is not None or task.dev_split is not None
    splits = ["train", *(["test"] if evaluated else []), *(["dev"] if has_dev else [])]
    known = f"{type(task)} {task} {[(split, task.stamps(split)) for split in splits]}"
    if known not in _last:
        _last.clear()
        _last[known] = _splits(task, {split: task.load(split) for split in splits})
    return _last[known]


def _splits(task: Task, read: Mapping[str, list[Sample]]) -> Splits:
    rows, test, dev = read["train"], read.get("test", []), read.get("dev", [])
    found = duplicates(rows, [*test, *dev], near={"near": True}.get(task.deduplicate))
    if words := found.words():
        log.warning("duplicates among %d training samples: %s", len(rows), words)
    dropped = found.to_drop(task.deduplicate)
    pool = [rows[at] for at in np.setdiff1d(np.arange(len(rows)), dropped)]
    if not pool:
        raise UserError(
            f"task.deduplicate={task.deduplicate} drops all {len(rows)} training samples: set it to none."
        )
    if task.dev_size is not None:
        pool, dev = _carved(pool, task.dev_size)
    elif dev:
        _check_apart(pool, dev)
    return Splits(pool, dev, test, found, len(dropped))


def _carved(rows: Sequence[Sample], size: int) -> tuple[list[Sample], list[Sample]]:
    """The rows without `size` of them, and these: the same for every seed and every order of the rows.

    A sample whose text comes twice is not drawn, so that the two share none.
    """
    texts = [content(sample) for sample in rows]
    times = Counter(texts)
    single = [at for at, text in enumerate(texts) if times[text] == 1]
    if size > len(single) or size >= len(rows):
        raise UserError(
            f"task.dev_size={size} leaves no pool: {len(single)} of the {len(rows)} training samples can be drawn; "
            "lower it."
        )
    drawn = set(sorted(single, key=lambda at: _lot(rows[at].id))[:size])
    return [s for at, s in enumerate(rows) if at not in drawn], [s for at, s in enumerate(rows) if at in drawn]


def _lot(id: str) -> bytes:
    """A number that depends on the id alone, uniform over 64 bits; the lowest are drawn."""
    return hashlib.blake2b(f"validation slice\0{id}".encode(), digest_size=8).digest()


def _check_apart(pool: Sequence[Sample], dev: Sequence[Sample]) -> None:
    texts = {content(sample) for sample in pool}
    shared = [sample for sample in dev if content(sample) in texts]
    if shared:
        raise UserError(
            f"{len(shared)} of the {len(dev)} samples of the validation slice are also in the pool, such as "
            f"{shared[0].id!r}: take them out, or set task.deduplicate=exact, which drops them from the pool."
        )
