"""A recorded coreset is handed on, and what was handed on is what the run was fine-tuned on."""

import base64
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pandas as pd
import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

from experiments.campaign import pack
from experiments.export import WRITERS, chosen_samples, export
from experiments.export_model import FORMS
from experiments.recorded import recorded_run
from staff.data.task import Task
from staff.data.tokens import tokenize
from staff.errors import UserError
from staff.models.spec import ModelSpec
from staff.runtime.files import inert, original

TARGET = ModelSpec("pkg://staff/assets/tiny/target")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    results = tmp_path_factory.mktemp("exported")
    shutil.copytree(ROOT / "staff/assets/dialogsum", results / "data")
    return results


@pytest.fixture
def recorded(run, results: Path) -> Path:
    """The folder of a run that is carried out once."""
    return run("method=random", f"task.data_dir={results}/data", results=results)["folder"]


def record_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "metrics.json").read_text())


def test_a_coreset_goes_through_trl_as_the_tokens_that_the_run_was_fine_tuned_on(recorded: Path, tmp_path: Path):
    from trl import SFTConfig, SFTTrainer  # type: ignore[attr-defined]

    folder = export(recorded, "trl", tmp_path / "coreset")
    data = datasets.load_dataset("json", data_files=str(folder / "train.jsonl"), split="train")
    assert isinstance(data, datasets.Dataset) and data.column_names == ["id", "prompt", "completion"]
    arguments = SFTConfig(
        str(tmp_path / "trl"),
        max_steps=1,
        per_device_train_batch_size=2,
        max_length=512,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
    )
    tokenizer = TARGET.tokenizer()
    trainer = SFTTrainer(TARGET.load(), arguments, train_dataset=data, processing_class=tokenizer)
    ours = tokenize(chosen_samples(recorded_run(recorded)), tokenizer)
    assert trainer.train_dataset is not None and len(trainer.train_dataset) == 6
    for i, theirs in enumerate(trainer.train_dataset):
        assert [tokenizer.bos_token_id, *theirs["input_ids"]] == ours.row(i).tolist()
        assert [-100, *theirs["labels"]] == ours.labels(i).tolist()
    assert trainer.train().training_loss > 0


def read_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "train.jsonl").read_text("utf-8").splitlines()]


def test_every_format_holds_the_same_samples_and_a_card(results: Path, recorded: Path, tmp_path: Path):
    folders = {form: export(recorded, form, tmp_path / form) for form in WRITERS}
    lines = read_lines(folders["jsonl"])
    loaded = datasets.load_from_disk(folders["datasets"])
    assert isinstance(loaded, datasets.Dataset) and loaded.to_list() == lines
    assert pd.read_parquet(folders["parquet"] / "train.parquet").to_dict("records") == lines
    ids = [row["staff_id"] for row in lines]
    assert json.loads((folders["ids"] / "ids.json").read_text()) == ids
    assert [row["id"] for row in read_lines(folders["trl"])] == ids
    assert read_lines(folders["rows"]) == [
        {name: value for name, value in row.items() if not name.startswith("staff_")} for row in lines
    ]
    record = record_of(recorded)
    for folder in folders.values():
        card = (folder / "README.md").read_text()
        assert card.startswith("# 6 samples of dialogsum, chosen by random\n")
        for fact in (
            "6 of 24, pruning rate 0.75",
            record["run"]["fingerprint"],
            record["coreset"]["fingerprint"],
            f"rougeL {record['metrics']['rougeL']:.2f}",
            "**Licence**: the texts come from train.jsonl of dialogsum",
        ):
            assert fact in card
        assert str(results) not in card, "no folder of whoever made it"


def test_the_coreset_of_a_packed_run_is_that_of_its_folder(recorded: Path, tmp_path: Path):
    pack({recorded.name: recorded_run(recorded)}, tmp_path)
    first, again = export(recorded, "trl", tmp_path / "first"), export(tmp_path / "runs" / recorded.name, "trl")
    assert again == tmp_path / "runs" / recorded.name / "coreset-trl"
    for file in ("train.jsonl", "README.md"):
        assert (first / file).read_text() == (again / file).read_text()


def test_an_exported_list_of_ids_fine_tunes_as_the_run_did(run, results: Path, recorded: Path, tmp_path: Path):
    ids = export(recorded, "ids", tmp_path / "ids") / "ids.json"
    again, record = run("method=precomputed", f"method.path={ids}", results=results), record_of(recorded)
    assert again["finetuning"]["fingerprint"] == record["finetuning"]["fingerprint"]
    assert again["metrics"] == record["metrics"]


