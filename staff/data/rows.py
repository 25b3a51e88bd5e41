"""Rows of data files, each with its place for messages.

The `datasets` library reads CSV, Parquet and what it saved itself. JSON is parsed here, row by row: the library
wants one type for a column, so that it makes dates of text and 1.0 of 1, and null of a missing field.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import logging
import warnings
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from staff.data.templates import shortened
from staff.errors import UserError

Rows = Iterator[tuple[str, Mapping[str, Any]]]

FORMATS = {
    ".jsonl": "JSON Lines",
    ".ndjson": "JSON Lines",
    ".json": "JSON",
    ".csv": "CSV",
    ".tsv": "TSV",
    ".parquet": "Parquet",
}
COMPRESSED = (".gz", ".bz2", ".zst")


def format_of(path: Path) -> str | None:
    """The format that a file's name tells, one of `FORMATS`, compressed or not."""
    name = path.name.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    return FORMATS.get(Path(name).suffix)


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def read_rows(path: Path, split: str) -> Rows:
    """The rows of a file, or of a folder of `save_to_disk`, streamed.

    Args:
        split: of a folder that holds several.

    Raises:
        UserError: a format that is not known, a file that is damaged, a line that is no JSON object.
    """
    if path.is_dir():
        return _read_saved(path, split)
    kind = format_of(path)
    if kind is None:
        raise UserError(f"{path}: the format is not known by its name: choose {', '.join(FORMATS)}.")
    read = {"JSON Lines": read_json_lines, "JSON": _read_json, "Parquet": _read_parquet}.get(kind, _read_csv)
    return read(path)


def read_json_lines(path: Path) -> Rows:
    """The rows of a JSON Lines file ("file, line n"), compressed or not. Blank lines are skipped.

    Raises:
        UserError: a line is not a JSON object in UTF-8.
    """
    with _opened(path) as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{path}, line {number}"
                row = _parsed(line, where, "each line must be one JSON object", first=number == 1)
                yield where, _object(row, where, "each line must be {...}")


def _read_json(path: Path) -> Rows:
    """The rows of a JSON array ("file, row n"), or of JSON Lines that are named .json."""
    with _opened(path) as file:
        array = file.peek(1024).removeprefix(BOM_UTF8).lstrip().startswith(b"[")
        text = file.read() if array else b""
    if not array:
        yield from read_json_lines(path)
        return
    rows = _parsed(text, str(path), "the file must be an array of objects, or one object a line", first=True)
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        yield where, _object(row, where, "the array must hold {...}")


@contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader]:
    import pyarrow as pa

    with _readable(path, format_of(path) or "text"), pa.input_stream(str(path), compression="detect") as file:
        yield io.BufferedReader(file)


