"""The store when things go wrong: processes killed, several at once, damage, full disks."""

import json
import logging
import re
import shutil
import signal
import sys
import threading
import time
from contextvars import copy_context
from itertools import count

import pytest
from support.processes import KILLED_WHILE_WRITING, Clock, Job, flip_a_bit, never, run, wait_for

from staff.errors import UserError
from staff.runtime.preemption import Preempted
from staff.store import cost
from staff.store.cost import failed_attempts
from staff.store.manifest import check_contents, read_manifest
from staff.store.store import Store

SCORES, AGAIN = Job({"seed": 0}), Job({"seed": 0}, never)


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "store")


# Processes: killed, and several at once

KILLED_BEFORE_PUBLICATION = """
def rename(source, target):
    side.touch()
    time.sleep(60)
os.rename = rename
store.get(Job({"seed": 0}))
"""


@pytest.mark.parametrize("script", [KILLED_WHILE_WRITING, KILLED_BEFORE_PUBLICATION])
def test_a_killed_process_leaves_nothing_that_is_read_and_the_next_one_makes_it(store, tmp_path, script):
    with run(script, store.root, tmp_path / "started") as process:
        wait_for(tmp_path / "started")
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert len(list((store.root / "tmp").iterdir())) == 1  # it had begun

    artefact = store.get(SCORES)
    assert artefact.computed and (artefact.path / "scores.json").read_text() == "[1, 2]"
    assert not list((store.root / "tmp").iterdir())


def test_a_waiter_takes_over_when_the_one_it_waits_for_is_killed(store, tmp_path, caplog):
    caplog.set_level(logging.INFO, "staff.store.store")

    def kill_once_waited_for(process):
        while not caplog.messages:
            time.sleep(0.01)
        process.kill()

    with run(KILLED_WHILE_WRITING, store.root, tmp_path / "started") as process:
        wait_for(tmp_path / "started")
        threading.Thread(target=kill_once_waited_for, args=[process], daemon=True).start()
        artefact = store.get(SCORES)
    assert artefact.computed
    assert caplog.messages[0].endswith(": waiting for another process")


def test_two_processes_that_want_the_same_artefact_compute_it_once(store, tmp_path):
    script = """
import logging
waits = side.with_name("one waits")
class Tells(logging.Handler):
    def emit(self, record):
        if "waiting for another process" in record.getMessage():
            waits.touch()
logging.basicConfig(level=logging.INFO, handlers=[Tells()])
def work(folder, meter):
    with side.open("a") as file:
        file.write("computed\\n")
    deadline = time.monotonic() + 20
    while not waits.exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    write_scores(folder, meter)
artefact = store.get(Job({"seed": 0}, work))
print(artefact.computed, artefact.cost.seconds, (artefact.path / "scores.json").read_text())
"""
    processes = [run(script, store.root, tmp_path / "count") for _ in range(2)]
    answers = sorted(process.communicate(timeout=60)[0].split(" ", 1) for process in processes)
    assert (tmp_path / "count").read_text() == "computed\n"
    assert [computed for computed, _ in answers] == ["False", "True"]
    assert answers[0][1] == answers[1][1]


def test_what_a_killed_process_was_writing_is_removed_by_the_next_run_whatever_that_makes(store, tmp_path):
    with run(KILLED_WHILE_WRITING, store.root, tmp_path / "started") as process:
        wait_for(tmp_path / "started")
        living = run(KILLED_WHILE_WRITING.replace('"seed": 0', '"seed": 1'), store.root, tmp_path / "living")
        wait_for(tmp_path / "living")
        process.kill()
    assert len(list((store.root / "tmp").iterdir())) == 2
    store.get(Job({"seed": 2}))
    (left,) = (store.root / "tmp").iterdir()
    assert (left / "scores.json").read_text() == "[1", "what a living process writes is left alone"
    living.kill()
    living.communicate()


