"""Reading the rows of data files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from staff.errors import UserError


def read_json_lines(path: Path) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """The rows of a JSON Lines file, each with its place ("file, line n") for messages. Blank lines are skipped.

    Raises:
        UserError: the file is missing, or a line is not a JSON object in UTF-8.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: task.data_dir must be a folder with {path.name}.")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: not UTF-8 (byte {error.start}); convert the file to UTF-8.") from None
            except (ValueError, RecursionError) as error:  # also for a number of thousands of digits
                said = "nested too deep" if isinstance(error, RecursionError) else str(error)
                said = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else said
                raise UserError(f"{where}: not JSON ({said}); each line must be one JSON object.") from None
            if not isinstance(row, dict):
                raise UserError(f"{where}: a {type(row).__name__}, not an object; each line must be {{...}}.")
            yield where, row
