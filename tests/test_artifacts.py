"""The store: computed once, read whole or not at all, charged to every reader."""

import json
import logging
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.processes import Clock, Job, never

from staff.store import cost
from staff.store.cost import Cost
from staff.store.store import Store

KEY = {"model": "tiny", "seed": 0, "finetune": {"lr": 1e-4, "modules": ["q_proj", "v_proj"], "note": None}}
SCORES = Job(KEY)


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


# The fingerprint


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("scores", {"model": "smollm2"}),
        ("scores", {"seed": 1}),
        ("scores", {"seed": False}),
        ("scores", {"finetune": KEY["finetune"] | {"lr": 1.0000000001e-4}}),
        ("scores", {"finetune": KEY["finetune"] | {"modules": ["v_proj", "q_proj"]}}),
        ("scores", {"extra": None}),
        ("finetune", {}),
    ],
)
def test_a_changed_field_gives_another_fingerprint(kind, change):
    assert Job(KEY | change, kind=kind).fingerprint != SCORES.fingerprint


def test_a_new_version_of_a_stage_gives_it_and_all_that_rests_on_it_another_fingerprint():
    model, newer = Job({}, kind="finetune"), Job({}, kind="finetune", version=2)
    assert len({replace(SCORES, inputs=inputs).fingerprint for inputs in ((), (model,), (newer,))}) == 3
    assert replace(SCORES, version=99).fingerprint != SCORES.fingerprint


