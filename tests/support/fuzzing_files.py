"""Further properties: of conversations, templates, tables, files of scores, and exports."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from hypothesis import strategies as st
from support.fuzzing import PROPERTIES, fuzz, fuzzed, json_values, sentence_or, surrogates

from baselines.imported import Imported
from baselines.precomputed import Precomputed
from experiments.export import WRITERS, Chosen
from staff import ArrayPool
from staff.data.files import read_rows
from staff.data.layouts import ROLES
from staff.data.samples import Sample, plain_pieces, plain_text
from staff.data.task import Task
from staff.data.templates import render
from staff.runtime.files import inert, original
from staff.selection import Draws

__all__ = ("PROPERTIES", "fuzz")

words = st.text(max_size=8) | surrogates | st.sampled_from(["", " ", "\n", "=1+1", "<b>", "../x", "{{ 7*7 }}"])
any_value = words | json_values
role = st.sampled_from([*sorted(ROLES), "tool", "narrator", ""]) | any_value
content = words | st.lists(
    st.fixed_dictionaries({"type": st.just("text"), "text": any_value}) | any_value, max_size=2
)
turn = st.one_of(
    st.fixed_dictionaries({"role": role, "content": content}),
    st.fixed_dictionaries({"from": role, "value": content}, optional={"tool_calls": any_value}),
    any_value,
)
turns = st.lists(turn, max_size=4) | any_value
columns = ("messages", "conversations", "prompt", "completion", "instruction", "output", "input", "system")
conversations = st.fixed_dictionaries(
    {}, optional={**dict.fromkeys(columns, turns | any_value), "history": any_value, "tools": any_value}
)


@fuzzed(rows=st.lists(conversations, min_size=1, max_size=3))
def a_row_of_turns_gives_a_conversation_or_a_sentence(folder: Path, rows: list[Any]) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "train.jsonl").write_text(text)
    task = Task("t", None, None, ["rougeL"], 8, data_dir=str(folder))
    for sample in sentence_or(lambda: task.load("train")) or []:
        assert sample.id and sample.answer.strip() and sample.prompt.strip()
        if sample.turns:
            assert sample.turns[-1][0] == "assistant" and {r for r, _ in sample.turns} <= set(ROLES.values())
            assert "".join(plain_text(sample.turns)) == "".join(p.text for p in plain_pieces(sample.turns))


expressions = st.sampled_from(
    [
        *("{{ question }}", "{{ row['a b'] }}", "{{ question | upper }}", "{{ row }}", "{{ row.items() }}", "{{"),
        *("{% if r %}x{% endif %}", "{% for c in question %}{{ c }}{% endfor %}", "{{ 1 / 0 }}", "{{ nothing }}"),
        *("{{ ''.__class__.__mro__ }}", "{{ row.__class__ }}", "{{ cycler.__init__.__globals__ }}"),
        *("{{ question.format(x=1) }}", "{{ '{0.__class__}'.format(question) }}", "{{ row.update(x=1) }}"),
        *("{% set r = 1 %}{{ r }}", "{% include 'x' %}", "{% import 'os' as os %}", "{{ range(10**9) }}", "{#"),
    ]
)


@fuzzed(
    template=st.lists(expressions | st.text("{}%# ra|'()[]._", max_size=9), max_size=3).map("".join),
    row=st.dictionaries(st.sampled_from(["question", "a b", "r", "self", "row"]), any_value, max_size=4),
)
def a_template_gives_text_or_a_sentence_and_no_objects(folder: Path, template: str, row: Mapping[str, Any]) -> None:
    before = json.dumps(row)
    text = sentence_or(lambda: render(template, row, "file, line 1", "task.prompt"))
    assert text is None or (text.encode() is not None and "<class" not in text and "object at 0x" not in text)
    assert json.dumps(row) == before, "a template changes no row"


def _csv(rows: list[list[str]], separator: str) -> bytes:
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=separator).writerows(rows)
    return file.getvalue().encode("utf-8", "replace")


def _parquet(rows: list[list[str]]) -> bytes:
    file = io.BytesIO()
    texts = [[text.encode("utf-8", "replace").decode() for text in row] for row in rows]
    pd.DataFrame(texts, columns=list("abc"[: len(rows[0])])).to_parquet(file)
    return file.getvalue()


@st.composite
def tables(draw: st.DrawFn) -> tuple[str, bytes]:
    """A file of a table, whole or damaged, and its suffix."""
    width = draw(st.integers(1, 3))
    rows = draw(st.lists(st.lists(words, min_size=width, max_size=width), min_size=1, max_size=3))
    header = [*draw(st.sampled_from([["a", "b", "c"], ["a", "a", "b"], ["question", "answer", "id"]]))[:width]]
    kind = draw(st.sampled_from([".csv", ".tsv", ".parquet", ".json", ".jsonl"]))
    if kind in (".csv", ".tsv"):
        data = _csv([header, *rows], "," if kind == ".csv" else "\t")
    elif kind == ".parquet":
        data = _parquet(rows)
    else:
        objects = [dict(zip(header, row, strict=True)) for row in rows]
        data = (json.dumps(objects) if kind == ".json" else "\n".join(map(json.dumps, objects))).encode()
    packing = draw(st.sampled_from(["", "", ".gz", ".bz2"])) if kind != ".parquet" else ""
    data = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress}[packing](data)
    if draw(st.booleans()):
        at = draw(st.integers(0, len(data)))
        data = data[:at] + draw(st.binary(max_size=3)) + data[at + draw(st.integers(0, 9)) :]
    return kind + packing, data


@fuzzed(table=tables())
def a_table_gives_rows_or_a_sentence(folder: Path, table: tuple[str, bytes]) -> None:
    suffix, data = table
    file = folder / f"table{suffix}"
    file.write_bytes(data)
    try:
        for where, row in sentence_or(lambda: list(read_rows(file, "train"))) or []:
            assert where.startswith(str(file)) and isinstance(row, Mapping)
    finally:
        file.unlink()


score_files = {
    ".csv": st.text("id,score\n\"'0123456789.-enaf\x00=").map(str.encode)
    | st.lists(st.tuples(words, words), max_size=4).map(
        lambda rows: _csv([["id", "score"], *map(list, rows)], ",")
    ),
    ".json": json_values.map(lambda value: json.dumps(value).encode()) | st.binary(max_size=20),
    ".parquet": st.binary(max_size=40)
    | st.lists(st.lists(words, min_size=2, max_size=2), min_size=1).map(_parquet),
}


@fuzzed(
    file=st.sampled_from(sorted(score_files)).flatmap(lambda s: st.tuples(st.just(s), score_files[s])),
    column=st.sampled_from(["score", "b", "id"]) | words,
)
def a_file_of_scores_is_read_or_refused_in_a_sentence(folder: Path, file: tuple[str, bytes], column: str) -> None:
    suffix, content = file
    path = (folder / "scores").with_suffix(suffix)
    path.write_bytes(content)
    method = sentence_or(lambda: Imported(str(path), column))
    if method is not None and method.by_id:
        ids = list(method.by_id)
        pool = ArrayPool(ids, {})
        coreset = sentence_or(lambda: method.select(pool, 1, Draws(0, ids)))
        assert coreset is None or np.isfinite(method.by_id[ids[int(coreset.indices[0])]])


texts = st.text(min_size=1, max_size=12)
chosen = st.lists(st.tuples(texts, texts, texts), min_size=1, max_size=4, unique_by=lambda parts: parts[0])


@fuzzed(samples=chosen, talk=st.booleans())
def an_exported_coreset_comes_back_and_stays_in_its_folder(
    folder: Path, samples: list[tuple[str, str, str]], talk: bool
) -> None:
    rows = [
        Chosen(
            Sample(id, prompt, answer, (), turns=(("user", prompt), ("assistant", answer)) if talk else ()),
            number,
            {"id": id, "question": prompt, "answer": answer},
            {"region": number},
        )
        for number, (id, prompt, answer) in enumerate(samples, start=1)
    ]
    ids = [id for id, _, _ in samples]
    before = {path for path in folder.parent.iterdir() if path != folder}
    for form in ("jsonl", "rows", "ids"):
        WRITERS[form](rows, folder)
        if form == "jsonl":
            assert [row["id"] for _, row in read_rows(folder / "train.jsonl", "train")] == ids
        elif form == "rows":
            assert [row for _, row in read_rows(folder / "train.jsonl", "train")] == [c.row for c in rows]
            with (folder / "rows.csv").open(newline="", encoding="utf-8") as file:
                listed = [row["id"] for row in csv.DictReader(file)]
            assert [original(id) for id in listed] == ids
            assert not any(id[0] in "=@\t\r" for id in listed), "a spreadsheet runs none of them"
            assert Precomputed(str(folder / "rows.csv")).entries == ids
        else:
            assert Precomputed(str(folder / "ids.json")).entries == ids
    assert {path for path in folder.parent.iterdir() if path != folder} == before


@fuzzed(text=st.text("'=+-@\t\r1.e x", max_size=6))
def text_for_a_spreadsheet_comes_back(folder: Path, text: str) -> None:
    assert original(inert(text)) == text and not inert(text).startswith(("=", "@", "\t", "\r"))
