"""Rows of data files, each with its place for messages.

The `datasets` library reads Parquet. JSON is parsed here, row by row: the library wants one type for a column, so
that it makes dates of text and 1.0 of 1, and null of a missing field. CSV is read by the standard library: pandas
takes the rows behind a stray quote for one value.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import logging
import lzma
import re
from codecs import BOM_UTF8
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from staff.data.templates import shortened
from staff.errors import UserError

log = logging.getLogger(__name__)

Rows = Iterator[tuple[str, Mapping[str, Any]]]

FORMATS = {
    ".jsonl": "JSON Lines",
    ".ndjson": "JSON Lines",
    ".json": "JSON",
    ".csv": "CSV",
    ".tsv": "TSV",
    ".parquet": "Parquet",
}
COMPRESSED = (".gz", ".bz2", ".zst", ".xz")


def format_of(path: Path) -> str | None:
    """The format that a file's name tells, one of `FORMATS`, compressed or not."""
    name = path.name.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    return FORMATS.get(Path(name).suffix)


def read_file(path: Path, split: str) -> Rows:
    """The rows of a file, streamed.

    Args:
        split: of a JSON object that holds several.

    Raises:
        UserError: a format that is not known, a file that is damaged, a line that is no JSON object.
    """
    kind = format_of(path)
    if kind is None:
        known = ", ".join(FORMATS)
        raise UserError(f"{path}: its name tells no format that is read: save it as {known}, outside an archive.")
    _check_content(path)
    if kind == "JSON":
        return _read_json(path, split)
    read = {"JSON Lines": read_json_lines, "Parquet": _read_parquet}.get(kind, _read_csv)
    return read(path)


CONTENTS = {
    b"\x1f\x8b": ".gz",
    b"BZh": ".bz2",
    b"\x28\xb5\x2f\xfd": ".zst",
    b"\xfd7zXZ": ".xz",
    b"PK\x03\x04": ".zip",
    b"PAR1": ".parquet",
}
"""What files of other formats than their name tells begin with."""


def _check_content(path: Path) -> None:
    with readable(path, format_of(path) or "text"), path.open("rb") as file:
        start = file.read(64)
    if start.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: a pointer of Git LFS in place of the file: fetch it by git lfs pull.")
    name = path.name.lower()
    for mark, suffix in CONTENTS.items():
        if start.startswith(mark) and not name.endswith(suffix):
            what = "unpack it" if suffix == ".zip" else f"let its name end with {suffix}"
            raise UserError(f"{path}: the content is that of a {suffix} file: {what}.")


def read_json_lines(path: Path) -> Rows:
    """The rows of a JSON Lines file ("file, line n"), compressed or not. Blank lines are skipped.

    Raises:
        UserError: a line is not a JSON object in UTF-8.
    """
    with _opened(path) as lines:
        for number, line in enumerate(lines, start=1):
            line = line.removeprefix(BOM_UTF8) if number == 1 else line
            if line.strip():
                where = f"{path}, line {number}"
                row = _parsed(line, where, "each line must be one JSON object")
                yield where, _object(row, where, "each line must be {...}, and an array be named .json")


def _read_json(path: Path, split: str) -> Rows:
    """The rows of a JSON array ("file, row n"), alone or in an object; or of JSON Lines that are named .json."""
    with _opened(path) as file:
        start = b""
        while not start.strip() and (line := file.readline()):
            start = line.removeprefix(BOM_UTF8)
        lines = start.startswith(b"{") and start.rstrip().endswith(b"}") and file.peek(1).strip() != b""
        text = b"" if lines else start + file.read()
    if lines or not text.strip():
        yield from read_json_lines(path)
        return
    rows = _parsed(text, str(path), "the file must be an array of objects, or one object a line")
    if not isinstance(rows, list):
        rows = _within(_object(rows, str(path), "the file must hold {...}"), path, split)
    for number, row in enumerate(rows, start=1):
        where = f"{path}, row {number}"
        yield where, _object(row, where, "the array must hold {...}")


def _within(whole: Mapping[str, Any], path: Path, split: str) -> list[Any]:
    """The rows in a JSON object: a list of objects by the name of the split or "data", or the object itself."""
    for name in (split, "data"):
        if isinstance(found := whole.get(name), list) and all(isinstance(row, dict) for row in found):
            return found
    kinds = {type(value) for value in whole.values()}
    if len(whole) > 1 and kinds in ({list}, {dict}):
        raise UserError(
            f"{path}: an object of {len(whole)} {kinds.pop().__name__}s, not rows: write an array of objects, as "
            "pandas does by to_json(orient='records')."
        )
    return [whole]


