"""The formats that data come in: all give the samples of the same rows, and a bad row its sentence."""

import bz2
import gzip
import importlib.util
import json
import lzma
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from staff.data.task import Task
from staff.errors import UserError

TASK = Task("t", "Q: {question}\nA:", " {answer}", ["rougeL"], 8, data_dir="x")
ROWS = [
    {"question": "one?", "answer": "eins"},
    {"question": 'a "quoted", and\ttabbed', "answer": "NA"},
    {"question": "dates: 2020-01-01?", "answer": "2020-01-01"},
    {"question": "007", "answer": "1.50"},
    {"question": "qué 𝔘 \u2028 é", "answer": "zwei\nZeilen"},
]
EXPECTED = [(f"Q: {row['question']}\nA:", f" {row['answer']}") for row in ROWS]


def lines(rows: list[dict[str, Any]] = ROWS, end: str = "\n") -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + end for row in rows).encode()


def table(separator: str) -> bytes:
    import csv
    import io

    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, ["question", "answer"], delimiter=separator)
    writer.writeheader()
    writer.writerows(ROWS)
    return file.getvalue().encode()


def indexed() -> bytes:
    """A table with an index that has no name, as pandas writes it."""
    import pandas as pd

    return pd.DataFrame(ROWS).to_csv().encode()


def parquet(folder: Path) -> None:
    import pandas as pd

    pd.DataFrame(ROWS).to_parquet(folder / "train.parquet")


def saved(folder: Path, splits: bool = True) -> None:
    from datasets import Dataset, DatasetDict

    data = Dataset.from_list(ROWS)
    (DatasetDict({"train": data, "test": data}) if splits else data).save_to_disk(folder)


def put(name: str, content: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content)


FORMATS = {
    "JSON Lines": put("train.jsonl", lines()),
    "JSON Lines with a byte order mark, CRLF and blank lines": put(
        "train.jsonl", b"\xef\xbb\xbf" + lines(end="\r\n\r\n")
    ),
    "JSON Lines named .json": put("train.json", lines()),
    "JSON array": put("train.json", json.dumps(ROWS, indent=1).encode()),
    "JSON array with a byte order mark": put("train.json", b"\xef\xbb\xbf \n" + json.dumps(ROWS).encode()),
    "gzip": put("train.jsonl.gz", gzip.compress(lines())),
    "xz": put("train.jsonl.xz", lzma.compress(lines())),
    "JSON Lines after a byte order mark and a blank line": put("train.jsonl", b"\xef\xbb\xbf\n" + lines()),
    "JSON object with the rows as data": put(
        "train.json", json.dumps({"version": 1, "data": ROWS}, indent=1).encode()
    ),
    "JSON object with the splits": put("train.json", json.dumps({"test": [], "train": ROWS}).encode()),
    "CSV with old line ends": put("train.csv", table(",").replace(b"\r\n", b"\r")),
    "CSV with an index": put("train.csv", indexed()),
    "CSV with semicolons and a comma in the header": put(
        "train.csv", table(";").replace(b"\r\n", b";x\r\n").replace(b"answer;x", b'answer;"a,b"', 1)
    ),
    "bzip2": put("train.jsonl.bz2", bz2.compress(lines())),
    "gzipped CSV": put("train.csv.gz", gzip.compress(table(","))),
    "CSV": put("train.csv", table(",")),
    "CSV with semicolons": put("train.csv", table(";")),
    "TSV named CSV": put("train.csv", table("\t")),
    "CSV with a byte order mark": put("train.csv", b"\xef\xbb\xbf" + table(",")),
    "TSV": put("train.tsv", table("\t")),
    "Parquet": parquet,
    "shards": lambda folder: (
        put("train-00000-of-00002.jsonl", lines(ROWS[:2]))(folder),
        put("train-00001-of-00002.jsonl", lines(ROWS[2:]))(folder),
    ),
    "save_to_disk": saved,
    "save_to_disk of each split": lambda folder: saved(folder / "train", splits=False),
    "save_to_disk of one split": lambda folder: saved(folder, splits=False),
}


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same_samples(tmp_path: Path, kind: str):
    FORMATS[kind](tmp_path)
    samples = replace(TASK, data_dir=str(tmp_path)).load("train")
    assert [(sample.prompt, sample.answer) for sample in samples] == EXPECTED


