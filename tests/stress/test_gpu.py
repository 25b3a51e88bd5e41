"""Every piece of `make gpu` runs to its end on a processor, with shrunk shapes: some minutes."""

import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT

from experiments.benchmarks.gpu import PIECES
from experiments.sizes import FILE


def test_every_piece_runs_to_its_end_on_a_processor(tmp_path: Path):
    before = FILE.read_text()
    command = [sys.executable, "-m", "experiments.benchmarks.gpu", "--tiny"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in PIECES:
        told = json.loads((tmp_path / f"results/benchmarks/tiny/{name}.json").read_text())
        assert told["rows"] and told["tiny"] and "torch" in told["machine"], name
        assert not any(row.get("result") in ("failed", "does not fit", "no time left") for row in told["rows"]), (
            name
        )
    assert FILE.read_text() == before, "shrunk shapes are no measurement"
