"""Models and data sets of a hub, which answers, fails in every way, or is away."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from hydra.utils import instantiate
from support.servers import COMMIT, ROWS, Fault, Hub, serving
from support.tiny import composed

from staff.errors import UserError
from staff.models.spec import ModelSpec
from staff.runtime import hub as client
from staff.runtime import patience

TINY = ROOT / "staff/assets/tiny"
NAME = "somebody/tiny"
WEIGHTS = "model.safetensors"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub with the smallest of the embedded models, which this process asks, with an empty cache."""
    from huggingface_hub import constants

    with serving() as served:
        served.add(f"models/{NAME}", TINY / "smaller")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        point_to(served.endpoint, monkeypatch)
        monkeypatch.setattr(client, "_away_until", 0.0)
        client._commit.cache_clear()
        yield served
    client._commit.cache_clear()


def point_to(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def refused(spec: ModelSpec) -> str:
    """The sentence with which a model is refused."""
    started = time.monotonic()
    with pytest.raises(UserError) as error:
        spec.load()
    assert time.monotonic() - started < 30
    return str(error.value)


def test_a_model_is_fetched_once_without_what_it_does_not_need_and_loads_from_its_folder(hub: Hub, capfd):
    files = hub.repositories[f"models/{NAME}"]
    files |= {"pytorch_model.bin": b"pickle", "README.md": b"Hi", "original/params.json": b"{}"}
    spec = ModelSpec(NAME)
    assert spec.source() == {"hub": NAME, "commit": COMMIT}
    spec.tokenizer(), spec.config()
    assert not any(WEIGHTS in request for request in hub.requests), "a plan needs none"
    loaded = spec.load()
    fetched = {request.rsplit("/", 1)[1] for request in hub.requests if request.startswith("GET /somebody")}
    assert {"config.json", "tokenizer.json", WEIGHTS} <= fetched
    assert not {"pytorch_model.bin", "README.md", "params.json"} & fetched
    asked, _ = len(hub.requests), capfd.readouterr()
    spec.load(), spec.tokenizer(), spec.pinned().load()
    assert len(hub.requests) == asked, "all that follows comes from the folder"
    assert "Fetching" not in capfd.readouterr().err, "nor is it shown as a download"
    own = ModelSpec(str(TINY / "smaller")).load()
    assert all((a == b).all() for a, b in zip(loaded.parameters(), own.parameters(), strict=True))


def test_revisions_are_followed_and_pinned_to_their_commits(hub: Hub):
    hub.revisions["v2"] = "b" * 40
    second = ModelSpec(NAME, revision="v2")
    assert second.pinned().revision == second.source()["commit"] == "b" * 40
    assert second.pinned().identity() == second.identity() != ModelSpec(NAME).identity()
    said = refused(ModelSpec(NAME, revision="v9"))
    assert "it has no revision 'v9'" in said and "family.*.revision" in said


@pytest.mark.parametrize(
    ("fault", "why", "mend"),
    [
        (Fault("/tree/", status=500), "the hub answers HTTP 500", "run the same command again"),
        (Fault("/api/", status=429, headers={"Retry-After": "300"}), "asks to wait 300 s", "again"),
        (Fault("GET .*safetensors", cut=5000), f"download of {WEIGHTS} breaks off", "again"),
        (Fault("GET .*safetensors", stall=30), f"download of {WEIGHTS} breaks off", "again"),
        (Fault("GET .*safetensors", short=5000), "should be of size", "again"),
        (Fault("GET .*safetensors", spoil=True), f"{WEIGHTS} does not match its checksum and was removed", "again"),
        (Fault("GET .*tokenizer.json", spoil=True), "tokenizer.json does not match its checksum", "again"),
        (Fault("/api/", delay=30), "does not answer, ReadTimeout", "again"),
    ],
    ids=lambda value: value.match if isinstance(value, Fault) else "",
)
def test_a_failing_hub_is_a_sentence_and_the_same_command_goes_on(hub: Hub, fault: Fault, why, mend, monkeypatch):
    monkeypatch.setattr(client, "PATIENCE", 1.0)
    hub.faults = [fault]
    said = refused(ModelSpec(NAME))
    assert said.startswith(f"the model '{NAME}' cannot be read from the Hugging Face hub (") and why in said
    assert mend in said and "family.target.path=FOLDER" in said and "\n" not in said
    hub.faults.clear()
    ModelSpec(NAME).load()


def test_a_fault_that_passes_costs_a_line_and_a_download_goes_on_where_it_was_cut(hub: Hub, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)
    busy = {"Retry-After": "1"}
    hub.faults = [Fault("/api/", 1, status=429, headers=busy), Fault("GET .*safetensors", 2, cut=5000)]
    ModelSpec(NAME).load()
    assert caplog.messages == [
        f"{NAME}: the hub answers HTTP 429 and asks to wait 1 s; asking again for up to 15 s",
        *[f"{NAME}: the download of {WEIGHTS} broke off; it goes on"] * 2,
    ], "and no line of the client"
    ranges = [request for request in hub.requests if WEIGHTS in request and "bytes" in request]
    assert [found.split()[-1] for found in ranges] == ["bytes=5000-", "bytes=10000-"]


def test_a_gated_missing_or_private_name_says_what_to_do(hub: Hub):
    hub.gated.add(f"models/{NAME}")
    said = refused(ModelSpec(NAME))
    assert "it is gated, HTTP 401" in said
    assert f"accept its licence at {hub.endpoint}/{NAME} and run `hf auth login`" in said
    said = refused(ModelSpec("nobody/nothing"))
    assert "no such name, or a private one, HTTP 401" in said and "check family.*.path" in said
    assert "is neither a folder nor a valid name on the hub" in refused(ModelSpec("no good/name at/all"))


def test_a_hub_that_is_away_or_slow_is_replaced_by_the_cache_at_once(hub: Hub, caplog, monkeypatch):
    ModelSpec(NAME).load()
    client._commit.cache_clear()
    hub.faults = [Fault("/api/", delay=30)]
    monkeypatch.setattr(client, "IMPATIENCE", 1.0)
    started = time.monotonic()
    ModelSpec(NAME).pinned().load()
    assert time.monotonic() - started < 6
    line = f"the hub did not answer: using the cached snapshot {COMMIT} of {NAME}"
    assert [m for m in caplog.messages if "hub" in m] == [line]
    asked = len(hub.requests)
    client._commit.cache_clear()
    ModelSpec(NAME).load()
    assert len(hub.requests) == asked, "a hub that is away is not asked again for a while"


def test_a_name_that_was_withdrawn_goes_on_from_the_cache_with_a_line(hub: Hub, caplog):
    ModelSpec(NAME).load()
    client._commit.cache_clear()
    hub.repositories.clear()
    ModelSpec(NAME).load()
    assert f"the hub refuses it (HTTP 401): using the cached snapshot {COMMIT} of {NAME}" in caplog.messages


def test_a_hub_that_goes_away_between_configuration_and_weights_is_a_sentence(hub: Hub, monkeypatch):
    monkeypatch.setattr(client, "PATIENCE", 1.0)
    spec = ModelSpec(NAME).pinned()
    spec.tokenizer()
    hub.faults = [Fault("", status=503)]
    assert "the hub answers HTTP 503" in refused(spec)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set, and the cache has no complete snapshot" in refused(spec)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    hub.faults.clear()
    monkeypatch.setattr(client, "_away_until", 0.0)
    spec.load()


def test_a_cache_that_an_older_client_left_unfinished_is_told_from_a_whole_one(hub: Hub, tmp_path, monkeypatch):
    ModelSpec(NAME).load()
    (cached,) = (tmp_path / "cache").glob("models--*")
    for listing in cached.glob("trees/*"):
        listing.unlink()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub._tree_cache._IN_MEMORY_TREE_CACHE", {})
    client._commit.cache_clear()
    ModelSpec(NAME).load()
    (cached / "snapshots" / COMMIT / WEIGHTS).unlink()
    assert "the cache has no complete snapshot of it): unset it" in refused(ModelSpec(NAME))


def test_no_stage_is_charged_for_a_download_and_a_slow_one_has_a_line(hub: Hub, caplog, monkeypatch):
    from staff.store.cost import Meter

    caplog.set_level(logging.INFO)
    monkeypatch.setattr(patience, "QUIET", 0.5)
    hub.faults = [Fault("GET .*safetensors", delay=1.5)]
    with Meter() as meter:
        ModelSpec(NAME).repository.fetch([WEIGHTS])
    assert meter.cost.seconds < 1 < client.waited()
    assert caplog.messages == [f"waiting for {NAME} of the hub: 0.0 MB so far"]


# Data sets


CARD = """---
configs:
- config_name: {first}
  data_files: [{{split: train, path: {first}/train-*}}]
- config_name: {config}
  data_files:
  - {{split: train, path: {config}/train-*}}
  - {{split: {test}, path: {config}/{test}-*}}
---
"""


def publish(hub: Hub, cfg: Any, task: str, folder: Path) -> None:
    """Rows of a task under its own name: as Parquet by configuration where it has one, else as JSON Lines."""
    rows = [ROWS[task](i) for i in range(10)]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    test = cfg.test_split if cfg.test_split in ("test", "validation") else "test"
    if cfg.hub_config is None:
        files = {"train.jsonl": lines, f"{test}.jsonl": lines}
        if cfg.train_split != "train":
            del files[f"{test}.jsonl"]
    else:
        import datasets

        datasets.Dataset.from_list(rows).to_parquet(folder / "rows.parquet")
        content = (folder / "rows.parquet").read_bytes()
        places = ("aa/train", f"{cfg.hub_config}/train", f"{cfg.hub_config}/{test}")
        files = {f"{place}-00000-of-00001.parquet": content for place in places}
        files["README.md"] = CARD.format(first="aa", config=cfg.hub_config, test=test).encode()
    hub.repositories[f"datasets/{cfg.hub}"] = files


@pytest.mark.parametrize("name", ["bioinstruct", "dialogsum", "gsm8k", "wmt19_kk_en"])
def test_every_shipped_data_set_is_read_through_the_hub_and_again_without_it(
    hub: Hub, name: str, tmp_path, monkeypatch
):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    cfg = composed(f"task={name}", "task.data_dir=null").task
    publish(hub, cfg, name, tmp_path)
    task = instantiate(cfg, _convert_="all").pinned()
    assert task.source() == {"hub": cfg.hub, "commit": COMMIT} and task.revision == COMMIT
    parts = {split: task.load(split) for split in ("train", "test")}
    expected = {"train": 9, "test": 1} if name == "bioinstruct" else {"train": 10, "test": 10}
    assert {split: len(samples) for split, samples in parts.items()} == expected
    assert not any("/aa/" in request for request in hub.requests), "files of another configuration"
    hub.faults = [Fault("", status=503)]
    assert task.load("train") == parts["train"]
    if cfg.hub_config:
        with pytest.raises(UserError, match=rf"task.hub_config=zz: .* has aa, {cfg.hub_config}: name one of them"):
            replace(task, hub_config="zz").load("train")


def test_a_data_set_that_cannot_be_had_names_its_field_and_a_mend(hub: Hub):
    task = instantiate(composed("task=gsm8k").task, _convert_="all")
    with pytest.raises(UserError, match=r"data set 'openai/gsm8k' .*check task\.hub, .*give task\.data_dir"):
        task.load("train")


def test_labels_have_the_names_that_the_card_of_a_data_set_gives_them(hub: Hub, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    card = """---
configs:
- {config_name: default, data_files: [{split: train, path: "**/a.csv"}], sep: ";"}
dataset_info:
  config_name: default
  features:
  - {name: text, dtype: string}
  - {name: label, dtype: {class_label: {names: {'0': "no", '1': "yes"}}}}
---
"""
    files = {"README.md": card.encode(), "a.csv": b"text;label\nIs it?;1\n", "old.py": b"raise SystemExit"}
    hub.repositories["datasets/somebody/labels"] = files
    task = instantiate(composed("task=file", "task.hub=somebody/labels").task, _convert_="all")
    assert [row for _, row in task.rows("train")] == [{"text": "Is it?", "label": "yes"}]
    assert not any("old.py" in request for request in hub.requests)


# Whole runs


def test_a_run_records_the_commits_of_its_models_and_its_data(hub: Hub, run, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    publish(hub, composed("task.data_dir=null").task, "dialogsum", tmp_path)
    models = [f"family.{role}.path={NAME}" for role in ("target", "small")]
    identity = run("task.data_dir=null", *models, "method=random", "evaluation=none")["identity"]
    assert identity["data"]["source"] == {"hub": "knkarthick/dialogsum", "commit": COMMIT}
    for model in identity["models"].values():
        assert (model["hub"], model["commit"]) == (NAME, COMMIT)
    assert not any(WEIGHTS in request for request in hub.requests), "a random selection needs none"


def test_of_several_processes_one_asks_the_hub(hub: Hub, tmp_path: Path):
    repository = f"Repository({NAME!r}, revision={COMMIT!r})"
    fetch = f"from staff.runtime.hub import Repository; {repository}.fetch(['*.json', {WEIGHTS!r}])"
    away = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.endpoint, "HF_HUB_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", fetch]
    started = [subprocess.Popen(command, cwd=ROOT, env={**os.environ, **away}) for _ in range(3)]
    assert [process.wait(timeout=120) for process in started] == [0, 0, 0]
    assert sum(request.startswith("GET") and WEIGHTS in request for request in hub.requests) == 1
    assert len(hub.requests) == len(set(hub.requests)), "nothing is asked twice"


@pytest.mark.parametrize("chosen", [None, "0"])
def test_files_in_the_xet_store_come_over_http_unless_the_user_chooses_otherwise(hub: Hub, monkeypatch, chosen):
    import huggingface_hub
    from huggingface_hub.utils._runtime import is_xet_available

    monkeypatch.delenv("HF_HUB_DISABLE_XET", raising=False)
    if chosen is not None:
        monkeypatch.setenv("HF_HUB_DISABLE_XET", chosen)
    seen, real = [], huggingface_hub.snapshot_download

    def noted(**what: Any) -> Any:
        seen.append("local_files_only" in what or is_xet_available())
        return real(**what)

    before = is_xet_available()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", noted)
    ModelSpec(NAME).config()
    assert (False in seen) == (chosen is None) and is_xet_available() == before
