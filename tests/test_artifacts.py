"""The store: computed once, read whole or not at all, charged to every reader."""

import json
import logging
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from staff import artifacts
from staff.artifacts import Store
from staff.cost import Cost

KEY = {"model": "tiny", "seed": 0, "finetune": {"lr": 1e-4, "modules": ["q_proj", "v_proj"], "note": None}}


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


def write_scores(folder, meter):
    (folder / "scores.json").write_text("[1, 2]")
    meter.add(flops=3.5e9, tokens_forward=20, tokens_backward=10)


def never(folder, meter):
    raise AssertionError("made a second time")


# The fingerprint


@pytest.mark.parametrize(
    ("stage", "change"),
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
def test_a_changed_field_gives_another_fingerprint(stage, change):
    assert Store.fingerprint(stage, KEY | change) != Store.fingerprint("scores", KEY)


def test_a_new_version_of_a_stage_gives_another_fingerprint(monkeypatch):
    before = Store.fingerprint("scores", KEY), Store.fingerprint("finetune", KEY)
    monkeypatch.setitem(artifacts.STAGE_VERSIONS, "scores", 99)
    assert Store.fingerprint("scores", KEY) != before[0]
    assert Store.fingerprint("finetune", KEY) == before[1]


def test_the_same_key_has_the_same_fingerprint_in_any_order_process_and_hash_seed():
    expected = Store.fingerprint("scores", dict(reversed(KEY.items())))
    script = f"from staff.artifacts import Store; print(Store.fingerprint('scores', {KEY!r}), end='')"
    for seed in ("0", "1"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        assert subprocess.check_output([sys.executable, "-c", script], env=environment, text=True) == expected


@pytest.mark.parametrize("value", [(1, 2), Path("x"), {1}, b"x", float("nan"), float("inf")])
def test_a_key_that_json_does_not_hold_is_refused_by_name(store, value):
    with pytest.raises(TypeError, match=r"scores key\.finetune\.bad\[1\] is "):
        store.get("scores", {"finetune": {"bad": [0, value]}}, never)
    with pytest.raises(TypeError, match="has the name 1"):
        store.fingerprint("scores", {1: "x"})
    assert not store.root.exists()


# Made once, read for ever


def test_an_artefact_is_made_once_and_read_afterwards(store):
    made = store.get("scores", KEY, write_scores)
    read = Store(store.root).get("scores", dict(reversed(KEY.items())), never)
    assert (made.computed, read.computed) == (True, False)
    assert read.path == made.path == store.root / "scores" / made.fingerprint[:32]
    assert (read.path / "scores.json").read_text() == "[1, 2]"
    assert not list((store.root / "tmp").iterdir())


def test_a_reader_is_charged_what_the_maker_was_to_the_digit(store):
    made = store.get("scores", KEY, write_scores)
    read = store.get("scores", KEY, never)
    assert read.charged() == made.charged() == {made.fingerprint: ("scores", "", made.cost)}
    assert (made.cost.flops, made.cost.tokens_forward, made.cost.tokens_backward) == (3.5e9, 20, 10)
    assert made.cost.seconds > 0


def test_the_manifest_tells_what_it_is_and_what_it_took(store):
    store.workers = 3
    artefact = store.get("scores", KEY, write_scores)
    manifest = json.loads((artefact.path / "manifest.json").read_text())
    assert manifest["stage"] == "scores" and manifest["key"] == KEY and manifest["workers"] == 3
    assert manifest["version"] == artifacts.STAGE_VERSIONS["scores"]
    assert manifest["fingerprint"] == artefact.fingerprint
    assert manifest["files"] == {
        "scores.json": {
            "size": 6,
            "sha256": "3a316d6d3226f84c1e46e4447fa8d5fd800bff4a1bc6498152523cd4a602b69b",
        }
    }
    assert Cost.from_dict(manifest["cost"]) == artefact.cost
    assert {"python", "numpy", "torch"} <= manifest["versions"].keys()


def test_an_exception_in_make_is_raised_and_publishes_nothing(store):
    def fail(folder, meter):
        (folder / "scores.json").write_text("[1")
        raise ZeroDivisionError("loss is gone")

    with pytest.raises(ZeroDivisionError, match="loss is gone"):
        store.get("scores", KEY, fail)
    assert not (store.root / "scores").exists() and not list((store.root / "tmp").iterdir())
    assert store.get("scores", KEY, write_scores).computed


def test_publication_is_one_rename_of_a_complete_folder(store, monkeypatch):
    renames = []
    real = os.rename

    def watched(source, target):
        assert not Path(target).exists()
        renames.append((sorted(file.name for file in Path(source).iterdir()), Path(target)))
        real(source, target)

    monkeypatch.setattr(os, "rename", watched)
    artefact = store.get("scores", KEY, write_scores)
    assert renames == [(["manifest.json", "scores.json"], artefact.path)]


def test_each_get_says_what_happened(store, caplog):
    caplog.set_level(logging.INFO, "staff.artifacts")
    name = store.get("scores", KEY, write_scores).fingerprint[:8]
    store.get("scores", KEY, never)
    store.get("scores", KEY, never, label="effort of 2 samples")
    made, read, labelled = caplog.messages
    assert re.fullmatch(rf"scores {name}: computed in \d+\.\d s", made)
    assert read == made.replace("computed in", "read (cost") + ")"
    assert labelled == f"effort of 2 samples ({read.replace(':', '):')}"


# Inputs and what they are charged


def chain(store, pauses=(0.0, 0.0, 0.0)):
    """A coreset from two scorings, which share one fine-tuned model."""

    def model(folder, meter):
        time.sleep(pauses[0])
        meter.add(flops=100)

    def scores(signal):
        def make(folder, meter):
            time.sleep(pauses[1])
            store.get("finetune", {"seed": 0}, model)
            meter.add(flops=10)

        return store.get("scores", {"signal": signal}, make)

    def coreset(folder, meter):
        time.sleep(pauses[2])
        scores("effort"), scores("el2n"), scores("effort")
        meter.add(flops=1)

    return store.get("coreset", {"method": "staff"}, coreset)


def test_inputs_are_recorded_transitively_and_each_is_charged_once(store):
    charged = chain(store).charged()
    assert sorted(charge.stage for charge in charged.values()) == ["coreset", "finetune", "scores", "scores"]
    assert sum((charge.cost for charge in charged.values()), Cost.zero()).flops == 121
    assert chain(Store(store.root)).charged() == charged


def test_an_input_that_was_there_already_is_charged_all_the_same(store, tmp_path):
    cold = chain(Store(tmp_path / "other"))
    store.get("finetune", {"seed": 0}, lambda folder, meter: meter.add(flops=100))
    warm = chain(store)
    flops = [{name: charge.cost.flops for name, charge in run.charged().items()} for run in (cold, warm)]
    assert flops[0] == flops[1]


def test_the_seconds_of_inputs_are_not_in_the_seconds_of_what_reads_them(store):
    charged = chain(store, pauses=(0.5, 0.2, 0.0)).charged()
    seconds = {charge.stage: charge.cost.seconds for charge in charged.values()}
    assert seconds["finetune"] >= 0.5
    assert 0.2 <= seconds["scores"] < 0.5
    assert seconds["coreset"] < 0.2


def test_what_failed_is_no_input(store):
    def fail(folder, meter):
        raise ZeroDivisionError

    def coreset(folder, meter):
        with pytest.raises(ZeroDivisionError):
            store.get("scores", KEY, fail)

    assert store.get("coreset", {}, coreset).inputs == {}


def test_an_artefact_that_asks_for_itself_is_an_error_not_a_deadlock(store):
    def make(folder, meter):
        store.get("scores", KEY, make)

    with pytest.raises(RuntimeError, match="asks for itself"):
        store.get("scores", KEY, make)
