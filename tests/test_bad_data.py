"""Bad data: a table of what can be wrong with a task's files, and the sentence that each must give."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.tiny import farthest, pool_of_sums, tuned, weights_of

from staff.data.samples import Sample
from staff.data.splits import answerable, fitting
from staff.data.task import Task
from staff.data.tokens import TokenizedSamples, tokenize
from staff.errors import UserError
from staff.models.adapters import LoraSpec, fresh_lora
from staff.models.family import Family
from staff.models.spec import ModelSpec
from staff.scoring.passes import score_samples
from staff.signals import named

TASK = Task("t", "Q: {question}\nA:", " {answer}", ["rougeL"], 8, data_dir="x")
GOOD = {"question": "one?", "answer": "two"}
TINY = "pkg://staff/assets/tiny/target"

# What stands in line 2, after a good line; None: `GOOD` again. Then settings of the task, and the sentence.
LINES: dict[str, tuple[object, dict[str, Any], str]] = {
    "not UTF-8": (b'{"question": "\xff"}', {}, r"line 2: not UTF-8 \(byte 14\); convert the file to UTF-8"),
    "Latin-1": ('{"question": "é"}'.encode("latin-1"), {}, r"line 2: not UTF-8 \(byte 14\)"),
    "UTF-16": ('{"question": "x"}'.encode("utf-16"), {}, r"line 2: not UTF-8 \(byte 0\)"),
    "gzip": (b"\x1f\x8b\x08\x00", {}, r"line 2: not UTF-8 \(byte 1\)"),
    "not JSON": ("question: one?", {}, r"line 2: not JSON \(Expecting value, column 1\); each line must be"),
    "single quotes": ("{'question': 'one?'}", {}, "line 2: not JSON"),
    "cut off in the middle": ('{"question": "one?", "ans', {}, r"line 2: not JSON \(Invalid control character"),
    "two objects": ('{"question": "a"} {"question": "b"}', {}, r"line 2: not JSON \(Extra data, column 19\)"),
    "a trailing comma": (  # Python 3.13 has its own words
        '{"question": "a",}',
        {},
        r"line 2: not JSON \((a comma before a closing bracket|Illegal trailing comma before end of object)",
    ),
    "a comma between lines": ('{"question": "a"},', {}, r"line 2: not JSON \(a comma behind the object, column"),
    "a key twice": ('{"question": {"a": 1, "a": 2}}', {}, r"line 2: not JSON \(the key 'a' comes twice\)"),
    "a tab inside a string": ('{"question": "a\tb"}', {}, r"line 2: not JSON \(Invalid control character"),
    "pretty-printed": ("{\n  'question': 1}", {}, "line 2: not JSON"),
    "a list": ("[1, 2]", {}, "line 2: a list, not an object; each line must be {...}, and an array be named"),
    "a text": ('"one?"', {}, "line 2: a str, not an object"),
    "a null": ("null", {}, "line 2: a NoneType, not an object"),
    "nested too deep": ("[" * 100_000, {}, r"line 2: not JSON \(nested too deep\)"),
    "a number too long": ('{"question": ' + "9" * 5_000 + "}", {}, r"line 2: not JSON \(Exceeds the limit"),
    "a missing field": ({"question": "one?"}, {}, r"line 2: no field 'answer' \(wanted by task.answer\); it has"),
    "no field at all": ({}, {}, r"line 2: no field 'question' \(wanted by task.prompt\); it has none"),
    "a null field": ({**GOOD, "answer": None}, {}, "field 'answer' is NoneType, not text .*; fill it or remove"),
    "NaN for text": ('{"question": NaN, "answer": "x"}', {}, "line 2: field 'question' is nan, not text"),
    "a list for text": ({**GOOD, "answer": ["x"]}, {}, "line 2: field 'answer' is list, not text"),
    "an object for text": ({**GOOD, "answer": {"text": "x"}}, {}, "line 2: field 'answer' is dict, not text"),
    "an empty answer": ({**GOOD, "answer": ""}, {}, "line 2: the answer is empty"),
    "an answer of white space": ({**GOOD, "answer": " \n\u00a0"}, {}, "line 2: the answer is empty"),
    "an empty prompt": ({**GOOD, "question": ""}, {"prompt": "{question}"}, "line 2: the prompt is empty"),
    "half a sign": ('{"question": "\\ud83d", "answer": "x"}', {}, "field 'question' has half a surrogate pair"),
    "a name as long as a book": ({"x" * 1_000_000: "y"}, {}, r"^.{,400}$"),
    "a nested name": ({"question": {"kk": "x"}}, {"prompt": "{question[en]}"}, r"no field 'question\[en\]'"),
    "a nested field of a text": (None, {"prompt": "{question[en]}"}, r"line 1: no field 'question\[en\]'"),
    "a nested null": ({"question": {"en": None}}, {"prompt": "{question[en]}"}, r"'question\[en\]' is NoneType"),
    "an id twice": ({**GOOD, "id": "a"}, {"id_field": "id"}, r"the id 'a' comes twice \(task.id_field=id\)"),
    "an id as text and as number": ({**GOOD, "id": "7"}, {"id_field": "id"}, "line 2: the id '7' comes twice"),
    "no id": (GOOD, {"id_field": "id"}, r"line 2: no field 'id' \(wanted by task.id_field\)"),
    "a null id": ({**GOOD, "id": None}, {"id_field": "id"}, "line 2: field 'id' is NoneType, not an id"),
    "an empty id": ({**GOOD, "id": ""}, {"id_field": "id"}, "line 2: field 'id' is empty, not an id"),
    "a list for an id": ({**GOOD, "id": [1]}, {"id_field": "id"}, "line 2: field 'id' is list, not an id"),
    "a reference missing": (None, {"references": ["r1"]}, r"line 1: no field 'r1' \(wanted by task.references\)"),
    "an unknown field": (None, {"prompt": "{quest}"}, r"no field 'quest' \(wanted by task.prompt\); it has"),
    "a nested id twice": ({**GOOD, "in": {"id": 1}}, {"id_field": "in[id]"}, "line 2: the id '1' comes twice"),
    "a position for a field": (None, {"prompt": "{}"}, r"^task.prompt='{}': '{}' names no field; write {field} or"),
    "an attribute for a field": (None, {"prompt": "{question.x}"}, "^task.prompt=.*'{question.x}' names no field"),
    "a format for a field": (None, {"answer": "{answer:>9}"}, "^task.answer=.*'{answer:>9}' names no field"),
    "a conversion for a field": (None, {"answer": "{answer!r}"}, "^task.answer=.*'{answer!r}' names no field"),
    "a brace left open": (None, {"prompt": "{question"}, "^task.prompt='{question' is not a template"),
}  # fmt: skip


def write(folder: Path, *lines: object) -> Path:
    folder.mkdir(exist_ok=True)
    for name in ("train.jsonl", "test.jsonl"):
        with (folder / name).open("wb") as file:
            for line in lines:
                text = line if isinstance(line, str | bytes) else json.dumps(line)
                file.write((text.encode() if isinstance(text, str) else text) + b"\n")
    return folder


@pytest.mark.parametrize("case", LINES)
def test_a_bad_line_or_template_gives_its_sentence(tmp_path: Path, case: str):
    bad, fields, sentence = LINES[case]
    first = {**GOOD, "id": {"an id as text and as number": 7, "no id": "b"}.get(case, "a")}
    first |= {"question": {"en": "x"}} if isinstance(bad, dict) and isinstance(bad.get("question"), dict) else {}
    first |= {"in": {"id": 1}}
    if case == "a null id":
        first["id"] = "None"
    write(tmp_path, first, GOOD if bad is None else bad)
    with pytest.raises(UserError, match=sentence) as raised:
        replace(TASK, data_dir=str(tmp_path), **fields).load("test")
    said = str(raised.value)
    assert len(said) < 1_000 and "\n" not in said
    assert said.startswith(f"{tmp_path / 'test.jsonl'}, line ") or sentence.startswith("^task.")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "train.jsonl does not exist: task.data_dir must be a folder with train.jsonl"),
        (b"", "task 't': the train split is empty; check task.data_dir"),
        (b"\n \n\r\n", "the train split is empty"),
        (b'[\n{"question": "one?"}\n]', "line 1: not JSON"),
    ],
)
def test_a_file_without_samples_is_refused(tmp_path: Path, content: bytes | None, sentence: str):
    if content is not None:
        (tmp_path / "train.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=sentence):
        replace(TASK, data_dir=str(tmp_path)).load("train")


@pytest.mark.parametrize("settings", [{"prompt": 3}, {"answer": None}, {"references": "summary"}])
def test_a_setting_that_is_no_template_is_refused(settings: dict[str, Any]):
    (name, value), *_ = settings.items()
    with pytest.raises(UserError, match=f"task.{name}={value!r} must be a (template|list of fields)"):
        replace(TASK, **settings)


CURIOUS = {
    "control characters": "a\x00\x01\x1b[31mb\x7f\x85\u2028c",
    "right to left": "\u202eשלום\u202c مرحبا",
    "four bytes": "𝔘𝔫𝔦 🧑🏽‍🚀 𐍈",
    "combining": "e\u0301\u0327 \ufeff\u200b",
    "quotes and markup": "\"'`</script><b>{}%s\\n,;\t",
}


@pytest.mark.parametrize("kind", CURIOUS)
def test_curious_characters_pass_unchanged_through_reading_and_tokens(tmp_path: Path, kind: str):
    text = CURIOUS[kind]
    row = {"question": text, "answer": text, "id": text}
    write(tmp_path, row, json.dumps({**row, "id": f"{text}2"}, ensure_ascii=False))
    samples = replace(TASK, data_dir=str(tmp_path), id_field="id").load("train")
    assert [(s.id, s.prompt, s.answer) for s in samples] == [
        (text, f"Q: {text}\nA:", f" {text}"),
        (f"{text}2", f"Q: {text}\nA:", f" {text}"),
    ]
    tokenizer = ModelSpec(TINY).tokenizer()
    tokens = tokenize(samples, tokenizer)
    start = tokens.prompt_lengths[0]
    assert tokenizer.decode(tokens.row(0)[start:-1], clean_up_tokenization_spaces=False) == f" {text}"


def test_a_file_that_begins_with_a_byte_order_mark_is_read(tmp_path: Path):
    write(tmp_path, b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), GOOD)
    assert len(replace(TASK, data_dir=str(tmp_path)).load("train")) == 2


def test_samples_that_are_all_equal_have_ids_of_their_own(tmp_path: Path):
    write(tmp_path, *[GOOD] * 5)
    samples = replace(TASK, data_dir=str(tmp_path)).load("train")
    first = samples[0].id
    assert [s.id for s in samples] == [first, *(f"{first}-{count}" for count in (2, 3, 4, 5))]


# Tokens and lengths


def tokens_of(*texts: str) -> TokenizedSamples:
    samples = [Sample(f"s{i}", f"Q: {text}\nA:", f" {text}", (text,)) for i, text in enumerate(texts)]
    return tokenize(samples, ModelSpec(TINY).tokenizer())


def test_a_sample_of_a_megabyte_is_refused_by_its_id_and_can_be_dropped():
    tokens = tokens_of("short", "very long " * 100_000)
    with pytest.raises(UserError, match=r"max_length=512 would cut the answer of 1 sample.*'s1' with \d{6} tokens"):
        fitting([tokens], 512, "refuse")
    with pytest.raises(UserError, match=r"reads 1024 tokens, too few for the prompt of 1 test sample.*'s1' with"):
        answerable(tokens, 8, 1024, "refuse")
    for kept in (fitting([tokens], 512, "drop"), answerable(tokens, 8, 1024, "drop")):
        assert kept.tolist() == [0]


def test_a_token_without_an_embedding_is_refused_before_a_model_loads(run, tmp_path: Path, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(ModelSpec(TINY).local or "", folder)
    tokenizer = ModelSpec(str(folder)).tokenizer()
    tokenizer.add_tokens(["<added>"])
    tokenizer.save_pretrained(folder)
    write(tmp_path, GOOD, {"question": "one <added>?", "answer": "two"})
    monkeypatch.setattr(ModelSpec, "load", lambda spec: pytest.fail("a model was loaded"))
    ask = ("method=staff", "task=file", f"task.data_dir={tmp_path}", "pruning_rate=0")
    for role in ("target", "small"):
        with pytest.raises(UserError, match=r"has the token 4096 .* but the model has 4096 embeddings"):
            run(*ask, f"family.{role}.path={folder}")


def test_a_cut_off_that_leaves_no_answer_is_refused():
    with pytest.raises(UserError, match="max_length=3 leaves no sample: raise it"):
        fitting([tokens_of("a", "b")], 3, "drop")
    with pytest.raises(UserError, match="no prompt of the test split fits the 3 tokens that the target reads"):
        answerable(tokens_of("a", "b"), 1, 3, "drop")


def model_with(folder: Path, **tokens: str | None) -> ModelSpec:
    """The tiny model, its tokenizer's special tokens changed; None: without."""
    shutil.copytree(ModelSpec(TINY).local or "", folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config = {name: value for name, value in {**config, **tokens}.items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return ModelSpec(str(folder))


def test_a_tokenizer_without_an_end_token_is_refused(tmp_path: Path):
    spec = model_with(tmp_path / "model", eos_token=None, pad_token=None)
    with pytest.raises(UserError, match="has no end token to end answers with: set eos_token"):
        tokenize([Sample("a", "b", "c", ())], spec.tokenizer())


def test_a_pad_token_that_is_the_end_token_or_none_changes_no_score_and_no_weight(tmp_path: Path):
    found = []
    for name, change in {"own": {}, "end": {"pad_token": "</s>"}, "none": {"pad_token": None}}.items():
        spec = model_with(tmp_path / name, **change)
        pool = pool_of_sums(tmp_path / f"store {name}", 6, family=Family("t", spec, spec))
        found.append((pool.ask("effort", of="target"), pool.store.get(pool.training("target_tuned"))))
        assert pool.slices["pool"].target.end_tokens == [1], "every answer ends"
    for scores, tuned_model in found[1:]:
        assert scores.tolist() == found[0][0].tolist()
        assert farthest(weights_of(tuned_model.path), weights_of(found[0][1].path)) == 0


# Losses and scores that are no numbers


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> dict[str, ModelSpec]:
    """Models in which one character has an embedding that is not finite."""
    import torch

    specs = {}
    for value in ("nan", "inf"):
        folder = tmp_path_factory.mktemp(value) / "model"
        spec = model_with(folder)
        model = spec.load()
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        (token,) = spec.tokenizer()("#", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            model.get_input_embeddings().weight[token] = float(value)
        model.save_pretrained(folder)
        specs[value] = spec
    return specs


def one_poisoned(spec: ModelSpec) -> TokenizedSamples:
    rows = [Sample(f"s{i}", "Say it:", " " + "#" * (i == 3) + "ab" * i, ()) for i in range(8)]
    return tokenize(rows, spec.tokenizer())


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_not_finite_names_its_sample_in_training(poisoned, tmp_path: Path, value: str):
    spec = poisoned[value]
    with pytest.raises(UserError, match=r"the loss of sample 's3' is not finite in step [12]: remove it, or"):
        tuned(one_poisoned(spec), tmp_path / "tuned", spec=spec)


@pytest.mark.parametrize("signal", ["effort", "el2n", "loss", "embedding"])
@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_score_that_is_not_finite_names_its_sample(poisoned, value: str, signal: str):
    model = fresh_lora(poisoned[value].load(), LoraSpec(2, 4), 0)
    samples = one_poisoned(poisoned[value])
    with pytest.raises(UserError, match=f"sample 's3': its {signal} is not finite; remove it"):
        score_samples(model, samples, (named(signal),), batch_tokens=64, pad_token_id=2)


@pytest.mark.parametrize("rows", [[GOOD], [GOOD] * 6], ids=["one sample", "all equal"])
def test_a_pool_of_one_sample_or_of_equal_ones_goes_through_every_stage(run, tmp_path: Path, rows: list[object]):
    folder = write(tmp_path / "data", *rows)
    data = ("task=file", f"task.data_dir={folder}", "task.prompt='{question}'", "task.answer=' {answer}'")
    record = run("method=staff", *data, "pruning_rate=0")
    assert record["coreset"]["size"] == len(rows)
    assert 0 <= record["metrics"]["rougeL"] <= 100


def test_a_run_refuses_or_drops_training_samples_beyond_the_small_models_window_before_a_model_loads(
    run, tmp_path: Path, monkeypatch
):
    from transformers import AutoConfig

    small = tmp_path / "small"
    shutil.copytree(ModelSpec(TINY).local, small)
    config = AutoConfig.from_pretrained(small)
    config.max_position_embeddings = 200
    config.save_pretrained(small)
    asked = ["method=random", f"family.small.path={small}", "task.test_limit=2"]
    load = ModelSpec.load
    monkeypatch.setattr(ModelSpec, "load", lambda spec: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match=r"the small model reads 200 tokens, too few for \d+ training sample"):
        run(*asked)
    monkeypatch.setattr(ModelSpec, "load", load)
    record = run(*asked, "task.too_long=drop")
    assert 0 < record["counts"]["selected"] < 6


def test_a_model_without_a_field_for_its_window_reads_any_length(tmp_path: Path):
    from transformers import AutoConfig

    for kind, window in (("bloom", None), ("mamba", None), ("gpt2", 64)):
        sizes = {"n_positions": 64} if kind == "gpt2" else {}
        AutoConfig.for_model(kind, **sizes).save_pretrained(tmp_path / kind)
        assert ModelSpec(str(tmp_path / kind)).window() == window
