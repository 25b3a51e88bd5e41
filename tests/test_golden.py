"""Recorded vectors come back from their packed files as they were recorded."""

from pathlib import Path

import numpy as np
import pytest
from support.golden import GOLDEN, pack, recorded


def test_packed_vectors_are_those_of_the_single_files(tmp_path: Path):
    cases = {
        "N60_ties": {"score": np.float32([0.1, np.nan]), "note": np.array("the first of two"), "seed": np.array(7)},
        "N60": {"score": np.float32([3]), "coreset": np.array([], np.int64)},
    }
    for case, arrays in cases.items():
        np.savez(tmp_path / f"ccs_{case}.npz", **arrays)
    np.savez(tmp_path / "ccs2_N60.npz", score=np.zeros(1))
    pack(tmp_path, "ccs", tmp_path)
    again = recorded("ccs", tmp_path)
    assert again.keys() == cases.keys()
    for case, arrays in cases.items():
        assert again[case].keys() == arrays.keys()
        for name, array in arrays.items():
            assert again[case][name].dtype == array.dtype
            np.testing.assert_array_equal(again[case][name], array)


def test_a_method_without_vectors_is_refused(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"has no ccs_\*\.npz"):
        pack(tmp_path, "ccs", tmp_path)


@pytest.mark.parametrize("file", sorted(GOLDEN.glob("*.npz")), ids=lambda file: file.stem)
def test_every_packed_file_holds_named_cases(file: Path):
    assert all(case and arrays for case, arrays in recorded(file.stem).items())
