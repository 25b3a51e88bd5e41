"""Rows of data sets of the Hugging Face hub.

Their files are fetched into the hub's local cache and read from there, so that `datasets` asks no server.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from staff.data.rows import Rows, is_saved, plain_rows, read_rows
from staff.errors import UserError
from staff.runtime.hub import Repository


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
    with _readable(repository.name, split):
        data = datasets.load_dataset(str(folder), split=split, **options)
    return _numbered(repository.name, split, data)


def read_folder(folder: Path, config: str | None, split: str) -> Rows:
    """The same from a local folder that holds a data set of the hub, or that `save_to_disk` wrote."""
    import datasets

    if is_saved(folder):
        return read_rows(folder, split)
    with _readable(str(folder), split):
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
    with _readable(repository.name, "README.md"):
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
def _readable(name: str, split: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        said = (str(error).splitlines() or ["no message"])[0]
        raise UserError(
            f"task.hub={name} ({split}) could not be read ({type(error).__name__}: {said}): check task.hub_config "
            "and the splits, or give task.data_dir=FOLDER with train.jsonl and test.jsonl instead."
        ) from error
