"""Promises name tests and mutations that are there; requirements are pinned, and the wheel holds what runs need."""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from datetime import datetime
from pathlib import Path

import pandas as pd
import pytest
from conftest import ROOT
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from mutations import MUTATIONS
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from support.mutating import Mutation
from support.processes import SHRUNK

from staff.models.weights import attention_of

# ---------------------------------------------------------------- promises, pins and licences


PROMISES = (ROOT / "tests/README.md").read_text()


def test_every_test_that_the_promises_name_is_there():
    named = re.findall(r"`((?:stress/)?test_\w+\.py)(?:::(test_\w+))?`", PROMISES)
    assert len(named) > 20
    for file, function in named:
        source = (ROOT / "tests" / file).read_text()
        assert not function or f"def {function}(" in source, (file, function)


def test_every_promise_names_a_test_and_a_mutation_unless_it_is_tested_by_stress_alone():
    for promise in re.findall(r"^- .*$", PROMISES, re.M):
        files = re.findall(r"`((?:stress/)?)test_\w+\.py", promise)
        assert files and (all(files) or re.search(r"\*[^*]+\*$", promise)), promise


def test_every_mutation_is_named():
    assert set(re.findall(r"\*([^*]+)\*", PROMISES)) == {mutation.name for mutation in MUTATIONS}


def test_the_test_of_every_mutation_is_there():
    for mutation in MUTATIONS:
        file, _, function = mutation.test.partition("::")
        assert f"def {function}(" in (ROOT / "tests" / file).read_text(), mutation.name


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_every_mutation_has_its_place_in_the_source(mutation: Mutation):
    source = (ROOT / mutation.file).read_text("utf-8")
    compile(changed := mutation.applied(source), mutation.file, "exec")
    assert changed != source


def test_a_mutation_changes_one_function_and_refuses_where_it_would_change_none():
    source = "def a():\n    return 1\n\n\nclass B:\n    def a(self):\n        'One.'\n        return 1\n"
    changed = Mutation("", "file:B.a", "", old="return 1", new="return 2").applied(source)
    assert changed == source[::-1].replace("1", "2", 1)[::-1]
    assert Mutation("", "file:a", "", new="pass").applied(source) == source.replace("return 1", "pass", 1)
    for place, old in (("file:b", ""), ("file:a", "return 2")):
        with pytest.raises(LookupError):
            Mutation("", place, "", old=old, new="pass").applied(source)


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def required() -> set[str]:
    """What the project asks for with all its extras, and what that asks for in turn, as far as it is installed."""
    left = [Requirement(text) for texts in (PROJECT["dependencies"], *EXTRAS.values()) for text in texts]
    found: set[tuple[str, frozenset[str]]] = set()
    while left:
        wanted = left.pop()
        this = (canonicalize_name(wanted.name), frozenset(wanted.extras))
        if this in found:
            continue
        found.add(this)
        try:
            asked = importlib.metadata.requires(wanted.name) or []
        except importlib.metadata.PackageNotFoundError:  # an extra that this machine does without
            continue
        for requirement in map(Requirement, asked):
            environments = [{"extra": extra} for extra in ("", *wanted.extras)]
            if not requirement.marker or any(map(requirement.marker.evaluate, environments)):
                left.append(requirement)
    return {name for name, _ in found}


def test_everything_that_is_required_is_pinned():
    pins = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    unpinned = required() - {canonicalize_name(name) for name in pins}
    of_torch = ("nvidia-", "cuda-", "triton")  # of its builds for GPUs, by versions that it names itself
    assert not {name for name in unpinned if not name.startswith(of_torch)}


def test_the_version_is_the_same_wherever_it_stands():
    (cited,) = re.findall(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    latest = re.findall(r"^## (\d.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[0]
    assert PROJECT["version"] == cited == latest


def test_the_extras_that_make_installs_are_there():
    """pip only warns of one that is not."""
    (extras,) = re.findall(r"--editable '\.\[(.*)\]'", (ROOT / "Makefile").read_text())
    assert set(extras.split(",")) <= EXTRAS.keys()


def test_every_pinned_package_names_its_licence():
    pins = re.findall(r"^[\w.-]+==.*$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    licences = [re.search(r"^[\w.-]+==\S+  # (\S.*)$", pin) for pin in pins]
    assert len(pins) > 100
    assert not [pin for pin, licence in zip(pins, licences) if licence is None or "UNKNOWN" in licence[1]]


# ---------------------------------------------------------------- private parts of other libraries


def test_hydras_sweeper_splits_overrides_into_jobs_as_it_does_in_a_sweep():
    parsed = OverridesParser.create().parse_overrides(["method=a,b", "seed=0,1"])
    (jobs,) = BasicSweeper.split_arguments(parsed, max_batch_size=None)
    assert [" ".join(job) for job in jobs] == [
        "method=a seed=0",
        "method=a seed=1",
        "method=b seed=0",
        "method=b seed=1",
    ]


def test_a_failed_job_of_hydras_keeps_its_error_where_it_can_be_read_without_raising():
    failed = JobReturn(status=JobStatus.FAILED)
    failed.return_value = ValueError("said")
    assert isinstance(failed._return_value, ValueError)
    with pytest.raises(ValueError, match="said"):
        _ = failed.return_value


def test_a_chat_template_reads_the_date_from_the_globals_of_its_compiled_form():
    from transformers.utils.chat_template_utils import _compile_jinja_template, render_jinja_template

    template = "{{ strftime_now('%Y') }}"
    _compile_jinja_template(template).globals["strftime_now"] = datetime(1999, 1, 1).strftime
    rendered, _ = render_jinja_template([[{"role": "user", "content": "x"}]], chat_template=template)
    assert rendered == ["1999"]


def test_wandb_finds_credentials_without_asking(monkeypatch: pytest.MonkeyPatch):
    from wandb.sdk.lib import wbauth

    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    found = wbauth.authenticate_session(
        host="http://localhost:1", source="test", prompt=False, update_session=False
    )
    assert found is None


def test_wandb_writes_offline_files_as_often_as_it_is_told():
    """The format of these files: test_mirror.py reads it."""
    import wandb

    assert wandb.Settings.model_fields["x_transaction_log_flush_interval"].default == 15.0


def test_transformers_names_the_attention_of_a_model_and_marks_one_that_is_sharded():
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.distributed import fsdp

    config = AutoConfig.for_model("llama", hidden_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=9)
    for attention in ("eager", "sdpa"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
        assert attention_of(model.config) == attention
    assert "model._is_fsdp_managed_module = True" in inspect.getsource(fsdp)


def test_a_mixture_of_experts_takes_its_implementation_from_the_configuration():
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model("mixtral", vocab_size=50, num_local_experts=2, num_key_value_heads=2, **shape)
    config._experts_implementation = "batched_mm"
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    assert model.config._experts_implementation == "batched_mm"


# ---------------------------------------------------------------- the wheel


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
    command = [*pip, "install", "--no-compile", "--no-deps", "--no-index", "--target", folder, wheel]
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