def test_attempts_that_led_to_nothing_are_recorded_apart_from_the_cost(store, tmp_path, monkeypatch):
    script = "from staff.store import cost\ncost.BEAT = 0.05\n" + KILLED_WHILE_WRITING
    with run(script, store.root, tmp_path / "started") as process:
        wait_for(tmp_path / "started")
        (file,) = (store.root / "attempts").glob("*.json")
        while failed_attempts(file)[0]["seconds"] < 0.2:
            time.sleep(0.01)
        process.kill()

    monkeypatch.setattr(cost, "time", clock := Clock())

    def fail(folder, meter):
        clock.sleep(2)
        raise ZeroDivisionError

    def succeed(folder, meter):
        clock.sleep(3)

    with pytest.raises(ZeroDivisionError):
        store.get(Job({"seed": 0}, fail))
    artefact = store.get(Job({"seed": 0}, succeed))
    killed, failed = json.loads((artefact.path / "manifest.json").read_text())["failed_attempts"]
    assert killed["seconds"] >= 0.2 and "error" not in killed
    assert failed["error"] == "ZeroDivisionError" and failed["seconds"] == 2
    assert artefact.cost.seconds == 3 and not list((store.root / "attempts").iterdir())


# Damage and disks


def test_checksums_are_compared_once_a_process_and_again_for_what_is_made_anew(store):
    artefact = store.get(SCORES)
    store.get(AGAIN)
    flip_a_bit(artefact.path / "scores.json")
    store.get(AGAIN)
    script = """
try:
    store.get(Job({"seed": 0}))
except ValueError as error:
    print(error)
"""
    assert "is not what was written" in run(script, store.root, "").communicate()[0]
    shutil.rmtree(artefact.path)
    flip_a_bit(store.get(SCORES).path / "scores.json")
    with pytest.raises(UserError, match="is not what was written"):
        store.get(AGAIN)


def test_what_an_older_version_of_a_stage_made_is_not_read_and_a_sentence_says_so(store, caplog):
    old = store.get(Job({"seed": 0}, version=1))
    caplog.set_level(logging.INFO, "staff.store.store")
    caplog.clear()  # the level of the log may be another test's
    new = store.get(Job({"seed": 0}, version=3))
    assert new.computed and new.path != old.path
    assert caplog.messages[0] == f"effort: {old.path} was computed by version 1 of this stage, and is not read"


def test_a_folder_without_a_manifest_is_not_read(store):
    folder = store.get(SCORES).path
    (folder / "manifest.json").unlink()
    (folder / "scores.json").write_text("half")
    artefact = store.get(SCORES)
    assert artefact.computed and (artefact.path / "scores.json").read_text() == "[1, 2]"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / "scores.json").write_text("[1,"), "scores.json has 3 bytes where .* says 6"),
        (lambda folder: (folder / "scores.json").unlink(), "scores.json is missing"),
        (lambda folder: flip_a_bit(folder / "scores.json"), "scores.json is not what was written"),
        (lambda folder: flip_a_bit(folder / "manifest.json", b'"tokens_forward": 20'), "manifest.json is damaged"),
        (lambda folder: (folder / "manifest.json").write_text("{"), "manifest.json is damaged"),
        (lambda folder: (folder / "manifest.json").write_text("[]"), "manifest.json is damaged"),
    ],
)
def test_a_damaged_artefact_is_refused_by_name_with_a_mend_that_works(store, damage, says):
    folder = store.get(SCORES).path
    damage(folder)
    with pytest.raises(UserError, match=f"{says}.*delete the folder {folder}"):
        store.get(AGAIN)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    assert store.get(SCORES).computed


def test_a_store_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"the store in {tmp_path}/file/store cannot .*store_dir=PATH"):
        Store(tmp_path / "file" / "store").get(AGAIN)


