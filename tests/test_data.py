"""Tasks: files into samples, by templates and the presets."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from support.servers import ROWS as HUB_ROWS

from staff.data.samples import Sample
from staff.data.splits import DataView, fitting
from staff.data.task import Task
from staff.data.templates import check_template
from staff.data.tokens import TokenizedSamples, Tokens, read_tokens, tokenize
from staff.errors import UserError
from staff.models.spec import ModelSpec
from staff.store.store import Store

# ---------------------------------------------------------------- files and splits


TASK = Task("t", "Q: {question}\nA:", " {answer}", ["rougeL"], 8, data_dir="x")
GOOD = {"question": "one?", "answer": "two"}


def task_of(folder: Path, *lines: object, **fields: object) -> Task:
    text = "".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines)
    for name in ("train.jsonl", "test.jsonl"):
        (folder / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    return replace(TASK, data_dir=str(folder), **fields)


def test_a_sample_is_the_rendered_prompt_and_answer(tmp_path: Path):
    (sample,) = task_of(tmp_path, GOOD).load("train")
    assert (sample.prompt, sample.answer, sample.references) == ("Q: one?\nA:", " two", ("two",))


def test_templates_reach_into_nested_fields(tmp_path: Path):
    row = {"translation": {"kk": "a", "en": "b"}}
    task = task_of(tmp_path, row, prompt="{translation[kk]}=", answer=" {translation[en]}")
    (sample,) = task.load("train")
    assert (sample.prompt, sample.answer) == ("a=", " b")


def test_braces_in_the_data_are_left_alone(tmp_path: Path):
    (sample,) = task_of(tmp_path, {"question": "{x} {", "answer": "{answer}"}).load("train")
    assert (sample.prompt, sample.answer) == ("Q: {x} {\nA:", " {answer}")


def test_ids_come_from_their_field_or_from_the_text(tmp_path: Path):
    rows = [{**GOOD, "name": "a"}, {**GOOD, "name": "a"}]
    with pytest.raises(UserError, match="the id 'a' comes twice"):
        task_of(tmp_path, *rows, id_field="name").load("train")
    first, second = task_of(tmp_path, *rows).load("train")
    assert second.id == f"{first.id}-2"
    assert task_of(tmp_path, *reversed(rows)).load("train")[0].id == first.id


def test_test_rows_of_one_prompt_are_one_sample_with_the_references_of_all_and_training_rows_are_not(tmp_path):
    others = [{**GOOD, "answer": "deux"}, {**GOOD, "question": "three?"}, GOOD]
    task = task_of(tmp_path, GOOD, *others)
    assert [sample.references for sample in task.load("test")] == [("two", "deux"), ("two",)]
    assert len(task.load("train")) == 4


def test_the_test_split_has_all_its_references(tmp_path: Path):
    row = {**GOOD, "r1": "x", "r2": "y"}
    (sample,) = task_of(tmp_path, row, references=("r1", "r2")).load("test")
    assert sample.references == ("x", "y")


def test_a_sample_that_one_tokenizer_would_cut_is_refused_or_dropped_for_both(tmp_path: Path):
    tokenizer = ModelSpec("pkg://staff/assets/tiny/target").tokenizer()
    samples = task_of(tmp_path, GOOD, {"question": "why " * 40, "answer": "because"}).load("train")
    long = tokenize(samples, tokenizer)
    short = replace(tokenize([samples[0]] * 2, tokenizer), ids=long.ids)
    with pytest.raises(UserError, match=f"would cut the answer of 1 sample.*{samples[1].id}.*too_long=drop"):
        fitting([short, long], 30, "refuse")
    assert fitting([short, long], 30, "drop").tolist() == [0]


def test_a_training_sample_beyond_one_models_window_is_refused_or_dropped_for_all(tmp_path: Path):
    tokenizer = ModelSpec("pkg://staff/assets/tiny/target").tokenizer()
    samples = task_of(tmp_path, GOOD, {"question": "why " * 40, "answer": "because"}).load("train")
    both = [tokenize(samples, tokenizer)] * 2
    longest = both[0].lengths[1]
    windows = {"target": None, "small model": int(longest) - 1}
    sentence = f"the small model reads {longest - 1} tokens, too few for 1 training sample.*{samples[1].id}.*=drop"
    with pytest.raises(UserError, match=sentence):
        fitting(both, 1024, "refuse", windows)
    assert fitting(both, 1024, "drop", windows).tolist() == [0]
    windows["small model"] += 1
    assert fitting(both, 1024, "refuse", windows).tolist() == [0, 1]
    with pytest.raises(UserError, match="no training sample fits the 3 tokens that the target reads"):
        fitting(both, 1024, "drop", {"target": 3, "small model": None})


def test_labels_cover_the_answer_and_its_end_token_alone(tmp_path: Path):
    tokenizer = ModelSpec("pkg://staff/assets/tiny/target").tokenizer()
    tokens = tokenize(task_of(tmp_path, GOOD).load("train"), tokenizer)
    labels = tokens.labels(0)
    answer = [t for t in labels if t != -100]
    assert tokenizer.decode(answer[:-1]) == " two" and answer[-1] == tokenizer.eos_token_id
    assert len(labels) == len(tokens.row(0)) == tokens.lengths[0]
    assert tokens.answer_lengths[0] == len(answer)


ROWS = [[1, 10, 11, 12], [1, 20, 21], [1, 30, 31, 32, 33]]  # behind a begin token
TOKENS = TokenizedSamples.of_rows(["a", "b", "c"], ROWS, [2, 1, 3], begin=1)


def rows_of(tokens: TokenizedSamples) -> list[list[int]]:
    return [tokens.row(i).tolist() for i in range(len(tokens))]


def test_a_part_of_the_samples_is_in_the_order_that_was_asked_for():
    part = TOKENS.take([2, 0])
    assert (rows_of(part), part.ids, part.prompts()) == ([ROWS[2], ROWS[0]], ["c", "a"], [[1, 30, 31], [1, 10]])
    assert part.answer_lengths.tolist() == [2, 2] and len(TOKENS.take([])) == 0
    assert TOKENS.take(range(3)) == TOKENS != part and TOKENS.end_tokens == [12, 21, 33]


def test_a_view_leaves_out_prompts_or_counts_them_as_answers():
    alone = DataView(prompt=False, indices=np.array([2, 1])).of(TOKENS)
    assert rows_of(alone) == [[1, 32, 33], [1, 20, 21]] and alone.prompt_lengths.tolist() == [1, 1]
    everything = DataView(text="all").of(TOKENS)
    assert rows_of(everything) == ROWS and everything.prompt_lengths.tolist() == [1, 1, 1]
    without_begin = TokenizedSamples.of_rows(["a"], [[10, 11, 12]], [1])
    assert rows_of(without_begin.without_prompts()) == [[11, 12]]
    assert without_begin.all_as_answer().prompt_lengths.tolist() == [0]


def test_tokens_come_back_from_the_store_and_are_computed_once_for_tokenizers_that_are_the_same(tmp_path: Path):
    store, samples = Store(tmp_path), [Sample("a", "Say:", " it", ()), Sample("b", "Say it", " twice, twice", ())]
    target, small = (ModelSpec(f"pkg://staff/assets/tiny/{name}") for name in ("target", "small"))
    stage = Tokens(samples, target, {"prompt_format": "plain"})
    assert read_tokens(store.get(stage)) == tokenize(samples, target.tokenizer())
    assert Tokens(samples, small, stage.reading).fingerprint == stage.fingerprint
    assert Tokens(samples[:1], target, stage.reading).fingerprint != stage.fingerprint


def test_a_large_pool_is_tokenised_some_at_a_time_and_comes_out_the_same():
    tokenizer = ModelSpec("pkg://staff/assets/tiny/target").tokenizer()
    samples = [Sample(f"s{i}", f"Say {i}" + " again" * (i % 3) + ":", f" {i * i}", ()) for i in range(2001)]
    whole, last = tokenize(samples, tokenizer), tokenize(samples[-1:], tokenizer)
    assert whole.ids == [sample.id for sample in samples]
    alone = [tokenize([samples[i]], tokenizer) for i in (0, 999, 1000, 1999)]
    assert [whole.take([i]) for i in (0, 999, 1000, 1999, 2000)] == [*alone, last]


# ---------------------------------------------------------------- presets


METRICS = {
    "bioinstruct": {"rougeL", "rouge1", "rouge2"},
    "wmt19_kk_en": {"rougeL", "bleu", "chrf"},
    "gsm8k": {"exact_match", "rougeL"},
    "dialogsum": {"rougeL", "rouge1", "rouge2"},
    "file": {"rougeL"},
}


@pytest.mark.parametrize("task", sorted(HUB_ROWS))
def test_a_task_runs_end_to_end_and_tells_of_test_samples_that_are_in_the_pool(run, tmp_path: Path, task: str):
    for split, numbers in (("train", range(8)), ("test", range(7, 9))):
        lines = "".join(json.dumps(HUB_ROWS[task](i)) + "\n" for i in numbers)
        (tmp_path / f"{split}.jsonl").write_text(lines)
    record = run(f"task={task}", f"task.data_dir={tmp_path}", "method=random")
    assert set(record["metrics"]) == METRICS[task] | {"nll", "output_tokens"}
    assert record["counts"]["selected"] == 2 and record["counts"]["test"] == 2
    assert record["counts"]["test_prompts_in_pool"] == 1


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("config", overrides=list(overrides))


@pytest.mark.parametrize("family", sorted(file.stem for file in (ROOT / "conf/family").glob("*.yaml")))
def test_dialogsum_is_the_excerpt_beside_the_embedded_models_and_the_whole_for_every_other(family: str):
    files = {"id_field": "fname", "references": ["summary1", "summary2", "summary3"]}
    if family in ("tiny", "tiny_small"):
        expected = {"data_dir": "pkg://staff/assets/dialogsum", **files}
    else:
        expected = {"data_dir": None, "hub": "knkarthick/dialogsum", "id_field": "id", "references": []}
    for preset in ([], ["experiment=table1"]):
        task = OmegaConf.to_container(composed(*preset, f"family={family}").task, resolve=True)
        assert isinstance(task, dict) and {name: task[name] for name in expected} == expected
        Task(**{name: value for name, value in task.items() if name != "_target_"})
    for own in ("task.data_dir=/data", "task.train_file=[/data/a.jsonl,/data/b.jsonl]"):
        task = OmegaConf.to_container(composed(f"family={family}", own).task, resolve=True)
        assert isinstance(task, dict) and {name: task[name] for name in files} == files, "files of one's own"
        assert task["data_dir"] in ("/data", expected["data_dir"])


def test_a_family_of_the_hub_without_a_network_says_how_to_give_the_data_before_a_model_is_asked_for(
    run, monkeypatch
):
    monkeypatch.setattr(ModelSpec, "pinned", lambda self: pytest.fail("a model was asked for"))
    with pytest.raises(UserError, match=r"'knkarthick/dialogsum' cannot be read .* give task.data_dir=FOLDER"):
        run("experiment=table1", "family=gemma", "method=random")


def test_each_task_has_the_published_learning_rate_and_the_tiny_family_its_own():
    def rate(*overrides: str) -> float:
        return composed(*overrides).finetune.learning_rate

    published = "family=smollm2"
    assert rate("task=dialogsum", published) == 1e-4 and rate("task=wmt19_kk_en", published) == 2e-4
    assert rate("task=wmt19_kk_en") == rate("task=dialogsum") != 1e-4, "the tiny family's own"
    assert rate("finetune=full") == 2e-5, "nor does the family's LoRA rate reach full fine-tuning"
    assert rate("finetune.learning_rate=0.5") == 0.5


# ---------------------------------------------------------------- templates


TEMPLATED = Task("t", "Q: {question}\nA:", " {answer}", ["rougeL"], 8, data_dir="x")
ROW = {"question": "one?", "answer": "eins"}


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def test_a_template_reaches_into_lists(tmp_path: Path):
    row = {"question": "?", "answers": {"text": ["a", "b"], "start": [3, 4]}}
    (tmp_path / "train.jsonl").write_bytes(lines([row]))
    task = replace(TEMPLATED, data_dir=str(tmp_path), answer="{answers[text][1]} {answers[start][0]}")
    assert [sample.answer for sample in task.load("train")] == ["b 3"]
    for field in ("answers[text][2]", "answers[text][-1]", "answers[text][x]"):
        with pytest.raises(UserError, match=r"line 1: no field 'answers\[text\]"):
            replace(task, answer=f"{{{field}}}").load("train")


def test_references_may_be_nested_and_may_be_lists(tmp_path: Path):
    rows = [{"question": "?", "answers": {"text": ["a", "b"]}, "other": "c"}]
    (tmp_path / "test.jsonl").write_bytes(lines(rows))
    task = replace(TEMPLATED, data_dir=str(tmp_path), references=["answers[text]", "other"])
    (sample,) = task.load("test")
    assert sample.references == ("a", "b", "c") and sample.answer == "a"
    (tmp_path / "test.jsonl").write_bytes(lines([{"question": "?", "answers": {"text": []}}]))
    with pytest.raises(UserError, match=r"line 1: the lists of task.references are empty"):
        replace(task, references=["answers[text]"]).load("test")


OPTIONAL = "{{ instruction }}{% if input %}\n\n{{ input }}{% endif %}\n"


def test_a_jinja_template_has_optional_parts_and_keeps_its_white_space(tmp_path: Path):
    rows = [{"instruction": "Add.", "input": input, "answer": "x"} for input in ("1, 2", "", None, 0)]
    (tmp_path / "train.jsonl").write_bytes(lines(rows))
    task = replace(TEMPLATED, data_dir=str(tmp_path), prompt=OPTIONAL, answer="{{ answer }}")
    prompts = [sample.prompt for sample in task.load("train")]
    assert prompts == ["Add.\n\n1, 2\n", "Add.\n", "Add.\n", "Add.\n"]


def test_a_line_break_that_a_shell_left_as_two_letters_is_told_of(caplog):
    for template in ("a\n{b}", r"\nabla {b}", r'{{ "\n".join(b) }}'):
        check_template(template, "task.prompt")
    assert not caplog.records
    for template in (r"Q: {b}\nA:", r"{% if b %}\n{% endif %}{{ b }}"):
        check_template(template, "task.answer")
    assert [record.message.partition(":")[0] for record in caplog.records] == [
        "task.answer has a backslash and a letter, which is no line break"
    ] * 2


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (
            "{{ quest }}",
            r"line 1: task.prompt fails with \"'quest' is undefined\"; the row has answer, n",
        ),
        ("{{ question.x }}", r"line 1: task.prompt fails with .*has no attribute 'x'"),
        (
            "{% if quest %}a{% endif %}",
            r"'quest' is undefined.*: where only some rows have the field, write {% if row.get\('quest'\) %}\.",
        ),
        ("{{ n }}", r"line 1: task.prompt fails with 'a value is NoneType, not text'"),
        ("{{ [1] }}", r"line 1: task.prompt fails with 'a value is list, not text'"),
        ("{{ 1 / 0 }}", r"line 1: task.prompt fails with 'division by zero'"),
        ("{{ ''.__class__.__mro__ }}", r"line 1: task.prompt fails with .*unsafe"),
        ("{{ row.update({'a': 1}) }}", r"line 1: task.prompt fails with .*is unsafe"),
        ("{{ question", r"^task.prompt='{{ question' is not a Jinja template \(unexpected end"),
        ("{% if question %}a", r"^task.prompt='.*' is not a Jinja template \(Unexpected end of template"),
        ("{{ question | shout }}", r"^task.prompt='.*' is not a Jinja template \(No filter named 'shout'"),
    ],
)
def test_a_jinja_template_that_fails_is_one_sentence(tmp_path: Path, template: str, sentence: str):
    (tmp_path / "train.jsonl").write_bytes(lines([{**ROW, "n": None}]))
    with pytest.raises(UserError, match=sentence) as refused:
        replace(TEMPLATED, data_dir=str(tmp_path), prompt=template).load("train")
    assert "\n" not in str(refused.value)


def test_a_field_with_a_curious_name_is_reached_by_the_row(tmp_path: Path):
    (tmp_path / "train.jsonl").write_bytes(lines([{"the question?": "x", "answer": "y"}]))
    (sample,) = replace(TEMPLATED, data_dir=str(tmp_path), prompt="{{ row['the question?'] }}:").load("train")
    assert sample.prompt == "x:"


def test_a_recorded_run_is_measured_again_by_other_metrics_and_with_other_references(run, tmp_path: Path):
    rows = [{"q": f"{n}?", "a": "x", "all": ["x", str(n)]} for n in range(8)]
    ask = ("method=random", "task=file", f"task.data_dir={tmp_path}", "task.prompt='{q}'", "task.answer=' {a}'")

    def measured(*more: str) -> dict[str, Any]:
        for name in ("train", "test"):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return run(*ask, "task.references=[all]", *more)

    first = measured("task.metrics=[exact]")
    assert measured("task.metrics=[exact]") == first, "what is recorded is not done again"
    second = measured("task.metrics=[exact,rouge1]")
    assert set(second["metrics"]) == {"exact", "rouge1", "output_tokens"} and second["folder"] == first["folder"]
    rows[0]["all"].append("y")
    third = measured("task.metrics=[exact]")
    assert third["identity"]["data"]["test"] != first["identity"]["data"]["test"]
    assert not any(stage["computed"] for record in (second, third) for stage in record["overhead"]["stages"])
    (first["folder"] / "metrics.json").write_text("{")
    with pytest.raises(UserError, match=r"is damaged .*: delete it, and the run's command records it"):
        measured("task.metrics=[exact]")
