"""One store used by several people, machines and processes at once."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from safetensors import SafetensorError
from support.processes import ROOT, Job, never, run, save, wait_for

from experiments.store import entries
from staff.errors import UserError
from staff.runtime import processes
from staff.store import locks
from staff.store.manifest import digest
from staff.store.store import Store

# ---------------------------------------------------------------- users and file systems


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="another user, or a file system, is root's to make")
GROUP, OTHER = 54321, 54322  # ids that nobody has


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def mounted(folder: Path, *mount: str) -> Iterator[Path]:
    folder.mkdir()
    subprocess.run(["mount", *mount, folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.fixture
def shared() -> Iterator[Path]:
    """A store for a group, as its administrator makes it: new files take its group. It lies outside of pytest's
    folder, which any other session of pytest closes to other users."""
    with TemporaryDirectory() as folder:
        os.chown(folder, -1, GROUP)
        Path(folder).chmod(0o2775)
        yield Path(folder)


def as_another_user(store: Path, script: str) -> str:
    """What a script prints that another member of the group runs, or why it failed."""
    prelude = f"""
import os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from support.processes import Job, never, save
from staff.errors import UserError
from staff.store.store import Store
store = Store({str(store)!r})
os.umask(0o002)
os.setgroups([])
os.setgid({GROUP})
os.setuid({OTHER})
"""
    done = subprocess.run([sys.executable, "-c", prelude + script], capture_output=True, text=True)
    return done.stdout + done.stderr


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_have_the_permissions_that_the_umask_leaves(tmp_path, mask, mode):
    with umask(mask):
        artefact = Store(tmp_path / "store").get(Job({"seed": 0}, save))
    assert {file.stat().st_mode & 0o777 for file in artefact.path.iterdir()} == {mode}


@as_root
def test_a_reader_without_write_permission_reads_and_is_refused_in_a_sentence_what_is_to_be_computed(shared):
    with umask(0o022):
        Store(shared).get(Job({"seed": 0}, save))
    said = as_another_user(
        shared,
        """
print((store.get(Job({"seed": 0}, never)).path / "scores.safetensors").stat().st_size)
try:
    store.get(Job({"seed": 1}, save))
except UserError as error:
    print(error)
""",
    )
    size, refusal = said.splitlines()
    assert int(size) > 24 and f"the store in {shared} cannot be used (Permission denied" in refusal


@as_root
def test_members_of_a_group_write_in_one_store_and_take_each_others_locks(shared):
    with umask(0o002):
        mine = Store(shared).get(Job({"seed": 0}, save))
        (shared / "locks" / f"{Job({'seed': 1}).fingerprint[:32]}.lock").touch()
    said = as_another_user(shared, 'print(store.get(Job({"seed": 1}, save)).path)')
    theirs = Path(said.strip())
    assert theirs.parent == mine.path.parent, said
    assert theirs.stat().st_uid == OTHER and theirs.stat().st_gid == GROUP == mine.path.stat().st_gid
    assert Store(shared).get(Job({"seed": 1}, never)).path == theirs


@as_root
def test_a_quota_that_is_full_is_one_sentence_and_what_was_written_stays_readable(tmp_path):
    with mounted(tmp_path / "full", "-t", "tmpfs", "-o", "size=256k", "tmpfs") as full:
        store = Store(full / "store")
        store.get(Job({"seed": 0}))
        with pytest.raises(UserError, match=r"cannot be used \(No space left on device.*store_dir=PATH"):
            store.get(Job({"seed": 1}, lambda folder, meter: (folder / "big").write_bytes(bytes(2**20))))
        assert store.get(Job({"seed": 0}, never)) and not list((store.root / "tmp").iterdir())
        assert store.get(Job({"seed": 2})).computed, "there is room again"


def test_a_quota_that_is_used_up_is_named_in_the_words_of_the_system(tmp_path):
    """As Python has it, and as safetensors."""
    store = Store(tmp_path)

    def plain(folder: Path, meter: object) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), str(folder / "scores"))

    def hidden(folder: Path, meter: object) -> None:
        raise SafetensorError(f"Error while serializing: I/O error: Disk quota exceeded (os error {errno.EDQUOT})")

    for work in (plain, hidden):
        with pytest.raises(UserError, match=r"cannot be used \(Disk quota exceeded.*store_dir=PATH"):
            store.get(Job({"seed": 0}, work))
    assert store.get(Job({"seed": 0})).computed and not list((tmp_path / "tmp").iterdir())


class TwoNodes:
    """Stands for `staff.runtime.processes` in the main process of two."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.main = True
        monkeypatch.setattr(processes, "world_size", lambda: 2)
        monkeypatch.setattr(processes, "is_main_process", lambda: self.main)
        monkeypatch.setattr(processes, "all_gather", self.all_gather)

    def all_gather(self, got: bool) -> list[bool]:
        """The other process tries the lock while the main one waits for its answer."""
        if not self.main:
            return [got]
        return [got, locks.is_free(self.lock)]

    lock = Path()


