"""A store that a group shares: permissions, readers, locks between nodes, quotas, clocks and older layouts."""

import json
import os
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from support.stores import ROOT, Job, never

from experiments.store import entries
from staff.errors import UserError
from staff.runtime import processes
from staff.store import locks
from staff.store.manifest import digest
from staff.store.store import Store

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="another user, or a file system, is root's to make")
GROUP, OTHER = 54321, 54322  # ids that nobody has


def save(folder: Path, meter: object) -> None:
    save_file({"score": np.zeros(3)}, folder / "scores.safetensors")


def in_a_shared_folder(path: Path) -> Path:
    """A store for a group, as its administrator makes it: new files take its group."""
    path.mkdir()
    os.chown(path, -1, GROUP)
    path.chmod(0o2775)
    for parent in path.parents:
        if parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    return path


def as_another_user(store: Path, script: str, umask: int = 0o002) -> str:
    """What a script prints that another member of the group runs, or why it failed."""
    prelude = f"""
import os, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from support.stores import Job, never
from staff.errors import UserError
from staff.store.store import Store
from test_shared_store import save
store = Store({str(store)!r})
os.umask({umask})
os.setgroups([])
os.setgid({GROUP})
os.setuid({OTHER})
"""
    done = subprocess.run([sys.executable, "-c", prelude + script], capture_output=True, text=True)
    return done.stdout + done.stderr


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_have_the_permissions_that_the_umask_leaves(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        artefact = Store(tmp_path / "store").get(Job({"seed": 0}, save))
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in artefact.path.iterdir()} == {mode}


@as_root
def test_a_reader_without_write_permission_reads_and_is_refused_in_a_sentence_what_is_to_be_computed(tmp_path):
    shared = in_a_shared_folder(tmp_path / "store")
    before = os.umask(0o022)
    try:
        Store(shared).get(Job({"seed": 0}, save))
    finally:
        os.umask(before)
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
def test_members_of_a_group_write_in_one_store_and_take_each_others_locks(tmp_path):
    shared = in_a_shared_folder(tmp_path / "store")
    before = os.umask(0o002)
    try:
        mine = Store(shared).get(Job({"seed": 0}, save))
        (shared / "locks" / f"{Job({'seed': 1}).fingerprint[:32]}.lock").touch()
    finally:
        os.umask(before)
    said = as_another_user(shared, 'print(store.get(Job({"seed": 1}, save)).path)')
    theirs = Path(said.strip())
    assert theirs.parent == mine.path.parent, said
    assert theirs.stat().st_uid == OTHER and theirs.stat().st_gid == GROUP == mine.path.stat().st_gid
    assert Store(shared).get(Job({"seed": 1}, never)).path == theirs


@as_root
def test_a_quota_that_is_full_is_one_sentence_and_what_was_written_stays_readable(tmp_path):
    (tmp_path / "full").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", tmp_path / "full"], check=True)
    try:
        store = Store(tmp_path / "full/store")
        store.get(Job({"seed": 0}))
        with pytest.raises(UserError, match=r"cannot be used \(No space left on device.*store_dir=PATH"):
            store.get(Job({"seed": 1}, lambda folder, meter: (folder / "big").write_bytes(bytes(2**20))))
        assert store.get(Job({"seed": 0}, never)) and not list((store.root / "tmp").iterdir())
        assert store.get(Job({"seed": 2})).computed, "there is room again"
    finally:
        subprocess.run(["umount", tmp_path / "full"], check=True)


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
        return [got, locks._got(locks.file_lock(self.lock, timeout=0))]

    lock = Path()


@pytest.mark.parametrize("locking", [True, False])
def test_a_file_system_without_locks_between_nodes_is_refused_before_any_work(tmp_path, monkeypatch, locking):
    nodes = TwoNodes(monkeypatch)
    nodes.lock = tmp_path / "locks/probe.lock"
    if locking:
        locks.check_locks_between_nodes(tmp_path)
    else:
        monkeypatch.setattr(locks, "_got", lambda lock: True)
        with pytest.raises(UserError, match="no locks between them: mount it with flock"):
            locks.check_locks_between_nodes(tmp_path)
    assert locks._got(locks.file_lock(nodes.lock, timeout=0)), "it is free again"


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
