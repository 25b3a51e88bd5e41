"""Text in the cells of CSV files, which spreadsheets must not take for formulas."""

from __future__ import annotations

import re

_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_INERT = re.compile(r"'+[=+\-@\t\r]")


def inert(text: str) -> str:
    """The text as a cell that no spreadsheet evaluates: an apostrophe before what could start a formula."""
    return f"'{text}" if _FORMULA.match(text) else text


def original(cell: str) -> str:
    """The text that `inert` made a cell of."""
    return cell[1:] if _INERT.match(cell) else cell