def test_what_cannot_be_exported_is_refused_in_a_sentence(results: Path, recorded: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"nothing holds no metrics.json .*: name the folder of a recorded run"):
        export(tmp_path / "nothing", "jsonl")
    (tmp_path / "here").mkdir()
    with pytest.raises(UserError, match=r"here exists: remove it, or name another folder with --output"):
        export(recorded, "jsonl", tmp_path / "here")

    data = results / "data/train.jsonl"
    kept = data.read_text()
    data.write_text(kept.replace("#Person1#", "#Person9#", 1))
    command = [sys.executable, "-m", "experiments.export", str(recorded), "--format", "datasets"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    data.write_text(kept)
    assert ended.returncode == 1 and ended.stderr.count("\n") == 1
    assert "the training samples of task 'dialogsum' are no longer those that" in ended.stderr
    assert not (recorded / "coreset-datasets").exists(), "nothing half-written"


def test_an_empty_coreset_is_refused(run):
    with pytest.raises(UserError, match=r"selected no sample: export a run with a coreset"):
        export(run("method=raw", "task.test_limit=1")["folder"], "ids")


def test_rows_go_with_their_number_region_and_scores_and_lose_no_field(run, results: Path, tmp_path: Path):
    lines = (results / "data/train.jsonl").read_text("utf-8").splitlines()[:24]
    rows = [{**json.loads(line), "staff_row": f"mine {i}", "=1+1": [i]} for i, line in enumerate(lines)]
    del rows[3]["topic"]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = [f"task.data_dir={tmp_path}", "evaluation=none", "pruning_rate=0.5"]
    run_folder = run("method=staff", "method.num_regions=3", "method.verification_budget=1", *data)["folder"]
    exported = read_lines(export(run_folder, "jsonl", tmp_path / "out"))
    pool = pd.read_parquet(run_folder / "samples.parquet").set_index("id")
    regions = pd.read_csv(run_folder / "regions.csv").set_index("region")
    assert {row["staff_staff_id"] for row in exported} == set(pool.index[pool["selected"]])
    for row in exported:
        own = {name: value for name, value in row.items() if not name.startswith("staff_staff_")}
        assert own == rows[row["staff_staff_row"] - 1]
        score = pool.loc[row["staff_staff_id"], "speculative"]
        assert row["staff_staff_speculative"] == score
        bounds = regions.loc[row["staff_staff_region"]]
        assert bounds["low"] - 1e-9 <= score <= bounds["high"] + 1e-9
        assert row["staff_staff_verified"] is None or row["staff_staff_verified"] > 0
    assert Counter(row["staff_staff_region"] for row in exported) == regions["picked"][lambda n: n > 0].to_dict()
    table = export(run_folder, "datasets", tmp_path / "table")
    assert "staff_staff_region" in datasets.load_from_disk(table).column_names  # type: ignore[operator]


def test_a_field_of_several_types_is_named_where_a_table_cannot_hold_it(run, tmp_path: Path):
    rows = [{"prompt": f"{i}?", "answer": f"{i}", "mixed": i if i % 2 else "text"} for i in range(24)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ["task=file", f"task.data_dir={tmp_path}", "evaluation=none", "pruning_rate=0.25"]
    run_folder = run("method=random", *data)["folder"]
    with pytest.raises(UserError, match=r"field 'mixed' has no one type .*choose --format jsonl"):
        export(run_folder, "parquet", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert len(read_lines(export(run_folder, "jsonl", tmp_path / "out"))) == 18


@given(st.text())
def test_a_cell_is_no_formula_and_gives_its_text_back(text: str):
    assert inert(text)[:1] not in ("=", "+", "-", "@", "\t", "\r") and original(inert(text)) == text


# ---------------------------------------------------------------- the fine-tuned target


def test_an_exported_model_gives_the_stored_answers_token_by_token_from_any_folder(
    run, tmp_path: Path, monkeypatch
):
    """Answers end at the end of turn of the chat template, which the base model does not know of."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = with_template(tmp_path / "model")
    settings = ("family.prompt_format=chat", *(f"family.{role}.path={model}" for role in ("target", "small")))
    settings += (
        "task.max_new_tokens=8",
        "finetune.epochs=2",
        "finetune.learning_rate=0.01",
        "task.metrics=[rougeL]",
    )
    recorded = run("method=random", *settings)
    answers = pd.read_parquet(recorded["folder"] / "predictions.parquet").set_index("id")
    task = Task(**{k: v for k, v in recorded["config"]["task"].items() if k != "_target_"})
    for form in FORMS:
        export(recorded["folder"], form, tmp_path / "exported" / form)
    shutil.move(tmp_path / "exported", tmp_path / "elsewhere")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")

    raw, differs = TARGET.load(), False
    kinds: dict[str, Any] = {"adapter": AutoPeftModelForCausalLM, "merged": AutoModelForCausalLM}
    for form, kind in kinds.items():
        exported = str(tmp_path / "elsewhere" / form)
        loaded, tokenizer = kind.from_pretrained(exported).eval(), AutoTokenizer.from_pretrained(exported)
        read = tokenize(test := task.load("test"), tokenizer, "chat")
        # The adapter's generation is configured by its base model; a merged model has a configuration of its own.
        ends = {} if form == "merged" else {"eos_token_id": sorted({tokenizer.eos_token_id, *read.end_tokens})}
        for sample, prompt in zip(test, read.prompts(), strict=True):
            turns = [{"role": "user", "content": sample.prompt}]
            shown = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            assert tokenizer(shown, add_special_tokens=False)["input_ids"] == list(prompt)
            asked = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **ends}
            said = loaded.generate(input_ids=torch.tensor([prompt]), **asked)[0, len(prompt) :].tolist()
            stop = next((at for at, token in enumerate(said) if token in read.end_tokens), len(said))
            assert stop == answers.loc[sample.id, "tokens"] and len(said) <= stop + 1
            assert (
                tokenizer.decode(said[:stop], skip_special_tokens=True).strip()
                == answers.loc[sample.id, "prediction"]
            )
            before = raw.generate(input_ids=torch.tensor([prompt]), **{**asked, **ends})[0, len(prompt) :].tolist()
            differs |= before != said
        card = (tmp_path / "elsewhere" / form / "README.md").read_text()
        assert f"| rougeL | {recorded['metrics']['rougeL']:.4g} |" in card
        assert recorded["coreset"]["fingerprint"] in card and "6 of 24" in card and "learning_rate:" in card
        assert kind.__name__ in card and str(tmp_path) not in card
    assert differs, "it is not the raw model"


def with_template(folder: Path) -> Path:
    """The embedded target with a chat template whose end of turn, "#", is a token of its vocabulary."""
    shutil.copytree(ROOT / "staff/assets/tiny/target", folder)
    tokenizer = TARGET.tokenizer()
    tokenizer.add_tokens([AddedToken("#", special=False, normalized=False)])
    assert len(tokenizer) == len(TARGET.tokenizer())
    asked = "{% if add_generation_prompt %}assistant:{% endif %}"
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}:{{ m.content }}#{% endfor %}" + asked
    tokenizer.save_pretrained(folder)
    return folder


def test_what_cannot_be_handed_on_of_a_model_is_one_sentence(run, results: Path, recorded: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"is not in /nowhere: name the store with --store"):
        export(recorded, "merged", tmp_path / "out", store=Path("/nowhere"))
    chosen = run("method=random", f"task.data_dir={results}/data", "evaluation=none", results=results)["folder"]
    with pytest.raises(UserError, match=r"fine-tuned no target: export a run with an evaluation"):
        export(chosen, "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    moved = shutil.copytree(results, tmp_path / "moved")
    assert (export(moved / "runs" / recorded.name, "adapter") / "adapter_model.safetensors").is_file()


def test_all_weights_are_exported_as_they_are(run, tmp_path: Path):
    folder = run("method=random", "finetune=full", "task.test_limit=1")["folder"]
    with pytest.raises(UserError, match=r"finetune.kind=full .* leaves no adapter: choose --format merged"):
        export(folder, "adapter", tmp_path / "out")
    made = ModelSpec(str(export(folder, "merged", tmp_path / "out"))).load().state_dict()
    (trained,) = folder.parents[1].glob("artifacts/finetune/*/model.safetensors")
    for name, weights in ModelSpec(str(trained.parent)).load().state_dict().items():
        assert torch.equal(made[name], weights)


# ---------------------------------------------------------------- the hub


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as takes an upload: it keeps the files of every commit, and who sent them."""

    files: ClassVar[dict[str, bytes]] = {}
    asked: ClassVar[list[tuple[str, Any]]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        kind, _, rest = self.path.removeprefix("/api/").partition("/")
        answer: dict[str, Any] = {}
        if "/commit/" in rest:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    content = base64.b64decode(line["value"]["content"])
                    self.files[f"{kind}/{rest.partition('/commit/')[0]}/{line['value']['path']}"] = content
            answer = {"commitUrl": f"http://{self.headers['Host']}/{rest}", "commitOid": "0" * 40}
        elif "/preupload/" in rest:
            modes = {True: "lfs", False: "regular"}
            answer["files"] = [
                {**file, "uploadMode": modes[file["path"].endswith(".parquet")], "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
        elif rest.endswith("/objects/batch"):
            upload = {"upload": {"href": f"http://{self.headers['Host']}/{kind}/large.parquet"}}
            objects = [{**each, "actions": upload} for each in json.loads(body)["objects"]]
            answer = {"transfer": "basic", "objects": objects}
        elif self.path == "/api/repos/create":
            said = json.loads(body)
            self.asked.append((self.headers["Authorization"], said))
            kind = "datasets/" if said.get("type") == "dataset" else ""
            answer = {"url": f"http://{self.headers['Host']}/{kind}{said['organization']}/{said['name']}"}
        self.answer(200, json.dumps(answer).encode())

    def do_PUT(self) -> None:
        self.files[self.path] = self.rfile.read(int(self.headers["Content-Length"]))
        self.answer(200, b"")

    def do_GET(self) -> None:
        rest = self.path.removeprefix("/api/").partition("/")[2]
        if "/tree/" in rest or "/resolve/" in rest:
            self.do_HEAD()
        else:
            found = {"id": "/".join(rest.split("/")[:2]), "sha": "0" * 40, "siblings": []}
            self.answer(200, json.dumps(found).encode())

    def do_HEAD(self) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", "EntryNotFound")
        self.end_headers()

    def answer(self, status: int, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


def test_an_upload_is_private_and_holds_model_tokenizer_and_card(recorded: Path, tmp_path: Path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    away = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_TOKEN": "hf_mine", "HF_HUB_OFFLINE": "0"}
    away |= {"HF_HUB_DISABLE_XET": "1"}
    code = f"""if True:
        from pathlib import Path
        from experiments.export import export
        for form in ("datasets", "merged"):
            export(Path({str(recorded)!r}), form, Path({str(tmp_path)!r}) / form, push_to=f"me/{{form}}")
    """
    ended = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **away}, capture_output=True, text=True
    )
    server.shutdown()
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert all(token == "Bearer hf_mine" and said["visibility"] == "private" for token, said in Hub.asked)
    card = Hub.files["models/me/merged/README.md"].decode()
    assert card == (tmp_path / "merged/README.md").read_text()
    written = tmp_path / "merged/model.safetensors"
    assert Hub.files["models/me/merged/model.safetensors"] == written.read_bytes()
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= {
        name.removeprefix("models/me/merged/") for name in Hub.files
    }
    (data,) = (content for name, content in Hub.files.items() if name.endswith(".parquet"))
    pushed = pd.read_parquet(io.BytesIO(data)).to_dict("records")
    assert pushed == datasets.load_from_disk(tmp_path / "datasets").to_list()  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("form", "variables", "sentence"),
    [
        ("jsonl", {}, "--push-to-hub uploads datasets, adapter, merged, not --format jsonl"),
        ("datasets", {"HF_HUB_OFFLINE": True}, "--push-to-hub needs the hub, and HF_HUB_OFFLINE is set"),
        ("datasets", {}, "--push-to-hub needs a token that may write: log in"),
        ("adapter", {"token": "hf_mine"}, "the model target is not on the hub, where its adapter would lack it"),
    ],
)
def test_what_cannot_be_pushed_is_refused_before_anything_is_written(
    recorded: Path, tmp_path: Path, monkeypatch, form: str, variables: dict[str, Any], sentence: str
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", variables.get("HF_HUB_OFFLINE", False))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: variables.get("token"))
    with pytest.raises(UserError, match=sentence):
        export(recorded, form, tmp_path / "out", push_to="me/mine")
    assert not (tmp_path / "out").exists()
