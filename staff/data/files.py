"""Which files hold a split of a task, and the rows of data sets that `datasets` saved, or of the Hugging Face hub.

The hub's files are fetched into its local cache and read from there, so that `datasets` asks no server.
"""

from __future__ import annotations

import glob
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from staff.data.rows import Rows, format_of, plain_rows, read_file, readable
from staff.errors import UserError
from staff.runtime.files import local_path
from staff.runtime.hub import Repository

Files = str | Sequence[str]
"""A path, a glob, or a list of them."""


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


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
        other = ELSEWHERE if split == "test" else "set it, or task.data_dir=FOLDER"
        raise UserError(f"task.{split}_file=null names no file: {other}.")
    if given is None:
        return _saved(split, folder) if is_saved(folder) else _named_after(name or split, split, folder)
    found: list[Path] = []
    for pattern in [given] if isinstance(given, str) else given:
        if "://" in pattern:
            raise UserError(
                f"task.{split}_file={pattern} is an address: download the file and name it by its path, or set "
                "task.hub=NAME for a data set of the hub."
            )
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


ELSEWHERE = (
    "set task.test_file, evaluate on rows drawn from the training split (task.dev_size=200 task.evaluate_on=dev), "
    "or select alone (evaluation=none)"
)
"""What to do without a test split."""


def _saved(split: str, folder: Path) -> list[Path]:
    if split != "train" and not (folder / "dataset_dict.json").is_file():
        raise UserError(
            f"{folder} holds one data set without splits, which is the training split: "
            + (f"{ELSEWHERE}." if split == "test" else f"set task.{split}_file.")
        )
    return [folder]


def _named_after(name: str, split: str, folder: Path) -> list[Path]:
    """NAME.jsonl, or another format, or a folder NAME of `save_to_disk`; else the shards NAME-*, as in folders of
    the hub.
    """
    if is_saved(folder / name):
        return [folder / name]
    whole, shards = (
        sorted(path for path in folder.glob(pattern) if format_of(path)) for pattern in (f"{name}.*", f"{name}-*")
    )
    if len(whole) > 1 or (not whole and len({format_of(shard) for shard in shards}) > 1):
        names = " and ".join(path.name for path in whole or shards)
        raise UserError(f"{folder} holds {names}: choose by task.{split}_file.")
    if not whole and not shards:
        other = ELSEWHERE if split == "test" else f"set task.{split}_file"
        unread = next((f", and {p.name} is of no format that is read" for p in sorted(folder.glob(f"{name}*"))), "")
        raise UserError(
            f"{folder / name}.jsonl does not exist{unread}: task.data_dir must be a folder with {name}.jsonl (or "
            f".json, .csv, .tsv, .parquet); or {other}."
        )
    return whole or shards


def read_rows(path: Path, split: str) -> Rows:
    """The rows of a file, or of a folder of `save_to_disk`, streamed; `split` of one that holds several.

    Raises:
        UserError: a format that is not known, or what cannot be read.
    """
    return _read_saved(path, split) if path.is_dir() else read_file(path, split)


def _read_saved(folder: Path, split: str) -> Rows:
    from datasets import DatasetDict, load_from_disk

    if not is_saved(folder):
        raise UserError(
            f"{folder} is a folder that save_to_disk did not write: name its files, as in '{folder}/*.jsonl', "
            "or set task.data_dir."
        )
    with readable(folder, "a folder of save_to_disk"):
        data = load_from_disk(folder)
    if isinstance(data, DatasetDict):
        if split not in data:
            raise UserError(
                f"{folder} has no split {split!r}, but {', '.join(map(str, data))}: name one by task.train_split, "
                "task.test_split or task.dev_split."
            )
        data = data[split]
    for number, row in enumerate(plain_rows(data), start=1):
        yield f"{folder}, row {number}", row


def read_hub(repository: Repository, config: str | None, split: str) -> Rows:
    """The rows of a split ("NAME[split] row n"), from the files of one configuration of the data set.

    Args:
        config: name of the configuration; None: the default one.
        split: as `datasets.load_dataset` takes it, such as "train[:90%]".

    Raises:
        UserError: the data set cannot be fetched or read, or has no such configuration.
    """
    import datasets

    options = _configured(repository, config, repository.fetch() / "README.md")
    patterns = [pattern for some in options.get("data_files", {}).values() for pattern in some]
    # In the hub's glob `**/` may stand for nothing, in a pattern of the download it may not.
    every = [form for pattern in patterns for form in {pattern, pattern.replace("**/", "")}] or ["*"]
    folder = repository.fetch(every, leave_out=["*.py", ".gitattributes"])
    with _readable_hub(repository.name, split):
        data = datasets.load_dataset(str(folder), split=split, **options)
    return _numbered(repository.name, split, data)


def read_folder(folder: Path, config: str | None, split: str, whole: str = "train") -> Rows:
    """The same from a local folder that holds a data set of the hub, or that `save_to_disk` wrote.

    Args:
        whole: the split that a folder without splits is; of another name it has none.
    """
    import datasets

    if is_saved(folder):
        if split != whole:
            _saved("test", folder)
        return read_rows(folder, split)
    with _readable_hub(str(folder), split):
        data = datasets.load_dataset(str(folder), config, split=split)
    return _numbered(str(folder), split, data)


def _numbered(name: str, split: str, data: Any) -> Rows:
    return ((f"{name}[{split}] row {number}", row) for number, row in enumerate(plain_rows(data), start=1))


def _configured(repository: Repository, config: str | None, card: Path) -> dict[str, Any]:
    """Arguments of `load_dataset` for a configuration, by the data set's card: name, files and types.

    The files are given by name, since `datasets` otherwise wants those of the first configuration as well.
    """
    from datasets.data_files import sanitize_patterns
    from datasets.info import DatasetInfosDict
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard

    if not card.is_file():
        return {"name": config}
    with _readable_hub(repository.name, "README.md"):
        data: Any = DatasetCard.load(card).data
        configs, infos = MetadataConfigs.from_dataset_card_data(data), DatasetInfosDict.from_dataset_card_data(data)
        name = config or configs.get_default_config_name()
    if not configs:
        return {"name": config}
    if name is None or name not in configs:
        known = ", ".join(map(str, configs))
        raise UserError(
            f"task.hub_config={config or 'null'}: the data set {repository.name!r} has {known}: name one of them."
        )
    files = configs[name].get("data_files")
    if files is None or "data_dir" in configs[name]:
        return {"name": name}
    info = infos.get(name)
    return {"name": name, "data_files": sanitize_patterns(files), "features": info and info.features}


@contextmanager
def _readable_hub(name: str, split: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        said = (str(error).splitlines() or ["no message"])[0]
        if said.startswith("Unknown split"):
            known = said.partition("one of ")[2].strip("[].").replace("'", "")
            raise UserError(
                f"task.hub={name} has no split {split!r}, but {known}: name one, or a part of one such as "
                f"'train[90%:]', by task.train_split and task.test_split. Without a test split, {ELSEWHERE}."
            ) from error
        if "zst" in said and importlib.util.find_spec("zstandard") is None:
            raise UserError(f"task.hub={name} has files that end with .zst: pip install zstandard.") from None
        raise UserError(
            f"task.hub={name} ({split}) could not be read ({type(error).__name__}: {said}): check task.hub_config "
            "and the splits, or give task.data_dir=FOLDER with train.jsonl and test.jsonl instead."
        ) from error
