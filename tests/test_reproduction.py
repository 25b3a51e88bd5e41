"""What was committed comes out again."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from experiments.compare import MACHINE, compare
from experiments.recorded import recorded_runs

SLICE = ROOT / "results" / "slice"


@pytest.fixture(scope="module")
def again(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The committed slice, made from nothing by the settings that `make slice` has."""
    results = tmp_path_factory.mktemp("again")
    (settings,) = re.findall(r"^SLICE = ((?:.*\\\n)*.*)", (ROOT / "Makefile").read_text(), re.M)
    arguments = [*shlex.split(settings.replace("\\\n", " ")), f"results_dir={results}"]
    subprocess.run([sys.executable, "-m", "experiments.run", *arguments], cwd=ROOT, check=True, capture_output=True)
    return results


def command(first: Path, second: Path, *options: str) -> subprocess.CompletedProcess:
    arguments = [sys.executable, "-m", "experiments.compare", str(first), str(second), *options]
    return subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)


def test_the_committed_slice_comes_out_equal_on_the_same_kind_of_machine(again: Path):
    table = compare(SLICE, again).set_index("run")
    assert len(table) == 2 and table["equal"].notna().all(), table
    here = [next(iter(recorded_runs(results).values())).record()["provenance"] for results in (SLICE, again)]
    if all(here[0][part] == here[1][part] for part in MACHINE):
        assert table["equal"].all(), table
        assert command(SLICE, again).returncode == 0
    random = next(run for run in table.index if "-random-" in run)
    assert table.loc[random, "jaccard"] == 1, "what is drawn at random depends on no processor"
    assert (table["jaccard"] > 0.8).all(), table


def test_a_comparison_names_runs_that_differ_and_runs_that_are_missing(again: Path, tmp_path: Path):
    first, second = tmp_path / "first", tmp_path / "second"
    for copy in (first, second):
        shutil.copytree(again / "runs", copy / "runs")
    assert command(first, second).returncode == 0
    changed, gone = sorted((second / "runs").glob("*/metrics.json"))[:2]
    record = json.loads(changed.read_text())
    record["metrics"]["rougeL"] += 1e-9
    changed.write_text(json.dumps(record))
    gone.unlink()
    table = compare(first, second).set_index("run")
    assert table.loc[changed.parent.name, "equal"] == False and table["equal"].isna().sum() == 1  # noqa: E712
    said = command(first, second)
    assert said.returncode == 1 and "0 of 2 runs equal, 1 not made again" in said.stdout
    assert len(compare(first, second, part=True)) == 1, "a part of the runs is compared by itself"
    said = command(second, first, "--part")
    assert said.returncode == 1 and f"1 not in {second}" in said.stdout

    record["provenance"]["cpu"] = "another"
    changed.write_text(json.dumps(record))
    assert compare(first, second).set_index("run").loc[changed.parent.name, "machine"] == False  # noqa: E712


def test_a_comparison_with_nothing_is_refused(tmp_path: Path):
    said = command(tmp_path, tmp_path)
    assert said.returncode == 1 and "holds no record" in said.stderr