def test_zstandard_of_several_frames_is_read_whole(tmp_path: Path, monkeypatch):
    import pyarrow as pa

    frames = [pa.compress(lines([row]), codec="zstd", asbytes=True) for row in ROWS]
    (tmp_path / "train.jsonl.zst").write_bytes(b"".join(frames))
    samples = replace(TASK, data_dir=str(tmp_path)).load("train")
    assert [(sample.prompt, sample.answer) for sample in samples] == EXPECTED
    # The library that reads data sets of the hub needs a package.
    hub = replace(TASK, data_dir=None, hub=str(tmp_path))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    if importlib.util.find_spec("zstandard") is None:
        with pytest.raises(UserError, match=r"has files that end with \.zst: pip install zstandard\.$"):
            hub.load("train")
    else:
        assert [(sample.prompt, sample.answer) for sample in hub.load("train")] == EXPECTED


@pytest.mark.parametrize("hub", ["saved", "folder"])
def test_a_folder_stands_for_a_data_set_of_the_hub(tmp_path: Path, hub: str, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "data"
    folder.mkdir()
    saved(folder) if hub == "saved" else parquet(folder)
    samples = replace(TASK, data_dir=None, hub=str(folder)).load("train")
    assert [(sample.prompt, sample.answer) for sample in samples] == EXPECTED


# Which files


def test_files_are_named_by_path_list_or_glob_from_the_folder_or_from_anywhere(tmp_path: Path, monkeypatch):
    shards = tmp_path / "shards"
    shards.mkdir()
    for i, row in enumerate(ROWS):
        (shards / f"part-{i}.jsonl").write_bytes(lines([row]))
    monkeypatch.setenv("HOME", str(tmp_path))

    def prompts(given: Any, data_dir: Path | None = None) -> list[str]:
        task = replace(TASK, data_dir=data_dir and str(data_dir), train_file=given)
        return [sample.prompt for sample in task.load("train")]

    everything = [prompt for prompt, _ in EXPECTED]
    assert prompts("part-*.jsonl", shards) == everything
    assert prompts("shards/*.jsonl", tmp_path) == prompts("**/*.jsonl", tmp_path) == everything
    assert prompts(["part-3.jsonl", "part-0.jsonl"], shards) == [everything[3], everything[0]]
    assert prompts([str(shards / "part-1.jsonl"), "part-1.jsonl"], shards) == [everything[1]], "one file, once"
    assert prompts(str(shards / "*.jsonl")) == prompts("~/shards/*.jsonl") == everything


@pytest.mark.parametrize("name", ["a[1]", "a*b", "ä ö", "a#b", "a%20b"])
def test_a_folder_with_curious_signs_in_its_name_is_read(tmp_path: Path, name: str):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(lines())
    assert len(replace(TASK, data_dir=str(folder)).load("train")) == len(ROWS)


@pytest.mark.parametrize(
    ("files", "settings", "sentence"),
    [
        ((), {}, r"/train.jsonl does not exist: task.data_dir must be a folder with train.jsonl \(or"),
        ((), {"train_file": "a.csv"}, r"/a.csv does not exist: task.data_dir must be a folder with a.csv"),
        (
            (),
            {"train_file": "/nowhere/a.csv"},
            r"^/nowhere/a.csv does not exist: task.train_file must be a file, a",
        ),
        (("train.csv", "train.jsonl"), {}, r"holds train.csv and train.jsonl: choose by task.train_file"),
        (("train.txt",), {}, r"train.jsonl does not exist"),
        (("a.txt",), {"train_file": "a.txt"}, r"a.txt: its name tells no format that is read: save it as .jsonl"),
        ((), {"train_file": "https://x.org/a.csv"}, r"train_file=https://x.org/a.csv is an address: download the"),
        ((), {"train_file": []}, r"task.train_file=\[\] must be a path, a glob or a list"),
        ((), {"train_file": 3}, r"task.train_file=3 must be a path, a glob or a list"),
    ],
)
def test_what_is_no_choice_of_files_is_refused(tmp_path: Path, files, settings: dict[str, Any], sentence: str):
    for name in files:
        (tmp_path / name).write_bytes(lines())
    with pytest.raises(UserError, match=sentence):
        replace(TASK, data_dir=str(tmp_path), **settings).load("train")


def test_a_file_for_a_folder_a_split_that_is_not_there_and_no_data_are_refused(tmp_path: Path):
    (tmp_path / "train.jsonl").write_bytes(lines())
    with pytest.raises(UserError, match=r"train.jsonl is a file: name its folder, or give the file as task"):
        replace(TASK, data_dir=str(tmp_path / "train.jsonl")).load("train")
    saved(tmp_path / "saved")
    with pytest.raises(UserError, match=r"saved has no split 'dev', but train, test: name one by task"):
        replace(TASK, data_dir=str(tmp_path / "saved"), train_split="dev").load("train")
    saved(tmp_path / "one", splits=False)
    with pytest.raises(UserError, match="one holds one data set without splits, which is the training split: set"):
        replace(TASK, data_dir=str(tmp_path / "one")).load("test")
    on_hub = replace(TASK, data_dir=None, hub=str(tmp_path / "one"))
    with pytest.raises(
        UserError, match=r"one holds one data set without splits.*task.dev_size=200 task.evaluate_on"
    ):
        on_hub.load("test")
    assert len(replace(on_hub, test_split="train").load("test")) == len(on_hub.load("train"))  # as it is asked for
    (folder := tmp_path / "alone").mkdir()
    put("train.jsonl", lines())(folder)
    with pytest.raises(UserError, match=r"has no split 'test', but train: name one, or a part.*task.dev_size=200"):
        replace(TASK, data_dir=None, hub=str(folder)).load("test")
    with pytest.raises(UserError, match=r"task 't' names no data: set task.data_dir=FOLDER"):
        replace(TASK, data_dir=None)
    with pytest.raises(UserError, match=r"task.test_file=null names no file"):
        replace(TASK, data_dir=None, train_file=str(tmp_path / "train.jsonl")).load("test")


# Damaged files, and bad rows


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("train.json", b'[{"question": "a"}, 3]', r"train.json, row 1: no field 'answer'"),
        ("train.json", lines(ROWS[:1]) + b"3", r"train.json, line 2: a int, not an object; each line must"),
        ("train.json", b"[3]", r"train.json, row 1: a int, not an object; the array must hold {...}"),
        ("train.json", b'[{"question": "a",}]', r"train.json: not JSON \(.*\); the file must be an array"),
        ("train.json", b'{"a":\n 1]}', r"train.json: not JSON \(Expecting ',' delimiter, line 2, column \d"),
        ("train.json", b'{"question": ["a"], "answer": ["b"]}', r"train.json: an object of 2 lists, not rows"),
        ("train.jsonl", gzip.compress(lines(), mtime=0), r"train.jsonl: the content is that of a .gz file"),
        ("train.csv", b"PAR1", r"train.csv: the content is that of a .parquet file"),
        ("train.parquet", b"version https://git-lfs.github.com/spec/v1\noid", r"a pointer of Git LFS"),
        ("train.jsonl.zip", b"PK", r"train.jsonl does not exist, and train.jsonl.zip is of no format that is read"),
        ("train.csv", b"question,answer\na,b\nc,\n", r"train.csv, row 2: the answer is empty"),
        (
            "train.csv",
            b"question,answer\na,b,c\n",
            r"row 1: 3 value.s., but the header names 2 column.s., separated by ','",
        ),
        ("train.csv", b"question,answer\na,b\nc,d,e\n", r"train.csv, row 2: 3 value.s., but the header names 2"),
        ("train.csv", b"id,question,answer\n1,a,b\n\n2,c", r"train.csv, row 2: 2 value.s., but the header names 3"),
        ("train.csv", b"question;answer\na;b\nc", r"row 2: 1 value.s., .* names 2 column.s., separated by ';'"),
        ("train.tsv", b"question\tanswer\r\na\r\n", r"row 1: 1 value.s., .* names 2 column.s., separated by '.t'"),
        (
            "train.tsv.gz",
            gzip.compress(b"question\tanswer\na\tb\tc", mtime=0),
            r"row 1: 3 value.s., .* names 2 column",
        ),
        ("train.csv", b"question,answer,answer\na,b,c\n", r"train.csv: the column 'answer' comes twice; rename"),
        ("train.csv", b"question,x, answer\na,b,c\n", r"no field 'answer' .*; it has ' answer', question"),
        ("train.csv", b"question,answer\n", r"the train split is empty"),
        ("train.csv", b"", r"the train split is empty"),
        ("train.csv", b'question,answer\n"a,b\nc,d\n', r"train.csv, near line 3: a stray quote \(unexpected end"),
        ("train.tsv", b'question\tanswer\n"a\tb\n"c\td\n', r"train.tsv, near line 3: a stray quote"),
        ("train.csv", "question,answer\né,b\n".encode("latin-1"), r"train.csv: not UTF-8; convert"),
        ("train.csv", "question,answer\nда,нет".encode("cp1251"), r"train.csv: not UTF-8; convert"),
        ("train.csv", "question,answer\na,b".encode("utf-16"), r"train.csv: UTF-16, not UTF-8; convert"),
        ("train.tsv", "question\tanswer\na\tb".encode("utf-16-le"), r"train.tsv: UTF-16-LE, not UTF-8; convert"),
        (
            "train.csv.gz",
            gzip.compress("question,answer".encode("utf-32-be"), mtime=0),
            r"UTF-32-BE, not UTF-8; convert",
        ),
        ("train.parquet", b"PAR1 and no more", r"train.parquet: cannot be read as Parquet \(ArrowInvalid: "),
        ("train.jsonl.gz", b"no gzip", r"train.jsonl.gz: cannot be read as JSON Lines \(OSError: zlib"),
        (
            "train.jsonl.gz",
            gzip.compress(lines(), mtime=0)[:-20],
            r"train.jsonl.gz: cannot be .* \(OSError: Truncated",
        ),
        ("train.jsonl.gz", gzip.compress(lines(ROWS[:1]) + b"{", mtime=0), r"train.jsonl.gz, line 2: not JSON"),
    ],
)
def test_a_damaged_file_is_one_true_sentence(tmp_path: Path, name: str, content: bytes, sentence: str, capfd):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=sentence) as refused:
        replace(TASK, data_dir=str(tmp_path)).load("train")
    assert "\n" not in str(refused.value) and len(str(refused.value)) < 600
    assert "Failed to" not in capfd.readouterr().err, "the library logs what it raises"