@contextmanager
def _opened(path: Path) -> Iterator[io.BufferedReader]:
    import pyarrow as pa

    with readable(path, format_of(path) or "text"):
        unpacked: Any = lzma.open if path.suffix.lower() == ".xz" else pa.input_stream
        with unpacked(str(path)) as file:
            reader = io.BufferedReader(file)
            if (wide := json.detect_encoding(reader.peek(4))).startswith(("utf-16", "utf-32")):
                raise UserError(f"{path}: {wide.upper()}, not UTF-8; convert the file to UTF-8.")
            yield reader


def _parsed(text: bytes, where: str, wanted: str) -> Any:
    try:
        return json.loads(text.decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # also for a number of thousands of digits
        if isinstance(error, UnicodeDecodeError):
            raise UserError(f"{where}: not UTF-8 (byte {error.start}); convert the file to UTF-8.") from None
        said = "nested too deep" if isinstance(error, RecursionError) else str(error)
        if isinstance(error, json.JSONDecodeError):
            line = f"line {error.lineno}, " if b"\n" in text.strip() else ""
            said = f"{_why(error)}, {line}column {error.colno}"
        raise UserError(f"{where}: not JSON ({said}); {wanted}.") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {shortened(repr(twice))} comes twice")
    return row


def _why(error: json.JSONDecodeError) -> str:
    if error.doc[: error.pos].rstrip().endswith(",") and error.doc[error.pos : error.pos + 1] in ("}", "]"):
        return "a comma before a closing bracket"
    if error.doc[error.pos :].strip() == ",":
        return "a comma behind the object"
    return error.msg


def _object(row: Any, where: str, wanted: str) -> Mapping[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{where}: a {type(row).__name__}, not an object; {wanted}.")
    return row


def _read_csv(path: Path) -> Rows:
    """The rows of a CSV or TSV file with a header ("file, row n"), every value as the text that the file has.

    A space behind every separator of the header belongs to no text.

    Raises:
        UserError: a row with another number of values than the header, a column that comes twice, a stray quote.
    """
    csv.field_size_limit(2**31 - 1)
    with _opened(path) as file:
        lines = io.TextIOWrapper(file, "utf-8-sig", newline="")
        try:
            start = next((line for line in lines if line.strip()), "")
            if told := re.fullmatch(r'"?sep=(.)"?\s*', start):  # as spreadsheets begin a file
                start = next(lines, "")
            mark = told[1] if told else _separator(path, start)
            spaced = start.count(mark) == start.count(f"{mark} ") > 0
            reader = csv.reader(chain([start], lines), delimiter=mark, strict=True, skipinitialspace=spaced)
            header = next(reader, [])
            if twice := [name for name in header if name and header.count(name) > 1]:
                raise UserError(f"{path}: the column {twice[0]!r} comes twice; rename one of them.")
            for number, values in enumerate((v for v in reader if len(v) > 1 or "".join(v).strip()), start=1):
                where = f"{path}, row {number}"
                if len(values) != len(header):
                    raise UserError(
                        f"{where}: {len(values)} value(s), but the header names {len(header)} column(s), separated "
                        f"by {mark!r}: write all of them, and put a value that holds the separator in quotes."
                    )
                yield where, dict(zip(header, values, strict=True))
        except csv.Error as error:
            raise UserError(
                f"{path}, near line {reader.line_num}: a stray quote ({error}); put the whole value in quotes and "
                "double the quotes in it."
            ) from None


def _separator(path: Path, header: str) -> str:
    """What separates the columns: a comma, or a semicolon, tab or bar where the header has none; in TSV a tab."""
    if format_of(path) == "TSV":
        return "\t"
    bare = re.sub(r'"[^"]*"', "", header)
    mark = next((mark for mark in ",;\t|" if mark in bare), ",")
    if mark != ",":
        log.info("%s: the columns are separated by %r", path, mark)
    return mark


def _read_parquet(path: Path) -> Rows:
    import datasets
    from pyarrow import parquet

    with readable(path, "Parquet"):
        facts = parquet.read_metadata(path)
        names = facts.schema.to_arrow_schema().names
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"{path}: the column {twice[0]!r} comes twice; rename one of them.")
        if not facts.num_rows:  # which the library takes for an error
            return
        files = [glob.escape(str(path.absolute()))]
        data = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
        for number, row in enumerate(plain_rows(data), start=1):
            yield f"{path}, row {number}", row


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
def readable(path: Path, what: str) -> Iterator[None]:
    """Turn a library's error about a file into one sentence, and silence its log."""
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
        raise UserError(
            f"{path}: cannot be read as {what} ({type(error).__name__}: {shortened(said)}); fix the file."
        ) from error
    finally:
        logger.setLevel(level)
