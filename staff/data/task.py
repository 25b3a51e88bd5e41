"""Tasks: where samples come from, and how rows become prompts and answers."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

from staff.data.files import Files, files_of, read_folder, read_hub, read_rows
from staff.data.layouts import Layout, layout_of
from staff.data.rows import Rows
from staff.data.samples import Sample, Turns, asked_once, content_id, plain_text, several_answers
from staff.data.templates import check_template, field_of, id_of, render, shortened, texts_of
from staff.errors import UserError
from staff.runtime import processes
from staff.runtime.files import local_path
from staff.runtime.hub import Repository

log = logging.getLogger(__name__)

SPLITS = ("train", "test", "dev")


@dataclass(frozen=True)
class Task:
    """A data set, and templates for its prompts and answers.

    Templates name fields of a row in braces, `{translation[kk]}` and `{answers[0]}` reach into nested ones; a
    template with `{{` or `{%` is Jinja. Prompt and answer are tokenised separately, so white space between them
    should start the answer. Without templates, the columns tell the layout (`staff.data.layouts.LAYOUTS`).
    """

    name: str
    prompt: str | None
    answer: str | None
    metrics: Sequence[str]
    max_new_tokens: int
    data_dir: str | None = None  # folder of the files, or of `save_to_disk`; None: the hub, or files by their paths
    train_file: Files | None = None  # path, glob or list; None: the one of `data_dir` that is named train
    test_file: Files | None = None
    hub: str | None = None  # data set on the Hugging Face hub, or a folder that `datasets.load_dataset` reads
    hub_config: str | None = None
    revision: str | None = None
    train_split: str = "train"
    test_split: str = "test"
    dev_file: Files | None = None  # a validation slice of its own: a file, a split, or so many of the training rows
    dev_split: str | None = None
    dev_size: int | None = None
    id_field: str | None = None  # None: an id made from the sample's own text
    group_field: str | None = None  # field that says which group a sample belongs to; None: no groups
    evaluate_on: str = "test"  # or "dev": on the validation slice, to choose settings by
    references: Sequence[str] = ()  # fields of the test split with reference answers or lists; none: the answer
    choices: Sequence[str] = ()  # answers that metrics of choices choose among, the same for every test sample
    choices_field: str | None = None  # or a field of the test rows with a list of them
    too_long: str = "refuse"  # or "drop": samples whose answer does not fit the cut-off
    train_limit: int | None = None  # the first so many rows
    test_limit: int | None = None
    deduplicate: str = "none"  # duplicates that are dropped from the pool: "none", "exact", or "near" ones as well
    loss_on: str = "all"  # answers of a conversation that are trained and scored; or "last"
    learning_rate: float | None = None  # the published value for this task; read by conf/finetune

    def __post_init__(self) -> None:
        if self.too_long not in ("refuse", "drop"):
            raise UserError(f"task.too_long={self.too_long!r} is unknown: choose 'refuse' or 'drop'.")
        if self.loss_on not in ("all", "last"):
            raise UserError(f"task.loss_on={self.loss_on!r} is unknown: choose 'all' or 'last'.")
        if self.deduplicate not in ("none", "exact", "near"):
            raise UserError(f"task.deduplicate={self.deduplicate!r} is unknown: choose 'none', 'exact' or 'near'.")
        if self.evaluate_on not in ("test", "dev"):
            raise UserError(f"task.evaluate_on={self.evaluate_on!r} is unknown: choose 'test' or 'dev'.")
        devs = [name for name in ("dev_file", "dev_split", "dev_size") if getattr(self, name) is not None]
        if self.evaluate_on == "dev" and not devs:
            raise UserError(
                "task.evaluate_on=dev needs a validation slice: set task.dev_size=200, task.dev_file or "
                "task.dev_split."
            )
        if len(devs) > 1:
            raise UserError(f"task.{devs[0]} and task.{devs[1]} both name the validation slice: set one of them.")
        for name in ("max_new_tokens", "train_limit", "test_limit", "dev_size"):
            value = getattr(self, name)
            if (value is not None or name == "max_new_tokens") and (type(value) is not int or value < 1):
                raise UserError(f"task.{name}={value!r} must be a whole number of at least 1.")
        for setting in ("prompt", "answer"):
            if self.prompt is None and self.answer is None:
                continue
            if not isinstance(template := getattr(self, setting), str):
                raise UserError(f"task.{setting}={template!r} must be a template.")
            check_template(template, f"task.{setting}")
        fields = self.references
        if not isinstance(fields, list | tuple) or not all(isinstance(field, str) for field in fields):
            raise UserError(f"task.references={fields!r} must be a list of fields, or [] for none.")
        for name in ("id_field", "group_field"):
            if not isinstance(field := getattr(self, name), str | None):
                raise UserError(f"task.{name}={field!r} must be null or name a field of the rows.")
        self._check_choices()
        self._check_source()

    def _check_choices(self) -> None:
        if self.choices and self.choices_field is not None:
            raise UserError("task.choices and task.choices_field both list the choices: set one of them.")
        if self.choices_field is not None and not isinstance(self.choices_field, str):
            raise UserError(f"task.choices_field={self.choices_field!r} must be null or name a field of the rows.")
        texts = isinstance(self.choices, list | tuple) and all(isinstance(text, str) for text in self.choices)
        if not texts or (self.choices and not _are_choices(self.choices)):
            raise UserError(
                f"task.choices={self.choices!r} must be a list of two or more different texts, such as [yes, no], "
                "in a file each in quotes."
            )

    def _check_source(self) -> None:
        if self.data_dir is not None and not isinstance(self.data_dir, str):
            raise UserError(f"task.data_dir={self.data_dir!r} must name a folder by text, such as ./data.")
        for name in ("hub", "hub_config", "revision", "dev_split"):
            if not isinstance(value := getattr(self, name), str | None):
                raise UserError(f"task.{name}={value!r} must be null or one name.")
        for name in ("train_split", "test_split"):
            if not isinstance(value := getattr(self, name), str):
                raise UserError(f"task.{name}={value!r} must be one name, such as train.")
        for split in SPLITS:
            given = getattr(self, f"{split}_file")
            paths = given if isinstance(given, list | tuple) else [given]
            if given is not None and not (paths and all(isinstance(path, str) for path in paths)):
                raise UserError(f"task.{split}_file={given!r} must be a path, a glob or a list of them.")
        if self.data_dir is None and self.hub is None and self.train_file is None:
            raise UserError(
                f"task {self.name!r} names no data: set task.data_dir=FOLDER (with train.jsonl and test.jsonl, or "
                "other formats), task.train_file=FILE or task.hub=NAME."
            )

    def load(self, split: str) -> list[Sample]:
        """The samples of `split` ("train", "test" or "dev"), in file order.

        Test rows with the same prompt become one sample with all their references: a model answers them alike.

        Raises:
            UserError: a missing file or field, empty text, or a duplicate id; with file and line.
        """
        limit = {"train": self.train_limit, "test": self.test_limit}.get(split)
        return self.samples(islice(self.rows(split), limit), split)

    def samples(self, rows: Iterable[tuple[str, Mapping[str, Any]]], split: str = "train") -> list[Sample]:
        """As `load`, from rows, each with its place for messages."""
        samples: dict[str, Sample] = {}
        copies = Counter[str]()
        layout = None
        for where, row in rows:
            if self.prompt is None and layout is None:
                layout = layout_of(row, where)
                log.info("the %s split is read as %s", split, layout.name)
            sample = self._sample(row, where, split, layout)
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
            given = [field for field in (f"{split}_file", "data_dir", "hub") if getattr(self, field) is not None]
            raise UserError(
                f"task {self.name!r}: the {split} split is empty; check task.{(given or ['data_dir'])[0]}."
            )
        return asked_once(samples.values()) if split == "test" else list(samples.values())

    def reference_samples(self, test: Iterable[Sample]) -> list[Sample]:
        """A sample for each reference of the test samples, with the reference as its answer.

        White space at the start of the answer template belongs to every reference, as it does to training answers.
        In a conversation, the reference is the assistant's last turn.
        """
        return self._answered((sample, sample.references) for sample in test)

    def choice_samples(self, test: Iterable[Sample]) -> list[Sample]:
        """A sample for each choice of the test samples, as `reference_samples`."""
        return self._answered((sample, sample.choices) for sample in test)

    def _answered(self, answers: Iterable[tuple[Sample, Sequence[str]]]) -> list[Sample]:
        samples = []
        for sample, texts in answers:
            space = _opening_space(sample.answer if self.answer is None else self.answer)
            for k, text in enumerate(texts):
                turns = (*sample.turns[:-1], ("assistant", text.strip())) if sample.turns else ()
                samples.append(Sample(f"{sample.id}#{k}", sample.prompt, space + text.strip(), (text,), turns))
        return samples

    @property
    def origin(self) -> str:
        """Where the training rows come from, in words."""
        files = self.train_file or self.data_dir
        if files is None:
            return f"the data set {self.hub} on the hub"
        return files if isinstance(files, str) else ", ".join(files)

    def source(self) -> dict[str, Any] | None:
        """Name and commit of the training rows' data set on the hub; None for files."""
        if self.train_file is not None or self.repository is None:
            return None
        return {"hub": self.hub, "commit": self.repository.commit()}

    @property
    def repository(self) -> Repository | None:
        """The data set on the hub; None where files or a folder take its place."""
        if self.hub is None or self.data_dir is not None or local_path(self.hub).is_dir():
            return None
        return Repository(self.hub, "dataset", self.revision)

    def pinned(self) -> Task:
        """The same task, with the commit of a data set on the hub as its revision: one for all processes.

        Raises:
            UserError: neither the hub nor its local cache has the data set.
        """
        if self.repository is None:
            return self
        return replace(self, revision=processes.broadcast_from_main(self.repository.commit))

    def stamps(self, split: str) -> list[tuple[str, int, int]]:
        """Path, time of change and size of every file of a split; empty where it is not read from files."""
        if self.data_dir is None and getattr(self, f"{split}_file") is None:
            files = [] if self.hub is None else [local_path(self.hub)]
        else:
            files = self._files(split)
        found = [part for file in files for part in ([file] if file.is_file() else file.rglob("*"))]
        return [(str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in found]

    def _files(self, split: str) -> list[Path]:
        name = self.dev_split if split == "dev" else None
        return files_of(split, getattr(self, f"{split}_file"), self.data_dir, name)

    def rows(self, split: str) -> Rows:
        """The rows of a split, each with its place for messages; files come before the hub."""
        given, name = getattr(self, f"{split}_file"), getattr(self, f"{split}_split")
        if self.data_dir is None and given is None and self.hub is not None:
            if self.repository is not None:
                return read_hub(self.repository, self.hub_config, name)
            return read_folder(local_path(self.hub), self.hub_config, name, self.train_split)
        return chain.from_iterable(read_rows(file, name) for file in self._files(split))

    def reading(self, samples: Iterable[Sample]) -> dict[str, str]:
        """How training samples are read, beside `Family.reading`; only conversations of several answers differ."""
        return {"loss_on": "all"} if self.loss_on == "all" and several_answers(samples) else {}

    def _sample(self, row: Mapping[str, Any], where: str, split: str, layout: Layout | None) -> Sample:
        turns: Turns = ()
        references: tuple[str, ...] = ()
        named = row
        if split == "test" and self.references:
            references = texts_of(row, self.references, where, "task.references")
        if layout is not None:
            named = layout.named(row)
            layout.check(named, where, (self.id_field, self.group_field, self.choices_field, *self.references))
        if layout is not None and layout.turns is not None:
            turns = layout.turns(named, where, self.loss_on == "all")
            prompt, answer = plain_text(turns)
        else:
            prompt, answer = self._texts(named, where, layout, references)
        id = id_of(row, self.id_field, where) if self.id_field else content_id(prompt, answer)
        group = field_of(row, self.group_field, where, "task.group_field") if self.group_field else None
        asked = split == "test" or self.evaluate_on == "dev"
        choices: tuple[str, ...] = tuple(self.choices) if asked else ()
        if asked and self.choices_field is not None:
            choices = texts_of(row, [self.choices_field], where, "task.choices_field")
            if not _are_choices(choices):
                raise UserError(f"{where}: the list of task.choices_field must have two or more different texts.")
        return Sample(id, prompt, answer, references or (answer.strip(),), turns, group, choices)

    def _texts(
        self, row: Mapping[str, Any], where: str, layout: Layout | None, references: Sequence[str]
    ) -> tuple[str, str]:
        """Prompt and answer by the templates; the first reference takes the answer's place."""
        of_prompt, of_answer = (layout and layout.templates) or (self.prompt, self.answer)
        assert of_prompt is not None and of_answer is not None
        prompt = render(of_prompt, row, where, "task.prompt")
        answer = references[0] if references else render(of_answer, row, where, "task.answer")
        if references and layout is not None:
            answer = _opening_space(of_answer) + answer
        for name, text, template in (("prompt", prompt, of_prompt), ("answer", answer, of_answer)):
            if not text.strip():
                raise UserError(f"{where}: the {name} is empty; remove the line or fill its field ({template!r}).")
        return prompt, answer


def _opening_space(text: str) -> str:
    return text[: len(text) - len(text.lstrip())]


def _are_choices(texts: Sequence[str]) -> bool:
    return len(texts) > 1 and len({text.strip() for text in texts} - {""}) == len(texts)
