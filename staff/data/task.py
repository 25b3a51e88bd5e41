"""Tasks: where samples come from, and how rows become prompts and answers."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

from staff.data.rows import read_json_lines
from staff.data.templates import lookup, render, shortened, text_of
from staff.errors import UserError
from staff.runtime.paths import local_path


@dataclass(frozen=True)
class Sample:
    """One prompt with its answer; `references` are what an evaluation compares with (the answer, unless the
    test split has several). `group` is the part of the data it belongs to, where the task has a `group_field`."""

    id: str
    prompt: str
    answer: str
    references: tuple[str, ...]
    group: str | None = None


@dataclass(frozen=True)
class Task:
    """A data set, and templates for its prompts and answers.

    Templates name fields of a row in braces; `{translation[kk]}` is a nested field, `{{` is a brace. Prompt and
    answer are tokenised separately, so white space between them should start the answer.
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
    group_field: str | None = None  # field that says which group a sample belongs to; None: no groups
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
        for setting, texts in (
            ("prompt", [self.prompt]),
            ("answer", [self.answer]),
            ("references", self.references),
        ):
            if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
                kind = "a list of fields" if setting == "references" else "a template"
                raise UserError(f"task.{setting}={getattr(self, setting)!r} must be {kind}.")
        if self.group_field is not None and not isinstance(self.group_field, str):
            raise UserError(f"task.group_field={self.group_field!r} must be null or name a field of the rows.")
        self._check_source()

    def _check_source(self) -> None:
        if self.data_dir is not None and not isinstance(self.data_dir, str):
            raise UserError(f"task.data_dir={self.data_dir!r} must name a folder by text, such as ./data.")
        if self.data_dir is None and self.hub is None:
            raise UserError(
                f"task {self.name!r} names no data: set task.data_dir=FOLDER (with {self.train_file} and "
                f"{self.test_file}) or task.hub=NAME."
            )

    def load(self, split: str) -> list[Sample]:
        """The samples of `split`, "train" or "test", in file order.

        Test rows with the same prompt become one sample with all their references: a model answers them alike.

        Raises:
            UserError: a missing file or field, empty text, or a duplicate id; with file and line.
        """
        limit = self.train_limit if split == "train" else self.test_limit
        return self.samples(islice(self._rows(split), limit), split)

    def samples(self, rows: Iterable[tuple[str, Mapping[str, Any]]], split: str = "train") -> list[Sample]:
        """As `load`, from rows, each with its place for messages."""
        samples: dict[str, Sample] = {}
        copies = Counter[str]()
        for where, row in rows:
            sample = self._sample(row, where, split)
            if sample.id in samples:
                if self.id_field:
                    raise UserError(
                        f"{where}: the id {shortened(sample.id)!r} comes twice (task.id_field={self.id_field}); "
                        "ids must be unique."
                    )
                # Copies of a text have the same digest: number them.
                copies[sample.id] += 1
                sample = replace(sample, id=f"{sample.id}-{copies[sample.id] + 1}")
            samples[sample.id] = sample
        if not samples:
            raise UserError(f"task {self.name!r}: the {split} split is empty; check task.data_dir.")
        return _asked_once(samples.values()) if split == "test" else list(samples.values())

    def reference_samples(self, test: Iterable[Sample]) -> list[Sample]:
        """A sample for each reference of the test samples, with the reference as its answer.

        White space at the start of the answer template belongs to every reference, as it does to training answers.
        """
        space = self.answer[: len(self.answer) - len(self.answer.lstrip())]
        return [
            Sample(f"{sample.id}#{k}", sample.prompt, space + text.strip(), (text,))
            for sample in test
            for k, text in enumerate(sample.references)
        ]

    def source(self) -> dict[str, Any] | None:
        """Name and commit of the data set on the hub; None for files.

        Without a network, the commit is `revision`.
        """
        if self.data_dir is not None:
            return None
        from huggingface_hub import HfApi

        assert self.hub is not None
        try:
            commit = HfApi().dataset_info(self.hub, revision=self.revision).sha
        except Exception:  # no network: what the cache has is identified by its content anyway
            commit = self.revision
        return {"hub": self.hub, "commit": commit}

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
        return ((f"{self.hub}[{split}] row {i + 1}", dict(row)) for i, row in enumerate(data))

    def _sample(self, row: Mapping[str, Any], where: str, split: str) -> Sample:
        prompt = render(self.prompt, row, where, "task.prompt")
        references: tuple[str, ...] = ()
        if split == "test" and self.references:
            references = tuple(text_of(row, [name], where, "task.references") for name in self.references)
            answer = references[0]
        else:
            answer = render(self.answer, row, where, "task.answer")
            references = (answer.strip(),)
        for name, text, template in (("prompt", prompt, self.prompt), ("answer", answer, self.answer)):
            if not text.strip():
                raise UserError(f"{where}: the {name} is empty; remove the line or fill its field ({template!r}).")
        id = _id(row, self.id_field, where) if self.id_field else _content_id(prompt, answer)
        group = text_of(row, [self.group_field], where, "task.group_field") if self.group_field else None
        return Sample(id, prompt, answer, references, group)


def _asked_once(samples: Iterable[Sample]) -> list[Sample]:
    by_prompt: dict[str, Sample] = {}
    for sample in samples:
        if first := by_prompt.get(sample.prompt):
            sample = replace(first, references=tuple(dict.fromkeys((*first.references, *sample.references))))
        by_prompt[sample.prompt] = sample
    return list(by_prompt.values())


def _id(row: Mapping[str, Any], field: str, where: str) -> str:
    value = lookup(row, [field], where, "task.id_field")
    if type(value) is int:
        return str(value)
    if value == "" or not isinstance(value, str):
        kind = type(value).__name__ if value != "" else "empty"
        raise UserError(f"{where}: field {field!r} is {kind}, not an id (wanted by task.id_field).")
    return text_of(row, [field], where, "task.id_field")


def data_digest(samples: Sequence[Sample]) -> str:
    """SHA-256 of what the samples are, wherever they were read from; a field that is None changes nothing."""
    rows = [{name: value for name, value in asdict(s).items() if value is not None} for s in samples]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _content_id(prompt: str, answer: str) -> str:
    return hashlib.blake2b(f"{prompt}\0{answer}".encode(), digest_size=8).hexdigest()