def test_the_same_key_has_the_same_fingerprint_in_any_order_process_and_hash_seed():
    assert Job(dict(reversed(KEY.items()))).fingerprint == SCORES.fingerprint
    script = f"from support.processes import Job; print(Job({KEY!r}).fingerprint, end='')"
    tests = Path(__file__).parent
    for seed in ("0", "1"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": f"{tests.parent}:{tests}"}
        said = subprocess.check_output([sys.executable, "-c", script], env=environment, text=True)
        assert said == SCORES.fingerprint


@pytest.mark.parametrize("value", [(1, 2), Path("x"), {1}, b"x", float("nan"), float("inf")])
def test_a_key_that_json_does_not_hold_is_refused_by_name(store, value):
    with pytest.raises(TypeError, match=r"scores key\.finetune\.bad\[1\] is "):
        store.get(Job({"finetune": {"bad": [0, value]}}, never))
    with pytest.raises(TypeError, match="has the name 1"):
        _ = Job({1: "x"}).fingerprint
    assert not store.root.exists()


# Computed once, read for ever


def test_an_artefact_is_computed_once_and_read_afterwards(store):
    made = store.get(SCORES)
    again = Store(store.root)
    read = again.get(Job(dict(reversed(KEY.items())), never))
    assert (made.computed, read.computed) == (True, False)
    assert (store.computed, again.computed) == ({SCORES.fingerprint}, set())
    assert read.path == made.path == store.folder(SCORES) == store.root / "scores" / made.fingerprint[:32]
    assert (read.path / "scores.json").read_text() == "[1, 2]"
    assert not list((store.root / "tmp").iterdir())


def test_what_is_only_looked_for_is_neither_computed_nor_an_input(store):
    assert store.find(Job(KEY, never)) is None
    made = store.get(SCORES)
    coreset = store.get(Job({}, lambda folder, meter: store.find(SCORES), "coreset"))
    assert store.find(SCORES) == replace(made, computed=False) and coreset.inputs == {}


def test_a_reader_is_charged_what_the_maker_was_to_the_digit(store):
    made, read = store.get(SCORES), store.get(Job(KEY, never))
    assert read.charged() == made.charged() == {made.fingerprint: ("scores", "effort", made.cost)}
    assert (made.cost.flops, made.cost.tokens_forward, made.cost.tokens_backward) == (3.5e9, 20, 10)
    assert made.cost.seconds > 0


def test_the_manifest_tells_what_it_is_and_what_it_took(store):
    store.workers = 3
    artefact = store.get(replace(SCORES, version=5))
    manifest = json.loads((artefact.path / "manifest.json").read_text())
    assert manifest["stage"] == "scores" and manifest["key"] == KEY and manifest["workers"] == 3
    assert manifest["version"] == 5 and manifest["label"] == "effort"
    assert manifest["fingerprint"] == artefact.fingerprint
    assert manifest["files"] == {
        "scores.json": {
            "size": 6,
            "sha256": "3a316d6d3226f84c1e46e4447fa8d5fd800bff4a1bc6498152523cd4a602b69b",
        }
    }
    assert Cost.from_dict(manifest["cost"]) == artefact.cost
    assert {"python", "numpy", "torch"} <= manifest["versions"].keys()


def test_an_exception_in_a_stage_is_raised_and_publishes_nothing(store):
    def fail(folder, meter):
        (folder / "scores.json").write_text("[1")
        raise ZeroDivisionError("loss is gone")

    with pytest.raises(ZeroDivisionError, match="loss is gone"):
        store.get(Job(KEY, fail))
    assert not (store.root / "scores").exists() and not list((store.root / "tmp").iterdir())
    assert store.get(SCORES).computed


def test_publication_is_one_rename_of_a_complete_folder(store, monkeypatch):
    renames = []
    real = os.rename

    def watched(source, target):
        assert not Path(target).exists()
        renames.append((sorted(file.name for file in Path(source).iterdir()), Path(target)))
        real(source, target)

    monkeypatch.setattr(os, "rename", watched)
    artefact = store.get(SCORES)
    assert renames == [(["manifest.json", "scores.json"], artefact.path)]


def test_each_get_says_what_happened(store, caplog):
    caplog.set_level(logging.INFO, "staff.store.store")
    name = store.get(SCORES).fingerprint[:8]
    store.get(Job(KEY, never))  # known: not said again
    Store(store.root).get(Job(KEY, never))
    made, read = caplog.messages
    assert re.fullmatch(rf"effort \(scores {name}\): computed in \d+\.\d s", made)
    assert read == made.replace("computed in", "read (cost") + ")"


# Inputs and what they are charged


def chain(store, sleep=lambda seconds: None):
    """A coreset from two scorings that it asks for as it works; both have one fine-tuned model as their input."""

    def working(seconds, flops, *asked):
        def work(folder, meter):
            sleep(seconds)
            for stage in asked:
                store.get(stage)
            meter.add(flops=flops)

        return work

    model = Job({"seed": 0}, working(5.0, 100), "finetune")
    effort, el2n = (Job({"signal": s}, working(2.0, 10), inputs=(model,)) for s in ("effort", "el2n"))
    return store.get(Job({"method": "staff"}, working(0.5, 1, effort, el2n, effort), "coreset"))


def test_inputs_are_recorded_transitively_and_each_is_charged_once(store):
    charged = chain(store).charged()
    assert sorted(charge.stage for charge in charged.values()) == ["coreset", "finetune", "scores", "scores"]
    assert sum((charge.cost for charge in charged.values()), Cost.zero()).flops == 121
    assert chain(Store(store.root)).charged() == charged


def test_an_input_that_was_there_already_is_charged_all_the_same(store, tmp_path):
    cold = chain(Store(tmp_path / "other"))
    store.get(Job({"seed": 0}, lambda folder, meter: meter.add(flops=100), "finetune"))
    warm = chain(store)
    flops = [{name: charge.cost.flops for name, charge in run.charged().items()} for run in (cold, warm)]
    assert flops[0] == flops[1]


def test_the_results_of_inputs_are_given_to_the_stage_in_their_order(store):
    given = []

    class Reads(Job):
        def run(self, folder, meter, *inputs):
            given.extend((artifact.stage, artifact.computed) for artifact in inputs)

    model = Job({}, kind="finetune")
    store.get(SCORES)
    store.get(Reads({}, inputs=(SCORES, model), kind="coreset"))
    assert given == [("scores", False), ("finetune", True)]


def test_the_seconds_of_inputs_are_not_in_the_seconds_of_what_reads_them(store, monkeypatch):
    monkeypatch.setattr(cost, "time", clock := Clock())
    charged = chain(store, clock.sleep).charged()
    seconds = {charge.stage: charge.cost.seconds for charge in charged.values()}
    assert seconds == {"finetune": 5.0, "scores": 2.0, "coreset": 0.5} and clock.now == 9.5


def test_what_failed_is_no_input(store):
    def fail(folder, meter):
        raise ZeroDivisionError

    def coreset(folder, meter):
        with pytest.raises(ZeroDivisionError):
            store.get(Job(KEY, fail))

    assert store.get(Job({}, coreset, "coreset")).inputs == {}


def test_an_artefact_that_asks_for_itself_is_an_error_not_a_deadlock(store):
    with pytest.raises(RuntimeError, match="asks for itself"):
        store.get(Job(KEY, lambda folder, meter: store.get(SCORES)))
