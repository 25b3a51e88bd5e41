"""The store when things go wrong: processes killed, several at once, damage, full disks."""

import json
import logging
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from staff import artifacts, attempts
from staff.artifacts import Store
from staff.errors import UserError

KEY = {"seed": 0}


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


def write_scores(folder, meter):
    (folder / "scores.json").write_text("[1, 2]")


def never(folder, meter):
    raise AssertionError("made a second time")


def run(script: str, *arguments: object) -> subprocess.Popen:
    """A real process that has a store at argv[1] and a side file at argv[2]."""
    prelude = """
import os, sys, time
from pathlib import Path
from staff.artifacts import Store
store, side = Store(sys.argv[1]), Path(sys.argv[2])
"""
    command = [sys.executable, "-c", prelude + script, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 30
    while not file.exists():
        assert time.monotonic() < deadline, f"{file} did not appear"
        time.sleep(0.01)


# Processes: killed, and several at once

KILLED_WHILE_WRITING = """
def make(folder, meter):
    (folder / "scores.json").write_text("[1")
    side.touch()
    time.sleep(60)
store.get("scores", {"seed": 0}, make)
"""
KILLED_BEFORE_PUBLICATION = """
def rename(source, target):
    side.touch()
    time.sleep(60)
os.rename = rename
store.get("scores", {"seed": 0}, lambda folder, meter: (folder / "scores.json").write_text("[1"))
"""


@pytest.mark.parametrize("script", [KILLED_WHILE_WRITING, KILLED_BEFORE_PUBLICATION])
def test_a_killed_process_leaves_nothing_that_is_read_and_the_next_one_makes_it(store, tmp_path, script):
    with run(script, store.root, tmp_path / "started") as process:
        wait_for(tmp_path / "started")
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert len(list((store.root / "tmp").iterdir())) == 1  # it had begun

    artefact = store.get("scores", KEY, write_scores)
    assert artefact.computed and (artefact.path / "scores.json").read_text() == "[1, 2]"
    assert not list((store.root / "tmp").iterdir())


def test_a_waiter_takes_over_when_the_one_it_waits_for_is_killed(store, tmp_path, caplog):
    caplog.set_level(logging.INFO, "staff.artifacts")

    def kill_once_waited_for(process):
        while not caplog.messages:
            time.sleep(0.01)
        process.kill()

    with run(KILLED_WHILE_WRITING, store.root, tmp_path / "started") as process:
        wait_for(tmp_path / "started")
        threading.Thread(target=kill_once_waited_for, args=[process], daemon=True).start()
        artefact = store.get("scores", KEY, write_scores)
    assert artefact.computed
    assert caplog.messages[0].endswith(": waiting for another process")


def test_two_processes_that_want_the_same_artefact_compute_it_once(store, tmp_path):
    script = """
def make(folder, meter):
    with side.open("a") as file:
        file.write("made\\n")
    time.sleep(0.5)
    (folder / "scores.json").write_text("[1, 2]")
while not side.with_name("go").exists():
    time.sleep(0.001)
artefact = store.get("scores", {"seed": 0}, make)
print(artefact.computed, artefact.cost.seconds, (artefact.path / "scores.json").read_text())
"""
    processes = [run(script, store.root, tmp_path / "count") for _ in range(2)]
    (tmp_path / "go").touch()
    answers = sorted(process.communicate(timeout=60)[0].split(" ", 1) for process in processes)
    assert (tmp_path / "count").read_text() == "made\n"
    assert [computed for computed, _ in answers] == ["False", "True"]
    assert answers[0][1] == answers[1][1]


EIGHT = """
def make(folder, meter):
    with side.with_name(f"made {name}").open("a") as file:
        file.write("made\\n")
    if os.environ.get("DIES") == "yes":
        side.touch()
        time.sleep(60)
    (folder / "scores.json").write_text(name * 1000)
while not side.with_name("go").exists():
    time.sleep(0.001)
for name in (["same", "ab", "cd"] if "BACKWARDS" not in os.environ else ["cd", "ab", "same"]):
    artefact = store.get("scores", {"name": name}, make)
    assert (artefact.path / "scores.json").read_text() == name * 1000
"""


def test_eight_processes_on_one_store_compute_each_artefact_once_and_a_dying_holder_frees_its_waiters(
    store, tmp_path, monkeypatch
):
    monkeypatch.setenv("DIES", "yes")
    holder = run(EIGHT, store.root, tmp_path / "held")
    (tmp_path / "go").touch()
    wait_for(tmp_path / "held")
    monkeypatch.setenv("DIES", "no")
    others = [run(EIGHT, store.root, tmp_path / "x") for _ in range(4)]
    monkeypatch.setenv("BACKWARDS", "yes")
    others += [run(EIGHT, store.root, tmp_path / "x") for _ in range(3)]
    wait_for(tmp_path / "made cd")
    holder.kill()
    holder.communicate()
    for process in others:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert (tmp_path / "made same").read_text() == "made\n" * 2, "by the one that died, and by one other"
    assert (tmp_path / "made ab").read_text() == (tmp_path / "made cd").read_text() == "made\n"
    assert not list((store.root / "tmp").iterdir())


def test_what_a_killed_process_was_writing_is_removed_by_the_next_run_whatever_that_makes(store, tmp_path):
    with run(KILLED_WHILE_WRITING, store.root, tmp_path / "started") as process:
        wait_for(tmp_path / "started")
        living = run(KILLED_WHILE_WRITING.replace('"seed": 0', '"seed": 1'), store.root, tmp_path / "living")
        wait_for(tmp_path / "living")
        process.kill()
    assert len(list((store.root / "tmp").iterdir())) == 2
    store.get("scores", {"seed": 2}, write_scores)
    (left,) = (store.root / "tmp").iterdir()
    assert (left / "scores.json").read_text() == "[1", "what a living process writes is left alone"
    living.kill()
    living.communicate()


def test_attempts_that_led_to_nothing_are_recorded_apart_from_the_cost(store, tmp_path):
    script = "from staff import attempts\nattempts.BEAT = 0.1\n" + KILLED_WHILE_WRITING
    with run(script, store.root, tmp_path / "started") as process:
        wait_for(tmp_path / "started")
        (file,) = (store.root / "attempts").glob("*.json")
        while attempts.lost(file)[0]["seconds"] < 0.5:
            time.sleep(0.01)
        process.kill()

    def fail(folder, meter):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.get("scores", KEY, fail)
    artefact = store.get("scores", KEY, write_scores)
    killed, failed = json.loads((artefact.path / "manifest.json").read_text())["lost_attempts"]
    assert killed["seconds"] >= 0.5 and "error" not in killed
    assert failed["error"] == "ZeroDivisionError" and failed["seconds"] < 0.5
    assert artefact.cost.seconds < 0.5 and not list((store.root / "attempts").iterdir())


# Damage and disks


def flip_a_bit(file: Path, at: bytes = b"1") -> None:
    content = file.read_bytes()
    position = content.index(at) + len(at) - 1
    file.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])


