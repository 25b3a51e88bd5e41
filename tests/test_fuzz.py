"""Whatever comes in, a reader gives samples or one sentence, and a method selects its budget or says why not."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.fuzzing_files import PROPERTIES, fuzz

FINDS: list[tuple[str, dict[str, Any]]] = [
    ("a_listed_coreset_is_read_or_refused_in_a_sentence", {"file": (".json", b"58343"), "pool_size": None}),
    ("a_listed_coreset_is_read_or_refused_in_a_sentence", {"file": (".csv", b'"two\nlines",b\n'), "pool_size": 2}),
    (
        "a_file_gives_samples_or_a_sentence",
        {"content": b'{"two\\nlines": ""}', "prompt": "{question}", "answer": "{answer}", "settings": {}},
    ),
    (
        "an_exported_coreset_comes_back_and_stays_in_its_folder",
        {"samples": [("two\rlines", "a", "b"), ("=1+1", "a", "b"), ("'=1", "a", "b")], "talk": False},
    ),
    (
        "regions_hold_every_sample_once_and_no_budget_is_exceeded",
        {
            "scores": [3.2e16, -1.1e16, float(np.finfo(np.float32).max)],
            "num_regions": 49,
            "ratios": [np.nan, 1e-4, np.nan] + [1.0] * 17,
            "budget": 16,
            "as_the_authors": True,
        },
    ),
]
"""What fuzzing found, of each property."""


@pytest.mark.parametrize("name", PROPERTIES)
def test_whatever_comes_in(name: str, tmp_path: Path):
    fuzz(name, tmp_path, examples=40, start=0)


@pytest.mark.parametrize(("name", "values"), FINDS)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_what_fuzzing_found_stays_mended(name: str, values: dict[str, Any], tmp_path: Path):
    PROPERTIES[name][0](tmp_path, **values)
