"""The list of promises and the mutations that show them kept do not rot."""

import re

import pytest
from conftest import ROOT

from tests.mutations import MUTATIONS

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


def test_every_pinned_package_is_listed_with_its_licence():
    pins = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    listed = re.findall(r"^\| (\S+) \| (\S+) \| (.+) \|$", (ROOT / "DEPENDENCIES.md").read_text(), re.MULTILINE)
    assert len(pins) > 100
    assert [(name, version) for name, version, licence in listed if licence != "UNKNOWN"][1:] == pins
