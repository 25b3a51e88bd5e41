"""What the README shows works as written."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from conftest import ROOT, SMALL

README = (ROOT / "README.md").read_text()


def test_the_worked_example_of_a_method_runs_as_written(tmp_path: Path):
    for folder in ("staff", "baselines", "experiments", "conf"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (yaml,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    (tmp_path / "baselines/highest_loss.py").write_text(code)
    (tmp_path / "conf/method/highest_loss.yaml").write_text(yaml)
    command = [sys.executable, "-m", "experiments.run", "method=highest_loss", "tracking=none", *SMALL]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    (record,) = tmp_path.glob("results/runs/*highest_loss*/metrics.json")
    assert json.loads(record.read_text())["counts"]["selected"] == 6


def test_the_tree_and_the_method_table_are_complete():
    told = set(re.findall(r"^  (\w+\.py) ", README, re.MULTILINE))
    assert told == {file.name for file in (ROOT / "staff").glob("*.py")} - {"__init__.py"}
    for preset in (ROOT / "conf/method").glob("*.yaml"):
        assert f"`{preset.stem}`" in README