@pytest.mark.parametrize("locking", [True, False])
def test_a_file_system_without_locks_between_nodes_is_refused_before_any_work(tmp_path, monkeypatch, locking):
    nodes = TwoNodes(monkeypatch)
    nodes.lock = tmp_path / "locks/probe.lock"
    if locking:
        locks.check_locks_between_nodes(tmp_path)
    else:
        monkeypatch.setattr(locks, "is_free", lambda lock: True)
        with pytest.raises(UserError, match="no locks between them: mount it with flock"):
            locks.check_locks_between_nodes(tmp_path)
    assert locks.is_free(nodes.lock), "it is free again"


@as_root
def test_a_store_on_a_mount_that_is_only_read_is_read_by_one_process_and_by_several(tmp_path, monkeypatch):
    Store(tmp_path / "store").get(Job({"seed": 0}))
    with mounted(tmp_path / "mount", "--bind", str(tmp_path / "store")) as mount:
        subprocess.run(["mount", "-o", "remount,bind,ro", mount], check=True)
        store = Store(mount)
        assert not store.get(Job({"seed": 0}, never)).computed
        with pytest.raises(UserError, match=r"cannot be used \(Read-only file system.*store_dir=PATH"):
            store.get(Job({"seed": 1}))
        TwoNodes(monkeypatch)
        locks.check_locks_between_nodes(store.root)


def test_a_file_system_without_any_locks_is_refused(tmp_path, monkeypatch):
    import fcntl

    def flock(*_: object) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(UserError, match=r"cannot be used \(Function not implemented.*store_dir=PATH"):
        Store(tmp_path / "store").get(Job({"seed": 0}))


@pytest.mark.parametrize("hours", [-30, 30])
def test_clocks_that_differ_change_neither_what_is_read_nor_what_is_cleaned_up(tmp_path, hours):
    artefact = Store(tmp_path).get(Job({"seed": 0}))
    manifest = json.loads((artefact.path / "manifest.json").read_text())
    del manifest["checksum"]
    manifest["created"] = (datetime.now(UTC) + timedelta(hours=hours)).isoformat(timespec="seconds")
    text = json.dumps({**manifest, "checksum": digest(manifest)})
    (artefact.path / "manifest.json").write_text(text)
    for file in artefact.path.rglob("*"):
        os.utime(file, (then := time.time() + 3600 * hours, then))
    assert not Store(tmp_path).get(Job({"seed": 0}, never)).computed
    (entry,) = entries(tmp_path, contents=True)
    assert entry.age >= 0 and not entry.damage

    drafts = {name: tmp_path / "tmp" / f"{name * 32}-0" for name in "ab"}  # of a dead process and of a living one
    for draft in drafts.values():
        draft.mkdir()
        os.utime(draft, (then, then))
    with locks.file_lock(tmp_path / "locks" / f"{'b' * 32}.lock"):
        Store(tmp_path).remove_dead_drafts()
    assert list((tmp_path / "tmp").iterdir()) == [drafts["b"]]