def _parsed(text: bytes, where: str, wanted: str, first: bool) -> Any:
    """What JSON says; only the file's first line may begin with a byte order mark."""
    try:
        return json.loads(text.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 (byte {error.start}); convert the file to UTF-8.") from None
    except (ValueError, RecursionError) as error:  # also for a number of thousands of digits
        said = "nested too deep" if isinstance(error, RecursionError) else str(error)
        if isinstance(error, json.JSONDecodeError):
            line = f"line {error.lineno}, " if b"\n" in text.strip() else ""
            said = f"{error.msg}, {line}column {error.colno}"
        raise UserError(f"{where}: not JSON ({said}); {wanted}.") from None


def _object(row: Any, where: str, wanted: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{where}: a {type(row).__name__}, not an object; {wanted}.")
    return row


def _read_csv(path: Path) -> Rows:
    """The rows of a CSV or TSV file with a header ("file, row n"), every value as the text that the file has."""
    from datasets import Features, Value

    options = {"sep": _separator(path), "keep_default_na": False, "index_col": False}
    first = next(_streamed("csv", path, **options), {})
    features = Features({str(name): Value("string") for name in first})
    for number, row in enumerate(_streamed("csv", path, **options, features=features) if first else (), start=1):
        yield f"{path}, row {number}", row


def _separator(path: Path) -> str:
    """What separates the columns: a comma, or where the header has none, a semicolon, tab or bar as spreadsheets
    write; a tab in a TSV file.

    Raises:
        UserError: a column comes twice, of which pandas would rename one.
    """
    with _opened(path) as lines:
        header = next((line for line in lines if line.strip()), b"").decode("utf-8-sig").strip("\r\n")
        found = "\t" if format_of(path) == "TSV" else next((mark for mark in ",;\t|" if mark in header), ",")
        names = next(csv.reader(io.StringIO(header, newline=""), delimiter=found), [])
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(f"{path}: the column {twice[0]!r} comes twice; rename one of them.")
    return found


def _read_parquet(path: Path) -> Rows:
    if _is_empty(path):  # which the library takes for an error
        return
    for number, row in enumerate(_streamed("parquet", path), start=1):
        yield f"{path}, row {number}", row


def _is_empty(path: Path) -> bool:
    from pyarrow import parquet

    with _readable(path, "Parquet"):
        return path.suffix.lower() == ".parquet" and parquet.read_metadata(path).num_rows == 0


def _read_saved(folder: Path, split: str) -> Rows:
    from datasets import DatasetDict, load_from_disk

    if not is_saved(folder):
        raise UserError(
            f"{folder} is a folder that save_to_disk did not write: name its files, as in '{folder}/*.jsonl', "
            "or set task.data_dir."
        )
    with _readable(folder, "a folder of save_to_disk"):
        data = load_from_disk(folder)
    if isinstance(data, DatasetDict):
        if split not in data:
            raise UserError(f"{folder} has no split {split!r}: it has {', '.join(map(str, data))}.")
        data = data[split]
    for number, row in enumerate(plain_rows(data), start=1):
        yield f"{folder}, row {number}", row


def _streamed(builder: str, path: Path, **options: Any) -> Iterator[dict[str, Any]]:
    import datasets
    from pandas.errors import ParserWarning

    with _readable(path, format_of(path) or builder), warnings.catch_warnings():
        warnings.simplefilter("error", ParserWarning)  # a row with more values than the header has names
        files = [glob.escape(str(path.absolute()))]
        yield from plain_rows(
            datasets.load_dataset(builder, data_files=files, split="train", streaming=True, **options)
        )


def plain_rows(data: Any) -> Iterator[dict[str, Any]]:
    """The rows of a `Dataset` or an `IterableDataset`: labels by their names, images and sounds not decoded."""
    stream = data if hasattr(data, "decode") else data.to_iterable_dataset()
    features = stream.features
    if features is None:
        yield from stream
        return
    for row in stream.decode(False):
        yield {name: _named(value, features.get(name)) for name, value in row.items()}


def _named(value: Any, feature: Any) -> Any:
    """The value with class labels by their names; None for a label that is not given (-1)."""
    from datasets import ClassLabel

    if isinstance(feature, ClassLabel):
        return None if value is None or value < 0 else feature.int2str(value)
    if getattr(feature, "dtype", None) in ("float16", "float32") and isinstance(value, float):
        return float(str(np.dtype(feature.dtype).type(value)))  # 0.1, not 0.10000000149011612
    if isinstance(feature, Mapping) and isinstance(value, Mapping):
        return {name: _named(part, feature.get(name)) for name, part in value.items()}
    if isinstance(value, list):
        return [_named(part, getattr(feature, "feature", None)) for part in value]
    return value


@contextmanager
def _readable(path: Path, what: str) -> Iterator[None]:
    """Say in one sentence what a library says of a file, and nothing beside it."""
    logger = logging.getLogger("datasets")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # it logs what it raises
    try:
        yield
    except UserError:
        raise
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8; convert the file to UTF-8.") from None
    except Exception as error:
        said = " ".join(str(error).split()) or "no message"
        if "zstandard" in said:
            raise UserError(f"{path}: this format needs a package for .zst: pip install zstandard.") from None
        raise UserError(
            f"{path}: cannot be read as {what} ({type(error).__name__}: {shortened(said)}); mend the file."
        ) from error
    finally:
        logger.setLevel(level)
