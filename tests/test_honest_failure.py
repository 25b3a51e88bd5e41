"""What fails says so in one line, leaves its traceback in a file, stops nobody else, and is resumed by the same
command. Workers that the system kills: test_sweep.py; a W&B that does not answer: test_tracking.py."""

from pathlib import Path

from test_sweep import finish, records, start

EXHAUSTS = """
import os

import torch

from baselines.random import Random


class Exhausts(Random):
    def select(self, pool, budget, rng):
        if os.environ["MEMORY"] == "short":
            torch.ones(2**55)  # an exabyte and more
        return super().select(pool, budget, rng)
"""
NAME = "somebody/not-in-any-cache"


def failures(out: str, err: str) -> list[str]:
    """The line of every job that failed; each names a file with the traceback, and nothing else speaks of it."""
    found = [line for line in out.splitlines() if line.startswith("failed: ")]
    for line in found:
        assert "Traceback" in Path(line.split("traceback: ")[1].rstrip(")")).read_text()
    assert "Traceback" not in out + err
    return found


def test_lack_of_memory_ends_its_job_alone_and_the_same_command_resumes(tmp_path: Path, monkeypatch):
    (tmp_path / "exhausts.py").write_text(EXHAUSTS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    jobs = ("method=random", "pruning_rate=0.5", "method._target_=exhausts.Exhausts,baselines.random.Random")
    monkeypatch.setenv("MEMORY", "short")
    out, err = (sweep := start(tmp_path, *jobs)).communicate(timeout=300)
    assert sweep.returncode == 1 and "1 of 2 jobs failed; the same command runs what is missing" in out
    (failed,) = failures(out, err)
    assert "exhausts.Exhausts" in failed and "out of memory" in failed and "lower" in failed
    assert len(records(tmp_path)) == 1
    monkeypatch.setenv("MEMORY", "enough")
    said = finish(start(tmp_path, *jobs))
    assert len(records(tmp_path)) == 2 and said.count("recorded already") == 1


def test_a_hub_that_cannot_be_reached_is_one_line_and_ends_its_job_alone(tmp_path: Path, monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # where nothing listens
    targets = f"family.target.path={NAME},pkg://staff/assets/tiny/target"
    out, err = (sweep := start(tmp_path, "method=random", "pruning_rate=0.5", targets)).communicate(timeout=300)
    assert sweep.returncode == 1 and "1 of 2 jobs failed" in out
    (failed,) = failures(out, err)
    assert NAME in failed and "a local folder" in failed
    assert "Retry" not in out + err and "thrown while" not in out + err
    assert len(records(tmp_path)) == 1
