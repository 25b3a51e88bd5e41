"""Several processes on one store whose artefacts are made from one another, and whose holders die."""

import json
import os
import signal
from collections import Counter
from pathlib import Path

import pytest
from support.stores import Job, run, wait_for

from staff.store.store import Store

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