def test_a_store_of_an_older_layout_is_left_alone(tmp_path):
    """The first release kept other names in its manifests, and other kinds of artefacts."""
    older = shutil.copytree(Store(tmp_path).get(Job({"seed": 0})).path, tmp_path / "finetuned" / ("0" * 32))
    manifest = json.loads((older / "manifest.json").read_text())
    manifest["lost_attempts"] = manifest.pop("failed_attempts")
    (older / "manifest.json").write_text(json.dumps({**manifest, "checksum": ""}))
    content = (older / "manifest.json").read_bytes()
    present = Job({"seed": 0}, kind="finetuned")
    assert Store(tmp_path).get(present).computed, "known by what it is, whatever else lies beside it"
    assert (older / "manifest.json").read_bytes() == content


# ---------------------------------------------------------------- several processes


# Each says which of its jobs it runs ("made NAME") and, once, that it waits for another process.
CHAIN = """
import logging, random
class Tells(logging.Handler):
    def emit(self, record):
        if "waiting for another process" in record.getMessage():
            side.with_name(f"waits {os.getpid()}").touch()
logging.basicConfig(level=logging.INFO, handlers=[Tells()])
def made(name):
    with side.with_name(f"made {name}").open("a") as file:
        file.write("made\\n")
def train(folder, meter):
    made("model")
    if os.environ["DIES"] == "yes":
        side.touch()
        time.sleep(60)
    (folder / "weights").write_text("0" * 100_000)
model = Job({"seed": 0}, train, kind="finetune")
def scores(name):
    def score(folder, meter):
        made(name)
        weights = (store.get(model).path / "weights").read_text()
        (folder / "scores").write_text(name * len(weights))
    return Job({"name": name}, score)
def coreset(name):
    def select(folder, meter):
        made(f"coreset {name}")
        read = [(store.get(scores(of)).path / "scores").read_text() for of in name]
        (folder / "coreset").write_text("".join(read))
    return Job({"name": name}, select, kind="coreset")
wanted = [model, *map(scores, "abc"), *map(coreset, ("ab", "bc", "ca", "abc"))]
random.Random(os.getpid()).shuffle(wanted)
for job in wanted:
    artefact = store.get(job)
    if job.kind == "coreset":
        whole = "".join(of * 100_000 for of in job.settings["name"])
        assert (artefact.path / "coreset").read_text() == whole
"""
NAMES = ("a", "b", "c", "coreset ab", "coreset abc", "coreset bc", "coreset ca")


def test_eight_processes_make_artefacts_of_artefacts_once_each_in_whatever_order_they_ask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store = Store(tmp_path / "store")
    monkeypatch.setenv("DIES", "yes")
    holder = run(CHAIN, store.root, tmp_path / "held")
    wait_for(tmp_path / "held")
    monkeypatch.setenv("DIES", "no")
    others = [run(CHAIN, store.root, tmp_path / "side") for _ in range(7)]
    for process in others:  # all rest on the model; some hold locks of their own meanwhile
        wait_for(tmp_path / f"waits {process.pid}")
    holder.kill()
    holder.communicate()
    for process in others:
        process.communicate(timeout=60)
        assert process.returncode == 0
    made = {file.name.removeprefix("made "): file.read_text().count("made") for file in tmp_path.glob("made *")}
    assert made.pop("model") == 2, "by the one that died, and by one other"
    assert sorted(made) == sorted(NAMES)
    assert sum(made.values()) - len(made) <= 2, "what the one that died was making, and nothing else, is made again"
    inputs = [json.loads(file.read_text())["inputs"] for file in store.root.glob("coreset/*/manifest.json")]
    assert Counter(map(len, inputs)) == {3: 3, 4: 1}, "scores, and the model they share"
    assert not list((store.root / "tmp").iterdir()) and not store.held_locks()


def test_a_holder_that_dies_frees_its_waiters_though_a_process_that_it_started_lives_on(tmp_path: Path):
    script = """
import subprocess
def work(folder, meter):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    side.with_name("draft").write_text(str(child.pid))
    side.with_name("draft").rename(side)
    time.sleep(60)
store.get(Job({"seed": 0}, work))
"""
    holder = run(script, tmp_path / "store", tmp_path / "child")
    wait_for(tmp_path / "child")
    try:
        holder.kill()
        holder.wait(timeout=30)
        assert Store(tmp_path / "store").get(Job({"seed": 0})).computed
    finally:
        os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)
        holder.communicate()