FULL_DISK = """
import resource
import numpy as np, pyarrow as pa, pyarrow.parquet as pq
from safetensors.numpy import save_file
from staff.errors import UserError
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
writers = {
    "plain": lambda file: file.write_bytes(bytes(100_000)),
    "numpy": lambda file: np.save(file.open("wb"), np.zeros(100_000)),
    "parquet": lambda file: pq.write_table(pa.table({"score": [i * 0.37 for i in range(100_000)]}), file),
    "safetensors": lambda file: save_file({"score": np.zeros(100_000)}, file),
}
for kind, write in writers.items():
    try:
        inner = Job({"kind": kind}, lambda folder, meter: write(folder / "scores"))
        store.get(Job({"outer": kind}, lambda folder, meter: store.get(inner)))
    except UserError as error:
        print(error)
"""


def test_a_disk_that_takes_no_more_is_one_sentence_and_publishes_nothing(store, tmp_path):
    """A limit on the size of files stands for the full disk: the same errors at the same places."""
    sentences = run(FULL_DISK, store.root, tmp_path).communicate(timeout=60)[0].splitlines()
    assert len(sentences) == 4
    for sentence in sentences:
        said = (
            f"^the store in {store.root} cannot be used \\((File too large|No space left on device): {store.root}"
        )
        assert re.search(f"{said}\\S*\\); .*store_dir=PATH$", sentence)
    assert not (store.root / "scores").exists() and not list((store.root / "tmp").iterdir())


@pytest.mark.parametrize(
    "error", [ConnectionRefusedError(111, "no hub"), OSError("no such model"), PermissionError(13, "no", "/data")]
)
def test_an_error_of_another_place_is_not_blamed_on_the_store(store, error):
    def work(folder, meter):
        raise error

    with pytest.raises(OSError) as raised:
        store.get(Job({"seed": 0}, work))
    assert raised.value is error


def test_a_disk_that_is_full_when_the_record_is_written_costs_nothing_that_was_computed(run):
    folder = run("method=random", "evaluation=none")["folder"]
    (folder / "metrics.json").unlink()
    (folder / "samples.parquet").unlink()
    (folder / "samples.parquet").symlink_to("/dev/full")
    with pytest.raises(UserError) as refused:
        run("method=random", "evaluation=none")
    assert str(refused.value) == (
        f"the record of the run cannot be written to {folder} (No space left on device): make room, or name "
        "another results_dir; everything computed is stored, and the same command writes the record."
    )
    assert not (folder / "metrics.json").exists()
    (folder / "samples.parquet").unlink()
    again = run("method=random", "evaluation=none")
    assert not any(stage["computed"] for stage in again["overhead"]["stages"])
    assert not (folder / "failure.txt").exists()


# Signals

WRITING = tuple(f"/staff/store/{name}.py" for name in ("store", "cost", "locks", "manifest"))


def interrupted(at: int, store: Store) -> bool:
    """Whether a signal at this line of `WRITING`, counted as they are run, ended the making of an artefact."""
    left = at

    def trace(frame, event, arg):
        nonlocal left
        if not frame.f_code.co_filename.endswith(WRITING):
            return None
        left -= event == "line"
        if left < 0:
            sys.settrace(None)
            raise Preempted
        return trace

    sys.settrace(trace)
    try:
        copy_context().run(store.get, SCORES)
    except Preempted:
        return True
    finally:
        sys.settrace(None)
    return False


def test_a_signal_at_any_line_leaves_an_artefact_whole_or_absent_and_the_next_process_goes_on(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(cost, "BEAT", 3600)  # threads that a signal leaves behind end with their process
    for at in count():
        store = Store(tmp_path / str(at))
        stopped = interrupted(at, store)
        for folder in store.root.glob("scores/*"):
            check_contents(folder, read_manifest(folder)[0])
        artefact = Store(store.root).get(SCORES)
        assert (artefact.path / "scores.json").read_text() == "[1, 2]"
        left = [file for name in ("tmp", "attempts", "checkpoints") for file in (store.root / name).glob("*")]
        assert not left, at
        if not stopped:
            break
    assert at > 100
