"""The properties of tests/support/fuzzing.py, each for MINUTES (3) with examples that nobody has seen."""

import os
import random
import time
from itertools import count
from pathlib import Path

import pytest
from support.fuzzing_files import PROPERTIES, fuzz

MINUTES = float(os.environ.get("MINUTES", "3"))
EXAMPLES = 500


@pytest.mark.parametrize("name", PROPERTIES)
def test_whatever_comes_in_for_minutes(name: str, tmp_path: Path):
    began, first = time.monotonic(), random.randrange(2**32)
    for turn in count():
        fuzz(name, tmp_path, EXAMPLES, start=first + turn)
        if time.monotonic() - began > 60 * MINUTES:
            print(f"{name}: {(turn + 1) * EXAMPLES} examples from seed {first}")
            return
