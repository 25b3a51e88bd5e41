"""The list of promises and the mutations that show them kept do not rot."""

import importlib.metadata
import re

import pytest
from conftest import ROOT
from mutations import MUTATIONS
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


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_mutation_still_finds_its_place_and_its_test(mutation):
    assert (ROOT / mutation.file).read_text().count(mutation.old) == 1
    file, _, function = mutation.test.partition("::")
    assert f"def {function}(" in (ROOT / file).read_text()


def required(*extras: str) -> set[str]:
    """What the package asks for with these extras, and what that asks for in turn, as far as it is installed."""
    found, left = set(), [Requirement(f"staff-coresets[{','.join(extras)}]")]
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
    return {name for name, _ in found} - {"staff-coresets"}


def test_everything_that_is_required_is_pinned():
    pins = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    unpinned = required("dev", "parallel", "qlora", "gguf") - {canonicalize_name(name) for name in pins}
    of_torch = ("nvidia-", "cuda-", "triton")  # of its builds for GPUs, by versions that it names itself
    assert not {name for name in unpinned if not name.startswith(of_torch)}


def test_every_pinned_package_is_listed_with_its_licence():
    pins = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    listed = re.findall(r"^\| (\S+) \| (\S+) \| (.+) \|$", (ROOT / "DEPENDENCIES.md").read_text(), re.MULTILINE)
    assert len(pins) > 100
    assert [(name, version) for name, version, licence in listed if licence != "UNKNOWN"][1:] == pins
