"""Which samples are for what: a run's pool, validation slice and test samples, kept apart; views of them; and those
that fit into the cut-off of fine-tuning and into the context windows of the models.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from staff.data import stored
from staff.data.duplicates import NEAR_LIMIT, Duplicates, content, duplicates, near_available
from staff.data.samples import Sample
from staff.data.task import Task
from staff.data.tokens import TokenizedSamples
from staff.errors import UserError
from staff.models.spec import ModelSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Splits:
    """Samples by what they are for.

    Attributes:
        pool: to choose from.
        dev: the validation slice, in no method's pool; empty where the task has none or evaluates on it.
        test: for the evaluation, of the test split or of the validation slice; empty where there is none.
        duplicates: as found in the pool, before any was dropped.
        dropped: samples of the training rows that were dropped as duplicates.
    """

    pool: Sequence[Sample]
    dev: list[Sample] = field(default_factory=list)
    test: list[Sample] = field(default_factory=list)
    duplicates: Duplicates | None = None
    dropped: int = 0

    @property
    def test_prompts_in_pool(self) -> int:
        """Test samples whose prompt is also in the pool: they measure memory, not learning."""
        asked = {sample.prompt for sample in self.test}
        found = {sample.prompt for sample in self.pool if sample.prompt in asked} if asked else set()
        return sum(sample.prompt in found for sample in self.test)


_last: dict[str, Splits] = {}
"""The splits that were read last, by what they were read from."""


def load_splits(task: Task, evaluated: bool = True, folder: Path | None = None, near: bool | None = None) -> Splits:
    """Read a task's splits, drop duplicates from the pool where asked, and carve the validation slice.

    The runs of a sweep share one reading: what was read last is kept until a file changes.

    Args:
        evaluated: False: no test split is read.
        folder: where the samples of large files are kept for other processes (`staff.data.stored`); None: nowhere.
        near: whether near duplicates are counted, as in `duplicates`; where they are dropped, they are.

    Raises:
        UserError: bad data, or a validation slice that shares samples with the pool or leaves none.
    """
    has_dev = task.dev_file is not None or task.dev_split is not None
    on_test = evaluated and task.evaluate_on == "test"
    splits = ["train", *(["test"] if on_test else []), *(["dev"] if has_dev else [])]
    stamps = [(split, task.stamps(split)) for split in splits]
    near = True if task.deduplicate == "near" else near
    known = f"{type(task)} {task} {stamps} evaluated: {evaluated} near: {near} {near_available()}"
    if known not in _last:
        _last.clear()

        def read() -> Splits:
            found = _splits(task, {split: task.load(split) for split in splits}, near)
            if task.evaluate_on == "test":
                return found
            return replace(found, dev=[], test=found.dev if evaluated else [])

        large = sum(size for _, files in stamps for _, _, size in files) >= stored.LARGE
        found = _last[known] = stored.kept(folder, task, known, read) if folder and large else read()
        _tell(found)
    return _last[known]


def _tell(splits: Splits) -> None:
    size, found = len(splits.pool) + splits.dropped, splits.duplicates
    if found and (words := found.words()):
        log.warning("duplicates among %d training samples: %s", size, words)
    if found and found.near_repeated is None and size > NEAR_LIMIT and near_available():
        said = "near duplicates are not looked for among %d training samples, more than %d: set %s to look for them"
        log.info(said, size, NEAR_LIMIT, "task.deduplicate=near")


def _splits(task: Task, read: Mapping[str, list[Sample]], near: bool | None) -> Splits:
    rows, test, dev = read["train"], read.get("test", []), read.get("dev", [])
    found = duplicates(rows, [*test, *dev], near)
    dropped = found.to_drop(task.deduplicate)
    pool = [rows[at] for at in np.setdiff1d(np.arange(len(rows)), dropped)]
    if not pool:
        raise UserError(
            f"task.deduplicate={task.deduplicate} drops all {len(rows)} training samples: set it to none."
        )
    if task.dev_size is not None:
        pool, dev = _carved(pool, task.dev_size)
    elif dev:
        _check_apart(pool, dev)
    return Splits(pool, dev, test, found, len(dropped))


def _carved(rows: Sequence[Sample], size: int) -> tuple[list[Sample], list[Sample]]:
    """The rows without `size` of them, and these: the same for every seed and every order of the rows.

    A sample whose text comes twice is not drawn, so that the two share none.
    """
    texts = [content(sample) for sample in rows]
    times = Counter(texts)
    single = [at for at, text in enumerate(texts) if times[text] == 1]
    if size > len(single) or size >= len(rows):
        raise UserError(
            f"task.dev_size={size} leaves no pool: {len(single)} of the {len(rows)} training samples can be drawn; "
            "lower it."
        )
    drawn = set(sorted(single, key=lambda at: _lot(rows[at].id))[:size])
    return [s for at, s in enumerate(rows) if at not in drawn], [s for at, s in enumerate(rows) if at in drawn]


def _lot(id: str) -> bytes:
    """A number that depends on the id alone, uniform over 64 bits; the lowest are drawn."""
    return hashlib.blake2b(f"validation slice\0{id}".encode(), digest_size=8).digest()


def _check_apart(pool: Sequence[Sample], dev: Sequence[Sample]) -> None:
    texts = {content(sample) for sample in pool}
    shared = [sample for sample in dev if content(sample) in texts]
    if shared:
        raise UserError(
            f"{len(shared)} of the {len(dev)} samples of the validation slice are also in the pool, such as "
            f"{shared[0].id!r}: remove them, or set task.deduplicate=exact, which drops them from the pool."
        )


@dataclass(frozen=True)
class DataView:
    """Which samples a signal reads, and which part of their text.

    Attributes:
        slice: "pool", the samples to choose from; or "dev", the validation slice.
        prompt: whether answers are read after their prompts.
        text: "answer"; or "all", which counts prompt tokens as answer tokens.
        indices: positions in the slice, in this order; None: all.
    """

    slice: str = "pool"
    prompt: bool = True
    text: str = "answer"
    indices: np.ndarray | None = None

    def of(self, samples: TokenizedSamples) -> TokenizedSamples:
        """This view of the samples of its slice."""
        if self.indices is not None:
            samples = samples.take(self.indices)
        if not self.prompt:
            samples = samples.without_prompts()
        return samples if self.text == "answer" else samples.all_as_answer()


@dataclass(frozen=True)
class Slice:
    """The same samples in the same order, tokenised for the small model and for the target."""

    small: TokenizedSamples
    target: TokenizedSamples
    groups: np.ndarray | None = None

    def of(self, small: bool) -> TokenizedSamples:
        """The samples as the small model or the target reads them."""
        return self.small if small else self.target


def check_vocabulary(samples: TokenizedSamples, spec: ModelSpec) -> None:
    """Refuse tokens that the model has no embedding for, as after adding tokens to its tokenizer alone."""
    rows = getattr(spec.config().get_text_config(), "vocab_size", None)
    if rows is None or not len(samples.tokens) or int(samples.tokens.max()) < rows:
        return
    at = int(np.argmax(samples.tokens >= rows))
    id = samples.ids[int(np.searchsorted(samples.offsets, at, side="right")) - 1]
    raise UserError(
        f"sample {id!r} has the token {samples.tokens[at]} of the tokenizer in {spec.path}, but the model has "
        f"{rows} embeddings: resize them (resize_token_embeddings), or take the tokenizer that belongs to it."
    )


def fitting(
    tokenized: Sequence[TokenizedSamples],
    max_length: int,
    too_long: str,
    windows: Mapping[str, int | None] | None = None,
) -> np.ndarray:
    """Positions of the samples that fit `max_length` and every model's context window, shape (n,).

    Args:
        windows: by the name of the model that reads each of `tokenized`, the most tokens it has positions for
            (None: without limit).
    """
    longest = np.max([t.lengths for t in tokenized], axis=0)
    fits = longest <= max_length
    over = np.flatnonzero(~fits)
    if len(over) and too_long == "refuse":
        worst = over[np.argmax(longest[over])]
        raise UserError(
            f"finetune.max_length={max_length} would cut the answer of {len(over)} sample(s), the longest being "
            f"{tokenized[0].ids[worst]!r} with {longest[worst]} tokens: raise it, or drop what does not fit "
            "(task.too_long=drop)."
        )
    if not fits.any():
        raise UserError(f"finetune.max_length={max_length} leaves no sample: raise it.")
    for (name, window), samples in zip((windows or {}).items(), tokenized, strict=windows is not None):
        beyond = np.flatnonzero(fits & (samples.lengths > (window or np.inf)))
        if len(beyond) and too_long == "refuse":
            worst = beyond[np.argmax(samples.lengths[beyond])]
            raise UserError(
                f"the {name} reads {window} tokens, too few for {len(beyond)} training sample(s), the longest "
                f"being {samples.ids[worst]!r} with {samples.lengths[worst]} tokens: remove it, or set "
                "task.too_long=drop."
            )
        fits[beyond] = False
        if not fits.any():
            raise UserError(f"no training sample fits the {window} tokens that the {name} reads: shorten them.")
    return np.flatnonzero(fits)


def answerable(test: TokenizedSamples, max_new_tokens: int, window: int | None, too_long: str) -> np.ndarray:
    """Positions of the test samples whose prompt and answer fit the context window, shape (n,).

    Args:
        window: context window in tokens; None: no limit.
        too_long: "drop" the other samples, or "refuse" them.

    Raises:
        UserError: a sample that is refused, by its id, or no sample that fits.
    """
    needed = test.prompt_lengths + max_new_tokens
    over = np.flatnonzero(needed > (window or np.inf))
    if len(over) and too_long == "refuse":
        worst = over[np.argmax(needed[over])]
        raise UserError(
            f"the target reads {window} tokens, too few for the prompt of {len(over)} test sample(s) and "
            f"task.max_new_tokens={max_new_tokens}, the longest being {test.ids[worst]!r} with "
            f"{test.prompt_lengths[worst]} tokens: remove it, or set task.too_long=drop."
        )
    keep = np.setdiff1d(np.arange(len(test)), over)
    if not len(keep):
        raise UserError(
            f"no prompt of the test split fits the {window} tokens that the target reads: shorten them."
        )
    return keep
