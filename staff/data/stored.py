"""Samples in memory-mapped files, so that a large pool is read, rendered and searched for duplicates once.

    FOLDER/<digest>/pool.arrow, dev.arrow, test.arrow    a row per sample
    FOLDER/<digest>/duplicates.npz, dropped.json         what was found in the pool

The digest is of what the samples were read from and of the code that read them, so that what is kept is never older
than either. Nothing else depends on these files: they may be removed at any time.
"""

from __future__ import annotations

import inspect
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from staff.data import duplicates, files, layouts, rows, samples, templates
from staff.data.duplicates import Duplicates
from staff.data.samples import Sample, computed_digest, several_answers
from staff.data.task import Task

if TYPE_CHECKING:
    from staff.data.splits import Splits

log = logging.getLogger(__name__)

LARGE = 2**22
"""Bytes of data files from which on their samples are kept: reading fewer takes no time worth a file."""
ROWS = 10_000
"""Samples that are made of an Arrow file at once."""


class StoredSamples(Sequence[Sample]):
    """The samples of a file that `write_samples` wrote, each made when it is asked for.

    Attributes:
        digest: `data_digest` of the samples.
        several_answers: whether any is a conversation with several answers.
    """

    def __init__(self, file: Path) -> None:
        import pyarrow as pa

        self._table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        facts = json.loads(self._table.schema.metadata[b"facts"])
        self.digest: str = facts["digest"]
        self.several_answers: bool = facts["several_answers"]

    def __len__(self) -> int:
        return len(self._table)

    @overload
    def __getitem__(self, at: int) -> Sample: ...
    @overload
    def __getitem__(self, at: slice) -> list[Sample]: ...
    def __getitem__(self, at: int | slice) -> Sample | list[Sample]:
        if isinstance(at, slice):
            start, stop, step = at.indices(len(self))
            return self._made(start, stop)[::step] if step > 0 else [self[i] for i in range(start, stop, step)]
        start = at + len(self) if at < 0 else at
        if not 0 <= start < len(self):
            raise IndexError(at)
        return self._made(start, start + 1)[0]

    def __iter__(self) -> Iterator[Sample]:
        for start in range(0, len(self), ROWS):
            yield from self._made(start, start + ROWS)

    def _made(self, start: int, stop: int) -> list[Sample]:
        some = self._table.slice(start, max(0, stop - start)).to_pydict()
        some["references"] = map(tuple, some["references"])
        some["choices"] = map(tuple, some["choices"])
        some["turns"] = (tuple((turn["role"], turn["text"]) for turn in turns) for turns in some["turns"])
        return [Sample(**dict(zip(some, values, strict=True))) for values in zip(*some.values(), strict=True)]


def write_samples(samples: Sequence[Sample], file: Path) -> None:
    """Write samples for `StoredSamples`, a batch at a time."""
    import pyarrow as pa

    text = pa.string()
    turns = pa.list_(pa.struct({"role": text, "text": text}))
    kinds = {"references": pa.list_(text), "choices": pa.list_(text), "turns": turns}
    facts = {"digest": computed_digest(samples), "several_answers": several_answers(samples)}
    names = [field.name for field in fields(Sample)]
    schema = pa.schema([(name, kinds.get(name, text)) for name in names], {"facts": json.dumps(facts)})
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        left = iter(samples)
        while some := list(islice(left, ROWS)):
            columns: dict[str, list[Any]] = {name: [getattr(sample, name) for sample in some] for name in names}
            columns["turns"] = [[{"role": r, "text": t} for r, t in sample.turns] for sample in some]
            writer.write(pa.record_batch([pa.array(columns[f.name], f.type) for f in schema], schema=schema))


def kept(folder: Path, task: Task, read_from: str, read: Callable[[], Splits]) -> Splits:
    """The splits that `read` returns, from the files of an earlier call; or called now, and kept for the next.

    Processes that ask for the same at once wait for the first. A folder that cannot be written to keeps nothing.

    Args:
        read_from: everything that the result depends on beside the code of `staff.data` and of the task's class.
    """
    from staff.store.locks import file_lock

    place = folder / sha256(f"{read_from} {_code(task)}".encode()).hexdigest()[:32]
    if place.is_dir():
        return _splits(place)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = file_lock(folder / f"{place.name}.lock")
        lock.acquire()
    except OSError as error:
        log.debug("samples cannot be kept in %s (%s)", folder, error)
        return read()
    try:
        if not place.is_dir():
            splits = read()
            if not _write(splits, place):
                return splits
            del splits
    finally:
        lock.release()
    return _splits(place)


def _write(splits: Splits, place: Path) -> bool:
    """Whether there was room for the files."""
    draft = place.with_suffix(f".{os.getpid()}")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        draft.mkdir()
        for name in ("pool", "dev", "test"):
            write_samples(getattr(splits, name), draft / f"{name}.arrow")
        found = {} if splits.duplicates is None else vars(splits.duplicates)
        np.savez(draft / "duplicates.npz", **{name: at for name, at in found.items() if at is not None})
        (draft / "dropped.json").write_text(json.dumps(splits.dropped))
        os.rename(draft, place)
    except OSError as error:
        log.warning("the samples cannot be kept in %s (%s), and will be read again", place.parent, error.strerror)
        return False
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    log.info("the %d samples are kept in %s, and not read again while their files stay", len(splits.pool), place)
    return True


def _splits(place: Path) -> Splits:
    from staff.data.splits import Splits

    pool, dev, test = (StoredSamples(place / f"{name}.arrow") for name in ("pool", "dev", "test"))
    with np.load(place / "duplicates.npz") as arrays:
        found = Duplicates(**arrays)
    return Splits(pool, list(dev), list(test), found, json.loads((place / "dropped.json").read_text()))


def _code(task: Task) -> str:
    """The text of all code that decides what samples are made of rows."""
    from staff.data import splits

    own = sys.modules[type(task).__module__]
    modules = {samples, layouts, duplicates, files, rows, templates, splits, sys.modules[Task.__module__], own}
    return " ".join(sorted(map(inspect.getsource, modules)))
