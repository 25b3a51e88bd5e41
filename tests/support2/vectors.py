"""Recorded inputs and results of released code: one file a method, its arrays named `case|array`."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


@cache
def vectors(method: str) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of each case of tests/golden/METHOD.npz, by name."""
    cases: dict[str, dict[str, np.ndarray]] = {}
    with np.load(GOLDEN / f"{method}.npz", allow_pickle=False) as file:
        for key in file.files:
            case, name = key.split("|")
            cases.setdefault(case, {})[name] = file[key]
    return cases


def cases(method: str, *, starting: str = "") -> list[str]:
    return sorted(case for case in vectors(method) if case.startswith(starting))
