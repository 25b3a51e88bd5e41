"""A report over ten thousand runs: in a minute of processor time, on a page that can be sent."""

from __future__ import annotations

import time
from pathlib import Path

from support.records import write_runs

from experiments.report.__main__ import write
from experiments.report.records import collect

METHODS = {"raw": -5.0, "full": 0.0, "random": 0.0, "staff": 1.0, **{f"own{i}": 0.1 * i for i in range(8)}}


def test_ten_thousand_runs_are_reported_in_a_minute_on_less_than_five_megabytes(tmp_path: Path):
    tasks, rates = ("dialogsum", "gsm8k", "bioinstruct", "wmt"), (0.2, 0.5, 0.7, 0.8, 0.9)
    write_runs(tmp_path, METHODS, ("small", "large"), tasks, rates, seeds=25, samples=100, pool=500)
    started = time.process_time()
    table = collect(tmp_path)
    assert len(table) > 10_000
    page = write(tmp_path, table)
    taken = time.process_time() - started
    print(f"{len(table):,} runs: {taken:.1f} s of processor time, {page.stat().st_size:,} bytes")
    assert taken < 60, f"{taken:.1f} s of processor time"
    assert page.stat().st_size < 5e6