def test_a_separator_that_is_no_comma_is_told_of(tmp_path: Path, caplog):
    caplog.set_level("INFO")
    (tmp_path / "train.csv").write_text('question;answer\n"a\n;b";c,d')
    (sample,) = replace(TASK, data_dir=str(tmp_path)).load("train")
    assert "a\n;b" in sample.prompt and sample.answer == " c,d"
    assert "train.csv: the columns are separated by ';'" in caplog.text


@pytest.mark.parametrize("table", ['sep=|\nquestion|answer\na, b|"c|d"', 'question, answer\n"a, b", "c|d"'])
def test_a_spreadsheets_first_line_and_a_space_behind_every_separator_are_no_text(tmp_path: Path, table: str):
    (tmp_path / "train.csv").write_text(table)
    (sample,) = replace(TASK, data_dir=str(tmp_path)).load("train")
    assert (sample.prompt, sample.answer) == ("Q: a, b\nA:", " c|d")


def test_a_bad_row_of_a_table_is_named_by_row_and_field(tmp_path: Path):
    import pandas as pd

    rows = [*ROWS, {"question": None, "answer": "x"}]
    pd.DataFrame(rows).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(UserError, match=r"train.parquet, row 6: field 'question' is NoneType, not text \("):
        replace(TASK, data_dir=str(tmp_path)).load("train")


