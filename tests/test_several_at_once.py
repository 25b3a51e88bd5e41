"""Several processes on one store whose artefacts are made from one another, and whose holders die."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
from test_store_failures import run, wait_for

from staff.artifacts import Store

CHAIN = """
import random
def made(name):
    with side.with_name(f"made {name}").open("a") as file:
        file.write("made\\n")
def model(folder, meter):
    made("model")
    if os.environ.get("DIES") == "yes":
        side.touch()
        time.sleep(60)
    (folder / "weights").write_text("0" * 100_000)
def scores(name):
    def make(folder, meter):
        made(name)
        weights = (store.get("finetune", {"seed": 0}, model).path / "weights").read_text()
        (folder / "scores").write_text(name * len(weights))
    return store.get("scores", {"name": name}, make)
def coreset(name):
    def make(folder, meter):
        made(f"coreset {name}")
        (folder / "coreset").write_text("".join((scores(of).path / "scores").read_text() for of in name))
    artefact = store.get("coreset", {"name": name}, make)
    assert (artefact.path / "coreset").read_text() == "".join(of * 100_000 for of in name)
wanted = [lambda: store.get("finetune", {"seed": 0}, model), *(lambda name=name: scores(name) for name in "abc")]
wanted += [lambda name=name: coreset(name) for name in ("ab", "bc", "ca", "abc")]
random.seed(os.getpid())
random.shuffle(wanted)
for want in wanted:
    want()
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
    time.sleep(1)  # until they wait, some while holding locks of their own
    holder.kill()
    holder.communicate()
    for process in others:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert (tmp_path / "made model").read_text() == "made\n" * 2, "by the one that died, and by one other"
    lost = {file.name.removeprefix("made "): file.read_text().count("made") - 1 for file in tmp_path.glob("made *")}
    assert sum(lost.values()) <= 3, "what the one that died was making, and nothing else, was made again"
    assert sorted(lost) == sorted(("model", *NAMES))
    costs = [json.loads(file.read_text())["inputs"] for file in store.root.glob("coreset/*/manifest.json")]
    assert sorted(len(inputs) for inputs in costs) == [3, 3, 3, 4], "scores, and the model they share"
    assert not list((store.root / "tmp").iterdir()) and not store.at_work()


def test_a_holder_that_dies_frees_its_waiters_though_a_process_that_it_started_lives_on(tmp_path: Path):
    script = """
import subprocess
def make(folder, meter):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    side.with_name("draft").write_text(str(child.pid))
    side.with_name("draft").rename(side)
    time.sleep(60)
store.get("scores", {"seed": 0}, make)
"""
    with run(script, tmp_path / "store", tmp_path / "child") as holder:
        wait_for(tmp_path / "child")
        holder.kill()
    waiter = run('store.get("scores", {"seed": 0}, lambda folder, meter: None)', tmp_path / "store", tmp_path)
    try:
        waiter.communicate(timeout=30)
        assert waiter.returncode == 0
    finally:
        os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)
