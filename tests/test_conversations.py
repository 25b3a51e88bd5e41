"""Conversations are recognised by their columns and read into turns, or refused by name and place."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.tiny import ASKED, SAID, SEVERAL, SYSTEM, messages

from staff.data.samples import Sample, data_digest
from staff.data.task import Task
from staff.errors import UserError

TASK = Task("t", None, None, ["rougeL"], 8, data_dir="x")


def shared(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    names = {"user": "human", "assistant": "gpt"}
    return messages(*((names.get(name, name), text) for name, text in turns), role="from", content="value")


def load(folder: Path, *rows: dict[str, Any], split: str = "train", **settings: Any) -> list[Sample]:
    (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return replace(TASK, data_dir=str(folder), **settings).load(split)


LAYOUTS = {
    "messages": ({"messages": messages(*SEVERAL)}, SEVERAL),
    "messages that end with a question": ({"messages": messages(*SEVERAL, ASKED)}, SEVERAL),
    "messages in parts": (
        {"messages": messages(("user", [{"type": "text", "text": "2 +"}, {"type": "text", "text": " 2?"}]), SAID)},
        (ASKED, SAID),
    ),
    "messages in parts without a type": (
        {"messages": messages(("user", [{"text": "2 +"}, " 2?"]), SAID)},
        (ASKED, SAID),
    ),
    "a developer's message": (
        {"messages": messages(("developer", "Be brief."), ASKED, SAID)},
        (SYSTEM, ASKED, SAID),
    ),
    "no tool calls": (
        {"messages": [{"role": n, "content": t, "tool_calls": None} for n, t in (ASKED, SAID)], "tools": None},
        (ASKED, SAID),
    ),
    "conversations": ({"conversations": shared(*SEVERAL)}, SEVERAL),
    "conversations with a system text": (
        {"system": "Be brief.", "conversations": shared(ASKED, SAID)},
        SEVERAL[:3],
    ),
    "conversations with roles": ({"conversations": messages(ASKED, SAID)}, (ASKED, SAID)),
    "prompt and completion": ({"prompt": messages(SYSTEM, ASKED), "completion": messages(SAID)}, SEVERAL[:3]),
    "Alpaca without input": ({"instruction": "2 + 2?", "output": "It is 4."}, (ASKED, SAID)),
    "Alpaca with an empty input": ({"instruction": "2 + 2?", "input": "", "output": "It is 4."}, (ASKED, SAID)),
    "Alpaca with null input": ({"instruction": "2 + 2?", "input": None, "output": "It is 4."}, (ASKED, SAID)),
    "Alpaca with input": (
        {"instruction": "Add.", "input": "2, 2", "output": "It is 4."},
        (("user", "Add.\n\n2, 2"), SAID),
    ),
    "Alpaca with numbers": ({"instruction": "2 + 2?", "output": 4}, (ASKED, ("assistant", "4"))),
    "Alpaca with NaN input": (
        {"instruction": "2 + 2?", "input": float("nan"), "output": "It is 4."},
        (ASKED, SAID),
    ),
    "Alpaca with a list for text": (
        {"instruction": "Reverse.", "input": "[]", "output": "[]"},
        (("user", "Reverse.\n\n[]"), ("assistant", "[]")),
    ),
    **{
        f"turns with {role} and {text}": (
            {"conversations": messages(ASKED, SAID, role=role, content=text)},
            (ASKED, SAID),
        )
        for role in ("role", "from")
        for text in ("content", "value", "text")
    },
    "turns with the keys of both": (
        {"conversations": [{"role": None, "content": None, "from": n, "value": t} for n, t in (ASKED, SAID)]},
        (ASKED, SAID),
    ),
    "a conversation": ({"conversation": messages(ASKED, SAID)}, (ASKED, SAID)),
    "messages as JSON in a table": ({"messages": json.dumps(messages(ASKED, SAID))}, (ASKED, SAID)),
    "no tools in a table": ({"conversations": shared(ASKED, SAID), "tools": "[]"}, (ASKED, SAID)),
    "a question that is not trained": (
        {"messages": [{**messages(ASKED)[0], "weight": 0}, {**messages(SAID)[0], "weight": 1}]},
        (ASKED, SAID),
    ),
    "a list and a completion": ({"prompt": messages(SYSTEM, ASKED), "completion": SAID[1]}, SEVERAL[:3]),
    "a prompt and a list": ({"prompt": ASKED[1], "completion": messages(SAID)}, (ASKED, SAID)),
    **{
        f"{question} and {answer}": (
            {question: "2 + 2?", answer: "It is 4.", "system_prompt": "Be brief."},
            SEVERAL[:3],
        )
        for question, answer in (
            ("instruction", "response"),
            ("question", "answer"),
            ("question", "response"),
            ("query", "response"),
            ("problem", "solution"),
        )
    },
    "Alpaca with names in capitals": ({" Instruction": "2 + 2?", "Output": "It is 4."}, (ASKED, SAID)),
    "Dolly with a context": (
        {"instruction": "Add.", "context": "2, 2", "response": "It is 4."},
        (("user", "Add.\n\n2, 2"), SAID),
    ),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_a_conversation_is_recognised_by_its_columns(tmp_path: Path, kind: str):
    row, turns = LAYOUTS[kind]
    (sample,) = load(tmp_path, {"id": 1, "source": "x", **row})
    assert sample.turns == turns and sample.references == (turns[-1][1],)
    assert sample.answer == f" {turns[-1][1]}" and sample.prompt.endswith(f"User: {turns[-2][1]}\n\nAssistant:")


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"prompt": "2 + 2 =", "completion": " 4"}, "2 + 2 =", " 4"),
        ({"prompt": "2 + 2 =", "answer": 4}, "2 + 2 =", " 4"),
        ({"prompt": "2 + 2 =", "response": 4}, "2 + 2 =", " 4"),
        ({"inputs": "2 + 2 =", "targets": 4}, "2 + 2 =", " 4"),
        ({"input": "2 + 2 =", "output": 4}, "2 + 2 =", " 4"),
    ],
)
def test_a_prompt_and_an_answer_are_recognised_too(tmp_path: Path, row: dict[str, Any], prompt: str, answer: str):
    (sample,) = load(tmp_path, row)
    assert (sample.prompt, sample.answer, sample.turns) == (prompt, answer, ())


def test_settings_name_columns_as_the_file_has_them_whatever_their_case(tmp_path: Path):
    row = {"Question": "2 + 2?", "Answer": "It is 4.", "ID": 7, "Context": "sums"}
    (sample,) = load(tmp_path, row, id_field="ID", group_field="Context")
    assert (sample.id, sample.group, sample.turns) == ("7", "sums", (ASKED, SAID))


def test_the_layout_is_told_in_one_line_and_templates_override_it(tmp_path: Path, caplog):
    caplog.set_level("INFO")
    rows = [{"messages": messages(ASKED, SAID), "q": "a", "a": "b"}] * 3
    load(tmp_path, *rows)
    assert [r.message for r in caplog.records] == ["the train split is read as messages"]
    assert load(tmp_path, *rows, prompt="{q}", answer="{a}")[0].turns == ()
    assert len(caplog.records) == 1
    (sample, *_) = load(tmp_path, *rows, prompt="{{ messages[0].content }}", answer="{messages[1][content]}")
    assert (sample.prompt, sample.answer) == ("2 + 2?", "It is 4.")


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ({"text": "x"}, "line 1: the row has the field text alone, but a sample is a prompt and its answer"),
        ({"prompt": [{"role": "user"}]}, "the row has the field prompt alone"),
        (
            {"a": 1, "b": 2},
            "the fields a, b are of no known layout: set both to .*such as '{a}'",
        ),
        (
            {"prompt": "x", "answer": "y", "system": "z"},
            "'system' is filled, but the layout 'prompt and answer'",
        ),
        (
            {"question": "x", "answer": "y", "choices": ["y"]},
            "'choices' is filled, but the layout 'question and",
        ),
        (
            {"messages": messages(ASKED, SAID), "images": ["a.png"]},
            "'images' is filled, but the layout 'messages'",
        ),
        (
            {"prompt": "x", "completion": "y", "label": False},
            "field 'label' calls the completion a bad one; remove",
        ),
        (
            {"prompt": messages(ASKED), "chosen": messages(SAID), "rejected": messages(SAID)},
            "a pair of a chosen and a rejected answer, which is not trained as such: keep the field",
        ),
        (
            {"messages": "[{'role': 'user'}]"},
            "'messages' is text that begins like a list of turns, but is not",
        ),
        (
            {"conversations": [{"speaker": "a", "text": "b"}]},
            r"\[0\] has the role None.* has speaker, text",
        ),
    ],
)
def test_a_row_of_which_a_part_would_be_lost_is_refused(tmp_path: Path, row: dict[str, Any], sentence: str):
    with pytest.raises(UserError, match=sentence):
        load(tmp_path, row)


def test_choices_that_a_metric_asks_for_are_no_lost_part_and_empty_fields_are_none(tmp_path: Path):
    row = {"question": "x", "answer": "y", "choices": ["y", "n"], "context": "", "history": [], "image": None}
    (sample,) = load(tmp_path, row, choices_field="choices")
    assert sample.turns == (("user", "x"), ("assistant", "y"))


def test_an_earlier_turn_of_weight_0_is_read_where_the_last_answer_alone_is_trained(tmp_path: Path):
    row = {"messages": [{**turn, "weight": int(at == 4)} for at, turn in enumerate(messages(*SEVERAL))]}
    with pytest.raises(UserError, match=r"messages\[2\] has weight=0, but .*: set task.loss_on=last where"):
        load(tmp_path, row)
    assert load(tmp_path, row, loss_on="last")[0].turns == SEVERAL


def test_half_a_pair_of_templates_and_an_unknown_loss_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"task.answer=None must be a template"):
        replace(TASK, prompt="{q}")
    with pytest.raises(UserError, match=r"task.loss_on='first' is unknown: choose 'all' or 'last'"):
        replace(TASK, loss_on="first")


CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
BAD = {
    "a tool call": ({"messages": [*messages(ASKED), CALL]}, r"messages\[1\] is a tool call or its result"),
    "a tool's result": ({"messages": messages(ASKED, ("tool", "4"), SAID)}, r"messages\[1\] is a tool call or its"),
    "tools": ({"messages": messages(ASKED, SAID), "tools": [{"name": "f"}]}, "field 'tools' is filled, and tool"),
    "a function call of ShareGPT": (
        {"conversations": shared(ASKED, ("function_call", "f()"), SAID)},
        "is a tool call",
    ),
    "an image": (
        {"messages": messages(("user", [{"type": "image_url", "image_url": {}}]), SAID)},
        r"messages\[0\] has a part of type 'image_url'; only text is supported",
    ),
    "a sound": ({"messages": messages(("user", [{"type": "input_audio"}]), SAID)}, "a part of type 'input_audio'"),
    "an unknown role": (
        {"messages": messages(("critic", "x"), SAID)},
        r"messages\[0\] has the role 'critic', which is",
    ),
    "thoughts": (
        {"messages": [{**messages(ASKED)[0]}, {"role": "assistant", "content": "x", "thinking": "hm"}]},
        "not read",
    ),
    "a turn that is not trained": (
        {"messages": [*messages(ASKED), {"role": "assistant", "content": "x", "weight": 0}]},
        r"messages\[1\] has weight=0, but every answer is trained .*: remove the field or the turn",
    ),
    "no role": ({"messages": [{"content": "x"}]}, r"messages\[0\] has the role None"),
    "a text for a turn": ({"messages": ["x"]}, r"messages\[0\] is str, not a turn; write {role, content}"),
    "a null turn": ({"messages": messages(ASKED, ("assistant", None))}, r"'messages\[1\]\[content\]' is NoneType"),
    "no answer": ({"messages": messages(ASKED)}, "no turn of the assistant"),
    "no turns": ({"messages": []}, "no turn of the assistant"),
    "no question": ({"messages": messages(SYSTEM, SAID)}, "no turn of the user before the answer"),
    "an empty answer": ({"messages": messages(ASKED, ("assistant", " "))}, "the answer is empty"),
    "an empty turn": ({"messages": messages(("user", ""), SAID)}, r"turn 1 \(user\) is empty"),
    "Alpaca without output": ({"instruction": "x", "output": None}, "field 'output' is NoneType, not text"),
    "Alpaca with history": (
        {"instruction": "x", "output": "y", "history": [["a", "b"]]},
        "field 'history' is filled",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_conversation_of_text_is_refused_by_its_name_and_place(tmp_path: Path, kind: str):
    row, sentence = BAD[kind]
    with pytest.raises(UserError, match=f"train.jsonl, line 2: {sentence}" if kind.startswith("no ") else sentence):
        good = (
            {"messages": messages(ASKED, SAID)} if "messages" in row else {**row, **GOOD.get(next(iter(row)), {})}
        )
        load(tmp_path, good, row)


GOOD = {
    "conversations": {"conversations": shared(ASKED, SAID)},
    "instruction": {"instruction": "x", "output": "y", "history": None},
}


def test_a_row_without_the_column_that_the_first_had_is_refused(tmp_path: Path):
    with pytest.raises(
        UserError, match=r"line 2: no field 'messages' \(wanted by the conversation\); it has other"
    ):
        load(tmp_path, {"messages": messages(ASKED, SAID)}, {"other": 1})
    with pytest.raises(UserError, match="line 2: field 'messages' is str, not a list of turns"):
        load(tmp_path, {"messages": messages(ASKED, SAID)}, {"messages": "x"})


def test_samples_without_turns_keep_their_digest_and_turns_count_in_it():
    sample = Sample("a", "2 + 2?", " 4", ("4",))
    recorded = "681ff75b07d42953429074ee2573bf563602023e1325e33669262f53832676e4"
    assert data_digest([sample]) == recorded
    one, other = (replace(sample, turns=(ASKED, said)) for said in (SAID, ("assistant", "Four.")))
    assert len({data_digest([sample]), data_digest([one]), data_digest([other])}) == 3


def test_a_reference_is_the_last_turn_of_its_conversation(tmp_path: Path):
    (test,) = load(
        tmp_path, {"messages": messages(*SEVERAL), "right": ["6", "six "]}, split="test", references=["right"]
    )
    assert test.references == ("6", "six ") and test.turns == SEVERAL
    samples = TASK.reference_samples([test])
    assert [sample.turns for sample in samples] == [(*SEVERAL[:-1], ("assistant", text)) for text in ("6", "six")]
    assert {(sample.prompt, sample.answer) for sample in samples} == {(test.prompt, " 6"), (test.prompt, " six")}


@pytest.mark.parametrize("column, space", [("answer", " "), ("completion", "")])
def test_a_reference_without_templates_starts_as_the_answers_of_its_layout(tmp_path: Path, column: str, space: str):
    row = {"prompt": "2 + 2 =", column: "4", "right": "four"}
    for settings, text in (({}, "4"), ({"references": ["right"]}, "four")):
        (sample,) = TASK.reference_samples(load(tmp_path, row, split="test", **settings))
        assert (sample.prompt, sample.answer, sample.turns) == ("2 + 2 =", space + text, ())