# Values that are no text


def test_numbers_and_truth_values_are_text_as_json_has_them(tmp_path: Path):
    values = [3, -0.5, True, False, 10**30, "x"]
    (tmp_path / "train.jsonl").write_bytes(lines([{"question": "?", "answer": value} for value in values]))
    answers = [sample.answer for sample in replace(TASK, data_dir=str(tmp_path)).load("train")]
    assert answers == [" 3", " -0.5", " true", " false", f" {10**30}", " x"]


def test_a_float32_column_is_text_with_its_own_digits_and_a_table_may_be_empty(tmp_path: Path):
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table({"question": ["?", "!"], "answer": pa.array([0.1, 2.5], pa.float32())})
    parquet.write_table(table, tmp_path / "train.parquet")
    task = replace(TASK, data_dir=str(tmp_path))
    assert [sample.answer for sample in task.load("train")] == [" 0.1", " 2.5"]
    parquet.write_table(table[:0], tmp_path / "train.parquet")
    with pytest.raises(UserError, match="the train split is empty"):
        task.load("train")


def test_a_folder_that_no_library_wrote_is_no_file(tmp_path: Path):
    with pytest.raises(
        UserError, match=r"is a folder that save_to_disk did not write: name its files, as in '.*jsonl'"
    ):
        replace(TASK, train_file=str(tmp_path)).load("train")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_a_number_that_is_not_finite_is_refused(tmp_path: Path, value: str):
    (tmp_path / "train.jsonl").write_text(f'{{"question": "?", "answer": {value}}}')
    with pytest.raises(UserError, match=r"line 1: field 'answer' is (nan|-?inf), not text"):
        replace(TASK, data_dir=str(tmp_path)).load("train")


