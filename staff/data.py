"""A task's samples: read, rendered into prompt and answer, tokenised once for scorer and trainer alike."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from string import Formatter
from typing import Any

import numpy as np

from staff.errors import UserError
from staff.models import local_path


@dataclass(frozen=True)
class Sample:
    """One prompt with its answer; `references` are what an evaluation compares with (the answer, unless the
    test split has several)."""

    id: str
    prompt: str
    answer: str
    references: tuple[str, ...]


@dataclass(frozen=True)
class Task:
    """Where a task's samples come from and how they read.

    Templates are `str.format` templates over the fields of a row, `{translation[kk]}` reaches into a nested
    one. The prompt and the answer are tokenised apart, so white space between them belongs to the answer.
    """

    name: str
    prompt: str
    answer: str
    metrics: Sequence[str]
    max_new_tokens: int
    data_dir: str | None = None  # folder with JSON Lines files; None: the hub
    train_file: str = "train.jsonl"
    test_file: str = "test.jsonl"
    hub: str | None = None  # data set on the Hugging Face hub
    hub_config: str | None = None
    revision: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    id_field: str | None = None  # None: an id made from the sample's own text
    references: Sequence[str] = ()  # fields of the test split with reference answers; none: the answer
    too_long: str = "refuse"  # or "drop": samples whose answer does not fit the cut-off
    train_limit: int | None = None  # the first so many rows
    test_limit: int | None = None
    learning_rate: float | None = None  # the published value for this task; read by conf/finetune

    def __post_init__(self) -> None:
        if self.too_long not in ("refuse", "drop"):
            raise UserError(f"task.too_long={self.too_long!r} is unknown: choose 'refuse' or 'drop'.")
        for name in ("max_new_tokens", "train_limit", "test_limit"):
            value = getattr(self, name)
            if (value is not None or name == "max_new_tokens") and (not isinstance(value, int) or value < 1):
                raise UserError(f"task.{name}={value!r} must be a whole number of at least 1.")
        if self.data_dir is None and self.hub is None:
            raise UserError(
                f"task {self.name!r} names no data: set task.data_dir=FOLDER (with {self.train_file} and "
                f"{self.test_file}) or task.hub=NAME."
            )

    def load(self, split: str) -> list[Sample]:
        """The samples of `split` ("train": the pool, "test": the evaluation), in file order.

        Raises:
            UserError: a missing file or field, an empty answer, an id that comes twice; with file and line.
        """
        limit = self.train_limit if split == "train" else self.test_limit
        rows = self._rows(split)
        samples: list[Sample] = []
        for where, row in rows:
            if limit is not None and len(samples) >= limit:
                break
            samples.append(self._sample(row, where, split))
        if not samples:
            raise UserError(f"task {self.name!r}: the {split} split is empty; check task.data_dir.")
        return _with_unique_ids(samples, self.id_field)

    def _rows(self, split: str) -> Iterable[tuple[str, Mapping[str, Any]]]:
        if self.data_dir is not None:
            return read_json_lines(
                local_path(self.data_dir) / (self.train_file if split == "train" else self.test_file)
            )
        return self._hub_rows(self.train_split if split == "train" else self.test_split)

    def _hub_rows(self, split: str) -> Iterable[tuple[str, Mapping[str, Any]]]:
        import datasets

        assert self.hub is not None
        try:
            data = datasets.load_dataset(self.hub, self.hub_config, revision=self.revision, split=split)
        except Exception as error:
            raise UserError(
                f"task.hub={self.hub} (split {split}) could not be read from the Hugging Face hub "
                f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}); "
                f"give task.data_dir=FOLDER with {self.train_file} and {self.test_file} instead."
            ) from error
        return ((f"{self.hub}[{split}] row {i + 1}", dict(row)) for i, row in enumerate(data))  # type: ignore[arg-type]

    def _sample(self, row: Mapping[str, Any], where: str, split: str) -> Sample:
        prompt = _render(self.prompt, row, where, "task.prompt")
        references: tuple[str, ...] = ()
        if split == "test" and self.references:
            references = tuple(_text(row, name, where, "task.references") for name in self.references)
            answer = references[0]
        else:
            answer = _render(self.answer, row, where, "task.answer")
            references = (answer.strip(),)
        if not answer.strip():
            raise UserError(f"{where}: the answer is empty; remove the line or fill its field ({self.answer!r}).")
        id = str(_lookup(row, self.id_field, where, "task.id_field")) if self.id_field else ""
        return Sample(id or _content_id(prompt, answer), prompt, answer, references)


def read_json_lines(path: Path) -> Iterable[tuple[str, Mapping[str, Any]]]:
    """Rows of a JSON Lines file, each with its place ("file, line n") for messages; blank lines are skipped."""
    if not path.is_file():
        raise UserError(f"{path} is not there: task.data_dir must be a folder that holds {path.name}.")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: not UTF-8 (byte {error.start}); convert the file to UTF-8.") from None
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: not JSON ({error.msg}); each line must be one JSON object.") from None
            if not isinstance(row, dict):
                raise UserError(f"{where}: a {type(row).__name__}, not an object; each line must be {{...}}.")
            yield where, row


def _lookup(row: Mapping[str, Any], name: str, where: str, setting: str) -> Any:
    if name not in row:
        raise UserError(f"{where}: no field {name!r} (wanted by {setting}); it has {', '.join(sorted(row))}.")
    return row[name]


def _text(row: Mapping[str, Any], name: str, where: str, setting: str) -> str:
    value = _lookup(row, name, where, setting)
    if not isinstance(value, str):
        raise UserError(f"{where}: field {name!r} is {type(value).__name__}, not text (wanted by {setting}).")
    return value


def _render(template: str, row: Mapping[str, Any], where: str, setting: str) -> str:
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"{setting}={template!r} is not a template ({error}); write fields as {{field}}.") from None
    for _, name, _, _ in parts:
        if name is None:
            continue
        root = name.split("[")[0].split(".")[0]
        value = _lookup(row, root, where, setting)
        if "[" in name:
            key = name.split("[")[1].rstrip("]")
            if not isinstance(value, Mapping) or not isinstance(value.get(key), str):
                raise UserError(f"{where}: field {root!r} has no text {key!r} (wanted by {setting}).")
        else:
            _text(row, root, where, setting)
    return template.format(**row)


def _content_id(prompt: str, answer: str) -> str:
    return hashlib.blake2b(f"{prompt}\0{answer}".encode(), digest_size=8).hexdigest()


def _with_unique_ids(samples: list[Sample], id_field: str | None) -> list[Sample]:
    seen: dict[str, int] = {}
    unique = []
    for sample in samples:
        count = seen[sample.id] = seen.get(sample.id, 0) + 1
        if count > 1 and id_field:
            raise UserError(f"task.id_field={id_field}: the id {sample.id!r} comes twice; ids must be unique.")
        # Without ids of their own, copies of one text are told apart by their count.
        unique.append(sample if count == 1 else Sample(f"{sample.id}-{count}", *_rest(sample)))
    return unique


def _rest(sample: Sample) -> tuple[str, str, tuple[str, ...]]:
    return sample.prompt, sample.answer, sample.references


@dataclass(frozen=True)
class TokenizedSamples:
    """Samples as one model reads them: begin token (where the tokenizer has one), prompt, answer, end token.

    Attributes:
        ids: the samples' ids.
        input_ids: one row of token ids a sample.
        prompt_lengths: tokens before the first answer token.
    """

    ids: list[str]
    input_ids: list[list[int]] = field(repr=False)
    prompt_lengths: list[int] = field(repr=False)

    def __len__(self) -> int:
        return len(self.ids)

    def labels(self, i: int) -> list[int]:
        """Token ids on the answer and its end token, -100 on the prompt (unshifted, as transformers wants)."""
        start = self.prompt_lengths[i]
        return [-100] * start + self.input_ids[i][start:]

    def prompts(self) -> list[list[int]]:
        return [row[:n] for row, n in zip(self.input_ids, self.prompt_lengths, strict=True)]

    @cached_property
    def lengths(self) -> np.ndarray:
        return np.array([len(row) for row in self.input_ids], dtype=np.int64)

    @cached_property
    def answer_lengths(self) -> np.ndarray:
        return self.lengths - np.array(self.prompt_lengths, dtype=np.int64)

    def take(self, indices: Iterable[int]) -> TokenizedSamples:
        rows = [int(i) for i in indices]
        return TokenizedSamples(
            [self.ids[i] for i in rows],
            [self.input_ids[i] for i in rows],
            [self.prompt_lengths[i] for i in rows],
        )

    @cached_property
    def fingerprint(self) -> str:
        content = json.dumps([self.ids, self.input_ids, self.prompt_lengths], separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()


def tokenize(samples: Sequence[Sample], tokenizer: Any) -> TokenizedSamples:
    """Tokenise prompt and answer apart and join them, so that no token spans their border."""
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {tokenizer.name_or_path} has no end token; set its eos_token.")
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    prompts = tokenizer([s.prompt for s in samples], add_special_tokens=False)["input_ids"]
    answers = tokenizer([s.answer for s in samples], add_special_tokens=False)["input_ids"]
    rows = [begin + p + a + [tokenizer.eos_token_id] for p, a in zip(prompts, answers, strict=True)]
    return TokenizedSamples([s.id for s in samples], rows, [len(begin) + len(p) for p in prompts])


def fitting(tokenized: Sequence[TokenizedSamples], max_length: int, too_long: str) -> np.ndarray:
    """Positions of the samples that fit `max_length` for every tokenizer given.

    A sample that one model would cut is handled the same way for all: refused by name, or dropped from all.
    """
    longest = np.max([t.lengths for t in tokenized], axis=0)
    keep = np.flatnonzero(longest <= max_length)
    over = np.flatnonzero(longest > max_length)
    if len(over) and too_long == "refuse":
        worst = over[np.argmax(longest[over])]
        raise UserError(
            f"finetune.max_length={max_length} would cut the answer of {len(over)} sample(s), the longest being "
            f"{tokenized[0].ids[worst]!r} with {longest[worst]} tokens: raise it, or set task.too_long=drop."
        )
    if not len(keep):
        raise UserError(f"finetune.max_length={max_length} leaves no sample: raise it.")
    return keep
