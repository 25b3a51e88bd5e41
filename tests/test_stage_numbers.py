"""Stored results are found by the version of the code that computed them, so other numbers need a new version.

A small slice of every stage is computed again and compared with committed numbers. After raising a version
or adding a stage, a signal, a method or a metric, record them again with

    python -m tests.test_stage_numbers

which refuses while numbers changed without a new version, or a version without the numbers. Other processors round
otherwise: numbers that are not whole may differ by `TOLERANCE`.
"""

from __future__ import annotations

import inspect
import json
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent))  # as pytest does

import pytest
import torch
from support.stage_numbers import differences, name_of, slices

from staff.evaluation.metrics.rouge import Rouge
from staff.pool import Select
from staff.scoring.stage import Score
from staff.signals.effort import Effort
from staff.signals.loss import Loss
from staff.speculative import Staff
from staff.store.stage import Stage

RECORD = Path(__file__).with_name("golden") / "stage_numbers.json"
COMMAND = "python -m tests.test_stage_numbers"
TOLERANCE = 1e-4
Record = dict[str, Any]


def computed(wanted: Callable[[str], bool] = lambda name: True) -> Record:
    """The versions of all classes that state one, and the numbers of the slices of these names, as a processor with
    one thread computes them."""
    torch.set_num_threads(1)
    record: Record = {"versions": {}, "slices": {}}
    with tempfile.TemporaryDirectory() as given, patch("torch.cuda.is_available", lambda: False):
        for name, each in slices(Path(given)):
            record["versions"] |= each.versions
            if wanted(name):
                with tempfile.TemporaryDirectory() as folder:
                    numbers = each.numbers(Path(folder))
                record["slices"][name] = {"of": list(each.versions), "numbers": numbers}
    return record


def recorded() -> Record:
    return json.loads(RECORD.read_text("utf-8")) if RECORD.exists() else {"versions": {}, "slices": {}}


def changed_slices(before: Record, now: Record) -> dict[str, list[str]]:
    """The slices whose numbers are others, and where."""
    both = before["slices"].keys() & now["slices"].keys()
    found = {
        name: differences(before["slices"][name]["numbers"], now["slices"][name]["numbers"], TOLERANCE)
        for name in sorted(both)
    }
    return {name: places for name, places in found.items() if places}


def faults(before: Record, now: Record) -> list[str]:
    """A sentence for every slice with other numbers of which no class has a new version, and for every new version
    of a class of which no slice has other numbers. `now` may hold some of the slices alone."""
    changed, sentences = changed_slices(before, now), []
    raised = {name for name, version in now["versions"].items() if version > before["versions"].get(name, version)}
    for name, places in changed.items():
        owners = now["slices"][name]["of"]
        if not raised & set(owners):
            where = f"{places[0].lstrip('.')}, {len(places)} in all" if len(places) > 1 else places[0].lstrip(".")
            raise_it = f"raise `version` of {' or '.join(owners)}, then run {COMMAND}"
            sentences.append(f"the numbers of {name!r} are others ({where}): {raise_it}")
    for owner in sorted(raised):
        if not any(owner in now["slices"][name]["of"] for name in changed):
            old, new = before["versions"][owner], now["versions"][owner]
            sentences.append(
                f"`version` of {owner} was raised from {old} to {new}, and no number changed: lower it"
            )
    return sentences


@pytest.fixture(scope="module")
def now() -> Record:
    return computed()


def test_other_numbers_have_a_new_version_and_a_new_version_other_numbers(now: Record):
    assert not faults(recorded(), now)


def test_the_record_is_up_to_date(now: Record):
    before = recorded()
    assert before["versions"] == now["versions"], f"run {COMMAND}"
    assert before["slices"].keys() == now["slices"].keys() and not changed_slices(before, now), f"run {COMMAND}"


def concrete(kind: type) -> Iterable[type]:
    for sub in kind.__subclasses__():
        yield from concrete(sub)
        if not inspect.isabstract(sub) and sub.__module__.startswith("staff."):
            yield sub


def test_every_stage_of_the_library_has_a_slice(now: Record):
    kinds = {name.split(" ")[0] for name in now["slices"]}
    assert {kind.kind for kind in concrete(Stage) if hasattr(kind, "kind")} == kinds  # type: ignore[attr-defined]


# The guard itself, on what is recorded


def test_a_stage_that_computes_other_numbers_is_named_until_it_has_a_new_version(monkeypatch: pytest.MonkeyPatch):
    compute = Loss.compute
    monkeypatch.setattr(Loss, "compute", lambda self, batch: 1.001 * compute(self, batch))
    losses = computed(lambda name: name.startswith("scores loss"))
    assert len(losses["slices"]) == 3
    for sentence in faults(recorded(), losses):
        assert "of 'scores loss" in sentence
        assert f"raise `version` of {name_of(Score)} or {name_of(Loss)}, then run python -m" in sentence
    assert len(faults(recorded(), losses)) == 3
    for owner in map(name_of, (Loss, Score)):
        assert not faults(recorded(), {**losses, "versions": {**losses["versions"], owner: 9}})
    assert len(faults(recorded(), {**losses, "versions": {**losses["versions"], name_of(Effort): 9}})) == 4


@pytest.mark.parametrize("kind", [Loss, Score, Staff, Rouge])
def test_a_version_that_was_raised_for_nothing_is_named(monkeypatch: pytest.MonkeyPatch, kind: Any):
    version = kind.version
    monkeypatch.setattr(kind, "version", version + 1)
    (sentence,) = faults(recorded(), computed(lambda name: name == "scores loss"))
    assert sentence == (
        f"`version` of {name_of(kind)} was raised from {version} to {version + 1}, and no number changed: lower it"
    )


def test_a_method_that_chooses_others_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Staff, "pick_from", lambda self, members, speculative, count, rng: members[:count])
    (sentence,) = faults(recorded(), computed("coreset staff".__eq__))
    assert "'coreset staff'" in sentence and f"raise `version` of {name_of(Select)} or {name_of(Staff)}" in sentence


def test_rounding_and_new_slices_are_no_fault():
    before = {"versions": {"Score": 1}, "slices": {"a": {"of": ["Score"], "numbers": {"sum": 1.0, "first": [3]}}}}
    rounded = {"of": ["Score"], "numbers": {"sum": 1.00005, "first": [3]}}
    assert not faults(before, {"versions": {"Score": 1, "New": 1}, "slices": {"a": rounded, "b": {"of": ["New"]}}})
    for other in (
        {"sum": 1.001, "first": [3]},
        {"sum": 1.0, "first": [4]},
        {"sum": 1.0},
        {"sum": 1.0, "first": []},
    ):
        assert faults(before, {**before, "slices": {"a": {"of": ["Score"], "numbers": other}}})


if __name__ == "__main__":
    if sentences := faults(recorded(), state := computed()):
        sys.exit("\n".join(sentences))
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(each)}" for name, each in state["slices"].items())
    text = f'{{"versions": {json.dumps(state["versions"])},\n"slices": {{\n{lines}\n}}}}\n'
    RECORD.write_text(text, "utf-8")
