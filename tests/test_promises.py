"""The list of promises names tests and mutations that are there, and everything that is required is pinned."""

import importlib.metadata
import re
import tomllib

import pytest
from conftest import ROOT
from mutations import MUTATIONS, Mutation
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROMISES = (ROOT / "tests/README.md").read_text()


def test_every_test_that_the_promises_name_is_there():
    named = re.findall(r"`((?:stress/)?test_\w+\.py)(?:::(test_\w+))?`", PROMISES)
    assert len(named) > 20
    for file, function in named:
        source = (ROOT / "tests" / file).read_text()
        assert not function or f"def {function}(" in source, (file, function)


def test_every_mutation_is_told_of():
    assert set(re.findall(r"\*([^*]+)\*", PROMISES)) == {mutation.name for mutation in MUTATIONS}


def test_the_test_of_every_mutation_is_there():
    for mutation in MUTATIONS:
        file, _, function = mutation.test.partition("::")
        assert f"def {function}(" in (ROOT / "tests" / file).read_text(), mutation.name


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


def test_every_pinned_package_is_listed_with_its_licence():
    pins = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    listed = re.findall(r"^\| (\S+) \| (\S+) \| (.+) \|$", (ROOT / "DEPENDENCIES.md").read_text(), re.MULTILINE)
    assert len(pins) > 100
    assert [(name, version) for name, version, licence in listed if licence != "UNKNOWN"][1:] == pins
