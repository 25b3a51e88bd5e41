"""Vectors recorded from released code of selection methods: tests/golden/METHOD.npz, with keys `case|array`."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def recorded(method: str) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of every case that is packed for `method`."""
    cases: dict[str, dict[str, np.ndarray]] = defaultdict(dict)
    with np.load(GOLDEN / f"{method}.npz", allow_pickle=False) as packed:
        for key in packed.files:
            case, array = key.split("|")
            cases[case][array] = packed[key]
    return dict(cases)