def test_checksums_are_compared_once_a_process_and_again_for_what_is_made_anew(store):
    artefact = store.get("scores", KEY, write_scores)
    store.get("scores", KEY, never)
    flip_a_bit(artefact.path / "scores.json")
    store.get("scores", KEY, never)
    script = """
try:
    store.get("scores", {"seed": 0}, None)
except ValueError as error:
    print(error)
"""
    assert "is not what was written" in run(script, store.root, "").communicate()[0]
    shutil.rmtree(artefact.path)
    flip_a_bit(store.get("scores", KEY, write_scores).path / "scores.json")
    with pytest.raises(UserError, match="is not what was written"):
        store.get("scores", KEY, never)


def test_what_an_older_version_of_a_stage_made_is_not_read_and_a_sentence_says_so(store, monkeypatch, caplog):
    old, version = store.get("scores", KEY, write_scores), artifacts.STAGE_VERSIONS["scores"]
    monkeypatch.setitem(artifacts.STAGE_VERSIONS, "scores", version + 1)
    caplog.set_level(logging.INFO, "staff.artifacts")
    new = store.get("scores", KEY, write_scores, label="effort")
    assert new.computed and new.path != old.path
    assert caplog.messages[0].startswith(
        f"effort: version {version} of this stage made it in {old.path}, which is not read"
    )


def test_a_folder_without_a_manifest_is_not_read(store):
    folder = store.get("scores", KEY, write_scores).path
    (folder / "manifest.json").unlink()
    (folder / "scores.json").write_text("half")
    artefact = store.get("scores", KEY, write_scores)
    assert artefact.computed and (artefact.path / "scores.json").read_text() == "[1, 2]"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "scores.json").write_text("[1,"), "scores.json has 3 bytes where .* says 6"),
        (lambda folder: (folder / "scores.json").unlink(), "scores.json is missing"),
        (lambda folder: flip_a_bit(folder / "scores.json"), "scores.json is not what was written"),
        (lambda folder: flip_a_bit(folder / "manifest.json", b'"tokens_forward": 0'), "manifest.json is damaged"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json is damaged"),
    ],
)
def test_a_damaged_artefact_is_refused_by_name_with_a_mend_that_works(store, damage, says):
    folder = store.get("scores", KEY, write_scores).path
    damage(folder)
    with pytest.raises(UserError, match=f"{says}.*delete the folder {folder}"):
        store.get("scores", KEY, never)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    assert store.get("scores", KEY, write_scores).computed


def test_a_store_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"the store in {tmp_path}/file/store cannot .*store_dir=PATH"):
        Store(tmp_path / "file" / "store").get("scores", KEY, never)


PLAIN = "(folder / 'scores').write_bytes(bytes(100_000))"
SAFETENSORS = "save_file({'score': np.zeros(100_000)}, folder / 'scores')"
PARQUET = "pq.write_table(pa.table({'score': [i * 0.37 for i in range(100_000)]}), folder / 'scores')"


@pytest.mark.parametrize("write", [PLAIN, PARQUET, SAFETENSORS], ids=["plain", "parquet", "safetensors"])
def test_a_disk_that_takes_no_more_is_one_sentence_and_publishes_nothing(store, tmp_path, write):
    """A limit on the size of files stands for the full disk: the same errors at the same places."""
    script = f"""
import numpy as np, pyarrow as pa, pyarrow.parquet as pq, resource
from safetensors.numpy import save_file
from staff.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    store.get("scores", {{"seed": 0}}, lambda folder, meter: {write})
except UserError as error:
    print(error)
"""
    sentence = run(script, store.root, tmp_path).communicate(timeout=60)[0]
    assert re.search(f"^the store in {store.root} cannot .*File too large.*store_dir=PATH$", sentence.strip())
    assert not (store.root / "scores").exists() and not list((store.root / "tmp").iterdir())


@pytest.mark.parametrize(
    "error", [ConnectionRefusedError(111, "no hub"), OSError("no such model"), PermissionError(13, "no", "/data")]
)
def test_an_error_of_another_place_is_not_blamed_on_the_store(store, error):
    def make(folder, meter):
        raise error

    with pytest.raises(OSError) as raised:
        store.get("scores", KEY, make)
    assert raised.value is error
