"""CSV files with ids from data, which a spreadsheet may open: none is taken for a formula or for two rows."""

from __future__ import annotations

import csv
import re

import pandas as pd

_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")


def csv_of(table: pd.DataFrame) -> str:
    """The text of a CSV file with the table, whose column `id` is made `inert`."""
    ids = table["id"].map(inert)
    # Python's csv leaves a carriage return alone, and splits the row there when it reads it.
    quoting = csv.QUOTE_NONNUMERIC if ids.str.contains("\r", regex=False).any() else csv.QUOTE_MINIMAL
    return table.assign(id=ids).to_csv(index=False, quoting=quoting)


def inert(text: str) -> str:
    """The text with an apostrophe before it, where a spreadsheet would run it as a formula."""
    return f"'{text}" if _FORMULA.match(text) and not _NUMBER.fullmatch(text) else text


def original(text: str) -> str:
    """The inverse of `inert`."""
    return text[1:] if text.startswith("'") and _FORMULA.match(text) else text
