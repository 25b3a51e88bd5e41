"""Which files hold a split of a task."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path

from staff.data.rows import format_of, is_saved
from staff.errors import UserError
from staff.runtime.paths import local_path

Files = str | Sequence[str]
"""A path, a glob, or a list of them."""


def files_of(split: str, given: Files | None, data_dir: str | None, name: str | None = None) -> list[Path]:
    """The files that hold a split, in the order of the list, and by name within a glob.

    Args:
        split: "train", "test" or "dev".
        given: absolute, relative to `data_dir`, or from "~"; None: those in `data_dir` that have the split's name.
        name: the split's name; None: as it is called here.

    Raises:
        UserError: no such file, or a choice between several.
    """
    folder = Path() if data_dir is None else local_path(data_dir)
    if folder.is_file():
        raise UserError(
            f"task.data_dir={data_dir} is a file: name its folder, or give the file as task.{split}_file."
        )
    if given is None and data_dir is None:
        raise UserError(f"task.{split}_file=null names no file: set it, or task.data_dir=FOLDER.")
    if given is None:
        return [folder] if is_saved(folder) else _named_after(name or split, split, folder)
    found: list[Path] = []
    for pattern in [given] if isinstance(given, str) else given:
        path = folder / local_path(pattern)
        # A name that exists is meant as it stands, whatever signs it holds.
        matches = [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
        if not matches:
            how = f"task.data_dir must be a folder with {pattern}"
            if data_dir is None or local_path(pattern).is_absolute():
                how = f"task.{split}_file must be a file, a list of files or a glob"
            raise UserError(f"{path} does not exist: {how}.")
        found += matches
    return list(dict.fromkeys(found))


def _named_after(name: str, split: str, folder: Path) -> list[Path]:
    """NAME.jsonl, or another format; else the shards NAME-*, as in folders of the hub."""
    whole, shards = (
        sorted(path for path in folder.glob(pattern) if format_of(path)) for pattern in (f"{name}.*", f"{name}-*")
    )
    if len(whole) > 1 or (not whole and len({format_of(shard) for shard in shards}) > 1):
        names = " and ".join(path.name for path in whole or shards)
        raise UserError(f"{folder} holds {names}: choose by task.{split}_file.")
    if not whole and not shards:
        other = f"set task.{split}_file" + (", or evaluation=none to select alone" if split == "test" else "")
        raise UserError(
            f"{folder / name}.jsonl does not exist: task.data_dir must be a folder with {name}.jsonl (or "
            f".json, .csv, .tsv, .parquet), or {other}."
        )
    return whole or shards
