"""What the READMEs show works as written."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from support import contract
import numpy as np
import pytest
from conftest import ROOT, SMALL
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import instantiate

import baselines
from staff import select
from staff.selection import SelectionMethod

README = (ROOT / "baselines/README.md").read_text()


def write_worked_example(root: Path) -> None:
    """Put both blocks of the worked example where the README says."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    (yaml,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    for name, text in (("baselines/highest_loss.py", code), ("conf/method/highest_loss.yaml", yaml)):
        assert f"`{name}`" in README
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)


@pytest.fixture
def worked_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SelectionMethod]:
    """The method as its configuration makes it, out of folders beside the real ones."""
    write_worked_example(tmp_path)
    monkeypatch.setattr(baselines, "__path__", [*baselines.__path__, str(tmp_path / "baselines")])
    overrides = ["method=highest_loss", f"hydra.searchpath=[file://{tmp_path / 'conf'}]"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield instantiate(compose("config", overrides=overrides).method, _convert_="all")
    del sys.modules["baselines.highest_loss"], baselines.highest_loss  # type: ignore[attr-defined]


def test_the_worked_example_of_a_method_keeps_the_contract_of_every_method(worked_example: SelectionMethod):
    for check in contract.OF_ANY_SCORES:
        for constant in (False, True):
            check(worked_example, constant)
    for check in contract.OTHERS:
        check(worked_example)
    pool = contract.AnyPool(150)
    hardest = np.argsort(-pool.scores("loss", "target"))[:15]
    assert select(pool, worked_example, pruning_rate=0.9).indices.tolist() == sorted(hardest)


def test_the_worked_example_of_a_method_runs_as_written(tmp_path: Path):
    for folder in ("staff", "baselines", "experiments", "conf"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    write_worked_example(tmp_path)
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


DOCUMENTS = [
    file for file in sorted(ROOT.glob("**/*.md")) if not set(file.parts) & {".venv", "node_modules", "build"}
]


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_link_in_a_document_leads_to_a_file(file: Path):
    links = re.findall(r"\]\(([^)\s]+)\)", file.read_text())
    local = [
        link.partition("#")[0] for link in links if "://" not in link and not link.startswith(("#", "mailto:"))
    ]
    assert [link for link in local if not (file.parent / link).exists()] == []


def commands() -> list[tuple[str, str]]:
    """Every line of every shell block in a README, with the file it stands in; continued lines as one."""
    files = [file for file in DOCUMENTS if file.name == "README.md"]
    blocks = [(file, block) for file in files for block in re.findall(r"```sh\n(.*?)```", file.read_text(), re.S)]
    lines = [(file, line) for file, block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [(str(file.relative_to(ROOT)), line) for file, line in lines if line.strip()]


def words(line: str) -> list[str]:
    """A command as the shell takes it apart, without the variables set for it."""
    script = f'words() {{ printf "%s\\0" "$@"; }}; words {line}'
    said = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True).stdout.split("\0")[
        :-1
    ]
    first = next(i for i, word in enumerate(said) if not re.match(r"[A-Z_]+=", word))
    return said[first:]


def settings(arguments: list[str]) -> list[list[str]]:
    """Overrides of as many jobs as the longest sweep among the arguments has values, each value named in one."""
    parsed = OverridesParser.create().parse_overrides([word for word in arguments if not word.startswith("-")])
    values = [
        [*o.sweep_string_iterator()] if o.is_sweep_override() else [o.get_value_element_as_str()] for o in parsed
    ]
    jobs = range(max(map(len, values), default=0))
    return [[f"{o.key_or_group}={v[min(job, len(v) - 1)]}" for o, v in zip(parsed, values)] for job in jobs]


@pytest.mark.parametrize(("file", "line"), commands())
def test_every_command_in_a_readme_is_one(file: str, line: str):
    program, *arguments = words(line)
    makefile = (ROOT / "Makefile").read_text()
    if program == "make":
        assert re.search(rf"^{arguments[0]}:", makefile, re.M)
    elif program in ("staff", "torchrun") or "experiments.run" in arguments:
        start = arguments.index("experiments.run") + 1 if program != "staff" else 0
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            for overrides in settings(arguments[start:]):
                compose("config", overrides=overrides, return_hydra_config=True)
    elif program == "python":
        module = ROOT / (arguments[1].replace(".", "/"))
        source = next(f for f in (module.with_suffix(".py"), module / "__main__.py") if f.is_file()).read_text()
        assert all(f'"{word}"' in source for word in arguments if word.startswith("--"))
    else:
        assert program in (".", "pip", "hf", "git"), f"{file}: {program}"
