"""A sweep killed thirty times at random moments, and started again each time, ends as one that was left alone."""

import os
import random
import signal
import time
from pathlib import Path

from support.sweeps import PARALLEL, check_left_behind, check_store, finish, kill, records, stages, start

GRID = ("method=random,ccs,d2,staff", "pruning_rate=0.5,0.75", "seed=0,1", *PARALLEL)
KILLS = int(os.environ.get("KILLS", "30"))


def test_a_sweep_killed_at_random_moments_ends_with_the_records_of_an_undisturbed_one(tmp_path: Path):
    began = time.monotonic()
    finish(start(tmp_path / "undisturbed", *GRID))
    whole = time.monotonic() - began
    results, late = tmp_path / "killed", 0
    seed = random.randrange(2**32)
    print(f"undisturbed: {whole:.0f} s; seed {seed}")
    draw = random.Random(seed)
    for turn in range(KILLS):
        how, everyone = draw.choice([signal.SIGKILL, signal.SIGTERM]), draw.random() < 0.7
        late += not kill(start(results, *GRID), how, draw.uniform(2, whole / 2), everyone)
        check_store(results)
        print(
            f"{turn + 1}: {how.name}, {'all' if everyone else 'the parent alone'}, {len(records(results))} records"
        )
        if len(records(results)) == 16:  # begin anew, so that there is something to kill
            assert records(results) == records(tmp_path / "undisturbed")
            results = tmp_path / f"killed {turn}"
    said = finish(start(results, *GRID))
    assert "failed" not in said and records(results) == records(tmp_path / "undisturbed")
    assert stages(results) == stages(tmp_path / "undisturbed")
    check_left_behind(results)
    print(f"{late} kills came too late")
