"""The wheel holds all that the commands need, also in a folder with packages of the same names."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT
from support.sweeps import SHRUNK

PACKAGES = ("staff", "baselines", "experiments", "hydra_plugins")
METHOD = """
from dataclasses import dataclass

import numpy as np

import experiments
from staff.selection import Coreset

@dataclass(frozen=True)
class First:
    def select(self, pool, budget, rng):
        return Coreset(np.arange(budget), notes=(experiments.__file__,))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """A folder with the packages, and bin/ with the commands."""
    folder = wheel.parent / "installed"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-cache-dir"]
    command = [*pip, "install", "--no-deps", "--no-index", "--target", folder, wheel]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder: a method of their own, and packages with our names that fail when they are imported."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("conf", "staff", "experiments", "baselines"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise ImportError('the package of the working folder')")
    (folder / "conf/method").mkdir()
    (folder / "conf/config.yaml").write_text("the: configuration of something else")
    (folder / "conf/method/mine.yaml").write_text("_target_: mymethod.First")
    (folder / "mymethod.py").write_text(METHOD)
    return folder


def command(name: str, *arguments: str, installed: Path, project: Path) -> str:
    """What a command prints that has to succeed."""
    done = subprocess.run(
        [sys.executable, installed / "bin" / name, *arguments],
        cwd=project,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_wheel_holds_every_file_of_the_packages_and_the_configuration_and_no_other(wheel: Path):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = [file for package in (*PACKAGES, "conf") for file in (ROOT / package).rglob("*") if file.is_file()]
    names = {file.relative_to(ROOT).as_posix() for file in files if file.suffix != ".pyc"}
    assert held == {f"experiments/{name}" if name.startswith("conf/") else name for name in names}
    assert held > {"experiments/conf/config.yaml", "staff/assets/tiny/target/config.json"}


def test_commands_run_from_the_wheel_with_a_method_of_the_working_folder(installed: Path, project: Path):
    assert "staff_official" in command("staff", "--help", installed=installed, project=project)
    sweep = ("-m", "--config-dir", "conf", "method=random,mine", "pruning_rate=0.5", "hydra/launcher=local")
    command("staff", *sweep, *SHRUNK, installed=installed, project=project)
    records = [json.loads(file.read_text()) for file in project.glob("results/runs/*/metrics.json")]
    coresets = {record["run"]["method"]: record["coreset"] for record in records}
    assert {method: coreset["size"] for method, coreset in coresets.items()} == {"mine": 8, "random": 8}
    assert coresets["mine"]["notes"] == [str(installed / "experiments/__init__.py")], "and not the checkout"

    command("staff-report", installed=installed, project=project)
    assert sorted(pd.read_csv(project / "results/metrics.csv")["method"]) == ["mine", "random"]
    assert (project / "results/report.html").stat().st_size > 10_000
