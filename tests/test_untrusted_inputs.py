"""Inputs that nobody vouches for: models, names, text, secrets, and whatever fuzzing finds."""

import ast
import base64
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL
from safetensors.torch import load_file
from support.fuzzing_files import PROPERTIES, fuzz

from experiments.report.__main__ import write
from experiments.report.records import collect
from staff.errors import UserError
from staff.models.spec import ModelSpec

# ---------------------------------------------------------------- what is never run, followed or told


TINY = ModelSpec("pkg://staff/assets/tiny/small").local or Path()
EVIL = "from pathlib import Path\nPath(__file__).with_name('executed').touch()\n"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with the small tiny model, and beside it code that leaves a trace where it is run."""
    folder = tmp_path / "model"
    shutil.copytree(TINY, folder)
    (folder / "evil.py").write_text(EVIL)
    return folder


def change(file: Path, **settings: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def pickled_behind_an_index(folder: Path) -> None:
    pickled(folder)
    index = {
        "metadata": {},
        "weight_map": dict.fromkeys(load_file(TINY / "model.safetensors"), "pytorch_model.bin"),
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def pickled_by_configuration(folder: Path) -> None:
    pickled(folder)
    (folder / "pytorch_model.bin").rename(folder / "adapter_model.bin")
    change(folder / "config.json", transformers_weights="adapter_model.bin")


def weights_of_another_folder(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder.parent / "other.safetensors")
    index = dict.fromkeys(load_file(TINY / "model.safetensors"), "../other.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def an_adapter(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model

    get_peft_model(ModelSpec(str(TINY)).load(), LoraConfig(target_modules=["v_proj"])).save_pretrained(folder)


def code_for_the_model(folder: Path) -> None:
    code = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    change(folder / "config.json", model_type="evil", auto_map=code)


def code_for_the_tokenizer(folder: Path) -> None:
    code = {"AutoTokenizer": ["evil.Tokenizer", None]}
    change(folder / "tokenizer_config.json", tokenizer_class="EvilTokenizer", auto_map=code)


REFUSED: dict[Callable[[Path], None], str] = {
    pickled: "it has no safetensors weights, and a pickle, which can contain code, is never read; convert",
    pickled_behind_an_index: "it names weights in 'pytorch_model.bin', not a safetensors file beside it",
    pickled_by_configuration: "it names weights in 'adapter_model.bin', not a safetensors file beside it",
    weights_of_another_folder: "it names weights in '../other.safetensors', not a safetensors file beside it",
    an_adapter: "it has an adapter, adapter_config.json; merge it into the weights, or remove it",
    code_for_the_model: "it needs code of its own, which is never executed; choose a model",
    code_for_the_tokenizer: "it needs code of its own, which is never executed; choose a model",
}


@pytest.mark.parametrize("spoil", REFUSED, ids=lambda spoil: spoil.__name__)
def test_a_model_with_a_pickle_an_adapter_or_code_is_refused_in_a_sentence(model, monkeypatch, spoil):
    monkeypatch.setattr(
        "builtins.input", lambda question: "yes"
    )  # what transformers asks whoever does not forbid it
    spoil(model)
    spec = ModelSpec(str(model))
    with pytest.raises(UserError, match=REFUSED[spoil]) as raised:
        spec.load(), spec.tokenizer()
    assert str(raised.value).startswith(f"the model in {model} cannot be loaded: ")
    assert not (model / "executed").exists()


def test_code_beside_a_model_that_needs_none_is_not_run(model: Path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda question: "yes")
    change(model / "config.json", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    (model / "custom_generate").mkdir()
    (model / "custom_generate/generate.py").write_text(EVIL)
    spec = ModelSpec(str(model))
    spec.load(), spec.tokenizer()
    assert not list(model.rglob("executed"))


def test_an_attention_that_would_be_fetched_from_the_hub_is_refused():
    with pytest.raises(UserError, match="attention='someone/kernel' is unknown: choose sdpa or eager or"):
        ModelSpec(str(TINY), attention="someone/kernel")


# What could read a pickle, or run text as code; what must be told not to.
FORBIDDEN = {
    "pickle",
    "dill",
    "cloudpickle",
    "shelve",
    "marshal",
    "read_pickle",
    "to_pickle",
    "eval",
    "exec",
}
GUARDED = {"weights_only": True, "trust_remote_code": False, "allow_pickle": False, "shell": False}


def lapses(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names if alias.name.partition(".")[0] in FORBIDDEN)
            case ast.ImportFrom(module=str(module), names=names) if module.partition(".")[0] in FORBIDDEN:
                yield from (alias.name for alias in names if alias.name != "UnpicklingError")
            case ast.Call(func=ast.Name(id=name)) if name in FORBIDDEN:
                yield name
            case ast.Call(func=ast.Attribute(attr=name)) if name in FORBIDDEN - {"eval"}:  # model.eval() is another
                yield name
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="load"), keywords=given):
                if "weights_only" not in {keyword.arg for keyword in given}:
                    yield "torch.load without weights_only"
            case ast.keyword(arg=str(name), value=value) if name in GUARDED:
                if not isinstance(value, ast.Constant) or value.value is not GUARDED[name]:
                    yield f"{name} other than {GUARDED[name]}"
            case ast.Dict(keys=keys, values=values):
                for key, value in zip(keys, values):
                    if isinstance(key, ast.Constant) and key.value in GUARDED:
                        yield from lapses(f"f({key.value}={ast.unparse(value)})")
            case ast.Attribute(value=ast.Name(id=name), attr="from_pretrained") if "Model" in name:
                yield f"{name}.from_pretrained"


def test_the_sources_read_no_pickle_and_run_no_text_as_code():
    found = {}
    for folder in ("staff", "baselines", "experiments", "hydra_plugins"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            found[file.relative_to(ROOT).as_posix()] = set(lapses(file.read_text(encoding="utf-8")))
    assert {file: lapse for file, lapse in found.items() if lapse} == {
        "staff/models/weights.py": {"AutoModelForCausalLM.from_pretrained"},  # the one place, safetensors alone
        "staff/models/adapters.py": {"PeftModel.from_pretrained"},  # our own, and PEFT has weights_only=True
    }


@pytest.mark.parametrize(
    "source",
    [
        *("import pickle", "from dill import loads", "pandas.read_pickle(x)", "eval(text)", "torch.load(file)"),
        *("torch.load(file, weights_only=False)", "np.load(x, allow_pickle=True)", "run(x, shell=True)"),
        *("{'trust_remote_code': True}", "load(trust_remote_code=asked)", "AutoModel.from_pretrained(x)"),
    ],
)
def test_such_a_source_would_be_found(source: str):
    assert list(lapses(source))


# Names


HOSTILE = ("<img src=x onerror=alert(1)>", "../../escaped", "/tmp/escaped", "..\\escaped", "a\x00b", "$(touch x)")


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.found |= {tag, *(name for name, _ in attrs)}


def test_names_and_text_of_samples_never_leave_their_folder_or_become_markup(run, tmp_path: Path):
    data = tmp_path / "data"
    data.mkdir()
    rows = [{"id": name, "question": name, "answer": name} for name in HOSTILE]
    for split in ("train", "test"):
        (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = ("task=file", f"task.data_dir={data}", "task.prompt='{question}'", "task.answer='{answer}'")
    names = ("task.id_field=id", "task.name=../../escaped", "family.name=/tmp/escaped", "task.hub='../escaped'")
    before = set(tmp_path.rglob("*"))
    chosen = ("family=../family/tiny", "method=../method/random", "pruning_rate=0.5", *settings, *names)
    record = run(*chosen)
    results = tmp_path / "results"
    page = write(results, collect(results)).read_text()
    made = set(tmp_path.rglob("*")) - before
    assert all(path.is_relative_to(results) for path in made)
    assert record["folder"].parent == results / "runs" and record["run"]["name"].startswith("family-tiny-file-")
    assert not any("escaped" in path.name for path in made) and not Path("/tmp/escaped").exists()
    tags = Tags()
    tags.feed(page)
    assert "onerror" not in tags.found and "&lt;img src=x" in page


# Secrets


SECRETS = {"WANDB_API_KEY": "5ec2e7" + "a1" * 17, "HF_TOKEN": "hf_" + "SeCrEt" * 6}


class Refuses(BaseHTTPRequestHandler):
    """A hub and a W&B server that take no token, and remember what they were shown."""

    shown: set[str] = set()  # noqa: RUF012

    def answer(self) -> None:
        self.shown.add(self.headers.get("Authorization", ""))
        self.send_error(401)

    do_GET = do_POST = do_HEAD = do_PUT = answer

    def log_message(self, *arguments: Any) -> None: ...


@pytest.fixture
def server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Refuses) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()


def test_secrets_are_used_and_never_written_down(tmp_path: Path, server: str):
    """Of two jobs one is recorded, though W&B refuses its key, and one fails, as the hub refuses its token."""
    environment = {**os.environ, **SECRETS, "WANDB_BASE_URL": server, "HF_ENDPOINT": server, "HF_HUB_OFFLINE": "0"}
    environment |= {"WANDB_MODE": "online", "WANDB_INIT_TIMEOUT": "5", "HF_HOME": str(tmp_path / "hub")}
    jobs = (
        "method=raw",
        "family=tiny,gemma",
        "task.data_dir=pkg://staff/assets/dialogsum",
        f"results_dir={tmp_path}/results",
    )
    command = [sys.executable, "-m", "experiments.run", "-m", *SMALL, *jobs]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert "1 of 2 jobs failed" in done.stdout and "it is gated" in done.stdout, done.stdout + done.stderr
    write(tmp_path / "results", collect(tmp_path / "results"))

    in_base64 = base64.b64encode(f"api:{SECRETS['WANDB_API_KEY']}".encode()).decode()
    assert Refuses.shown >= {f"Bearer {SECRETS['HF_TOKEN']}", f"Basic {in_base64}"}
    written = {file: file.read_bytes() for file in (tmp_path / "results").rglob("*") if file.is_file()}
    assert {"metrics.json", "report.html"} <= {file.name for file in written}
    assert {".wandb", ".txt", ".log"} <= {file.suffix for file in written}
    written |= {Path(name): text.encode() for name, text in (("stdout", done.stdout), ("stderr", done.stderr))}
    for secret in (*SECRETS.values(), in_base64):
        assert [file for file, content in written.items() if secret.encode() in content] == []


# ---------------------------------------------------------------- fuzzing


FINDS: list[tuple[str, dict[str, Any]]] = [
    ("a_listed_coreset_is_read_or_refused_in_a_sentence", {"file": (".json", b"58343"), "pool_size": None}),
    ("a_listed_coreset_is_read_or_refused_in_a_sentence", {"file": (".csv", b'"two\nlines",b\n'), "pool_size": 2}),
    (
        "a_file_gives_samples_or_a_sentence",
        {"content": b'{"two\\nlines": ""}', "prompt": "{question}", "answer": "{answer}", "settings": {}},
    ),
    ("a_table_gives_rows_or_a_sentence", {"table": (".csv", b"question,answer\rWhy?,So.\r\x1d<,=1+1\r\n")}),
    ("a_table_gives_rows_or_a_sentence", {"table": (".csv", b"a,a,b\r\x1d<,=1+1\r\n")}),
    (
        "an_exported_coreset_comes_back_and_stays_in_its_folder",
        {"samples": [("two\rlines", "a", "b"), ("=1+1", "a", "b"), ("'=1", "a", "b")], "talk": False},
    ),
    (
        "regions_hold_every_sample_once_and_no_budget_is_exceeded",
        {
            "scores": [3.2e16, -1.1e16, float(np.finfo(np.float32).max)],
            "num_regions": 49,
            "ratios": [np.nan, 1e-4, np.nan] + [1.0] * 17,
            "budget": 16,
            "as_the_authors": True,
        },
    ),
]
"""What fuzzing found, of each property."""


@pytest.mark.parametrize("name", PROPERTIES)
def test_whatever_comes_in(name: str, tmp_path: Path):
    fuzz(name, tmp_path, examples=40, start=0)


@pytest.mark.parametrize(("name", "values"), FINDS)
@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_what_fuzzing_found_stays_mended(name: str, values: dict[str, Any], tmp_path: Path):
    PROPERTIES[name][0](tmp_path, **values)
