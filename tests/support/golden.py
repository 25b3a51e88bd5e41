"""Vectors recorded from released code: tests/golden/METHOD.npz, in which an array is named `case/array`.

python -m tests.support.golden FOLDER METHOD    # packs FOLDER/METHOD_CASE.npz, all of them, into that file
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).resolve().parents[1] / "golden"


def recorded(method: str, folder: Path = GOLDEN) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of every case of a method, by case and name."""
    cases: dict[str, dict[str, np.ndarray]] = {}
    with np.load(folder / f"{method}.npz", allow_pickle=False) as packed:
        for key in packed.files:
            case, _, name = key.rpartition("/")
            cases.setdefault(case, {})[name] = packed[key]
    return cases


def pack(folder: Path, method: str, into: Path = GOLDEN) -> Path:
    """Write every case of a method, a file METHOD_CASE.npz each in `folder`, to one file, and return that."""
    arrays = {}
    for file in sorted(folder.glob(f"{method}_*.npz")):
        with np.load(file, allow_pickle=False) as case:
            arrays |= {f"{file.stem.removeprefix(f'{method}_')}/{name}": case[name] for name in case.files}
    if not arrays:
        raise FileNotFoundError(f"{folder} has no {method}_*.npz")
    np.savez_compressed(packed := into / f"{method}.npz", **arrays)
    return packed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("method")
    arguments = parser.parse_args()
    print(pack(arguments.folder, arguments.method))
