"""The fine-tuned target of a run is handed on, alone or to the hub."""

import base64
import io
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import datasets
import pandas as pd
import pytest
import torch
from conftest import ROOT
from tokenizers import AddedToken

from experiments.export import export
from experiments.export_model import FORMS
from staff.data.task import Task
from staff.data.tokens import tokenize
from staff.errors import UserError
from staff.models.spec import ModelSpec

TARGET = ModelSpec("pkg://staff/assets/tiny/target")


@pytest.fixture
def results(recorded: Path) -> Path:
    return recorded.parents[1]


def test_an_exported_model_gives_the_stored_answers_token_by_token_from_any_folder(
    run, tmp_path: Path, monkeypatch
):
    """Answers end at the end of turn of the chat template, which the base model does not know of."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = with_template(tmp_path / "model")
    settings = ("family.prompt_format=chat", *(f"family.{role}.path={model}" for role in ("target", "small")))
    settings += ("task.max_new_tokens=8", "finetune.epochs=2", "finetune.learning_rate=0.01")
    recorded = run("method=random", "task.metrics=[rougeL]", *settings)
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
            said = greedy(loaded, prompt, ends)
            stop = next((at for at, token in enumerate(said) if token in read.end_tokens), len(said))
            assert stop == answers.loc[sample.id, "tokens"] and len(said) <= stop + 1
            text = tokenizer.decode(said[:stop], skip_special_tokens=True).strip()
            assert text == answers.loc[sample.id, "prediction"]
            differs |= greedy(raw, prompt, ends) != said
        card = (tmp_path / "elsewhere" / form / "README.md").read_text()
        assert f"| rougeL | {recorded['metrics']['rougeL']:.4g} |" in card
        assert recorded["coreset"]["fingerprint"] in card and "6 of 24" in card and "learning_rate:" in card
        assert kind.__name__ in card and str(tmp_path) not in card
    assert differs, "it is not the raw model"


def greedy(model: Any, prompt: Sequence[int], options: dict[str, Any]) -> list[int]:
    """At most 8 tokens that the model writes after a prompt."""
    asked = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(input_ids=torch.tensor([prompt]), **asked)[0, len(prompt) :].tolist()


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
    with pytest.raises(UserError, match=r"is not in \S+/nowhere: name the store with --store"):
        export(recorded, "merged", tmp_path / "out", store=tmp_path / "nowhere")
    chosen = run("method=random", f"task.data_dir={results}/data", "evaluation=none", results=results)["folder"]
    with pytest.raises(UserError, match=r"fine-tuned no target: export a run with an evaluation"):
        export(chosen, "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    moved = shutil.copytree(results, tmp_path / "moved")
    assert (export(moved / "runs" / recorded.name, "adapter") / "adapter_model.safetensors").is_file()


def test_all_weights_are_exported_as_they_are(run, tmp_path: Path):
    recorded = run("method=random", "finetune=full", "task.test_limit=1")
    folder = recorded["folder"]
    with pytest.raises(UserError, match=r"finetune.kind=full .* leaves no adapter: choose --format merged"):
        export(folder, "adapter", tmp_path / "out")
    made = ModelSpec(str(export(folder, "merged", tmp_path / "out"))).load().state_dict()
    (trained,) = folder.parents[1].glob("artifacts/finetune/*/model.safetensors")
    for name, weights in ModelSpec(str(trained.parent)).load().state_dict().items():
        assert torch.equal(made[name], weights)
    (sample, *_) = Task(**{k: v for k, v in recorded["config"]["task"].items() if k != "_target_"}).load("test")
    (read,) = tokenize([sample], TARGET.tokenizer(), "plain").prompts()
    tokenizer = ModelSpec(str(tmp_path / "out")).tokenizer()
    assert tokenizer(sample.prompt)["input_ids"] == list(read), "the begin token is there, as in training"


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