@pytest.mark.parametrize("form", ["parquet", "saved"])
def test_class_labels_are_read_by_name_and_a_label_that_is_not_given_is_refused(tmp_path: Path, form: str):
    from datasets import ClassLabel, Dataset, Features, List, Value

    label = ClassLabel(names=["no", "yes"])
    features = Features({"question": Value("string"), "answer": label, "all": List(label), "in": {"one": label}})
    row = {"question": "?", "answer": 1, "all": [0, 1], "in": {"one": 0}}

    def write(folder: Path, *rows: dict[str, Any]) -> Task:
        data = Dataset.from_list(list(rows), features=features)
        folder.mkdir()
        data.to_parquet(folder / "train.parquet") if form == "parquet" else data.save_to_disk(folder)
        return replace(TASK, data_dir=str(folder), answer="{answer} {all[0]} {in[one]}")

    (sample,) = write(tmp_path / "good", row).load("train")
    assert sample.answer == "yes no no"
    with pytest.raises(UserError, match="row 2: field 'answer' is NoneType, not text"):
        write(tmp_path / "bad", row, {**row, "answer": -1}).load("train")


def test_images_are_not_decoded_and_a_template_that_wants_one_is_refused(tmp_path: Path):
    from datasets import Dataset, Features, Image, Value

    features = Features({"question": Value("string"), "answer": Value("string"), "image": Image()})
    rows = [{"question": "?", "answer": "!", "image": {"bytes": b"no image", "path": None}}]
    Dataset.from_list(rows, features=features).save_to_disk(tmp_path)
    task = replace(TASK, data_dir=str(tmp_path))
    assert len(task.load("train")) == 1
    with pytest.raises(UserError, match="row 1: field 'image' is dict, not text"):
        replace(task, prompt="{image}").load("train")
