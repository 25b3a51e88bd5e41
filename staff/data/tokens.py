"""Tokenised samples. They are tokenised once, so that scoring and training read the same tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from staff.data.chat import ChatTemplate
from staff.data.samples import Piece, Sample, data_digest, ids_of_pieces, reads_before
from staff.errors import UserError
from staff.models.family import DATE
from staff.models.spec import ModelSpec
from staff.runtime.progress import progress
from staff.store.cost import Meter
from staff.store.manifest import Artifact
from staff.store.stage import Stage, plain

IGNORED = -100
"""The label of a token without a loss, as in transformers."""

LABELLED = "labelled.npy"
BLOCK = 2_000
"""Samples whose texts or positions are in memory at once; a tokenizer's threads share the work within a block."""


@dataclass(frozen=True, eq=False)
class TokenizedSamples:
    """N tokenised samples: begin token (if the tokenizer has one), prompt, answer and end token.

    Attributes:
        ids: the samples' ids.
        tokens: the token ids of all samples, concatenated, shape (sum of lengths,), int32.
        offsets: sample i has tokens[offsets[i]:offsets[i + 1]], shape (N + 1,).
        prompt_lengths: tokens before the first answer token, of a conversation before its last answer, shape (N,).
        begin: the number of begin tokens before every prompt.
        labelled: which tokens are trained and scored, like `tokens`, bool; None: those from `prompt_lengths` on.
    """

    ids: Sequence[str]
    tokens: np.ndarray = field(repr=False)
    offsets: np.ndarray = field(repr=False)
    prompt_lengths: np.ndarray = field(repr=False)
    begin: int = 0
    labelled: np.ndarray | None = field(default=None, repr=False)

    @classmethod
    def of_rows(
        cls,
        ids: Sequence[str],
        rows: Sequence[Sequence[int]],
        prompt_lengths: Sequence[int],
        begin: int = 0,
        labelled: Sequence[np.ndarray] | None = None,
    ) -> TokenizedSamples:
        """From a row of token ids for each sample; `labelled` likewise."""
        offsets = np.cumsum([0, *map(len, rows)])
        tokens = np.concatenate([np.empty(0, np.int32), *(np.asarray(row, np.int32) for row in rows)])
        mask = None if labelled is None else np.concatenate([np.empty(0, bool), *labelled])
        return cls(ids, tokens, offsets, np.asarray(prompt_lengths, np.int64), begin, mask)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TokenizedSamples) and self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __len__(self) -> int:
        return len(self.ids)

    def row(self, i: int) -> np.ndarray:
        """The token ids of sample i, shape (length,)."""
        return self.tokens[self.offsets[i] : self.offsets[i + 1]]

    def labels(self, i: int) -> np.ndarray:
        """Labels of sample i, unshifted: its token ids on answer and end token, -100 on the prompt. (length,)"""
        return np.where(self.label_mask(i), self.row(i), IGNORED).astype(np.int64)

    def label_mask(self, i: int) -> np.ndarray:
        """Which tokens of sample i have a label, shape (length,), bool."""
        if self.labelled is not None:
            return self.labelled[self.offsets[i] : self.offsets[i + 1]]
        return np.arange(self.lengths[i]) >= self.prompt_lengths[i]

    def prompts(self) -> list[list[int]]:
        """The token ids of every prompt, with begin tokens."""
        return [self.row(i)[:n].tolist() for i, n in enumerate(self.prompt_lengths)]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each sample, shape (N,)."""
        return np.diff(self.offsets)

    @property
    def answer_lengths(self) -> np.ndarray:
        """Tokens with a label of each sample: its answer or answers with their end tokens, shape (N,)."""
        if self.labelled is None:
            return self.lengths - self.prompt_lengths
        return np.diff(np.concatenate([[0], np.cumsum(self.labelled)])[self.offsets])

    @property
    def end_tokens(self) -> list[int]:
        """The distinct tokens that the samples end with."""
        return np.unique(self.tokens[self.offsets[1:] - 1]).tolist()

    def take(self, indices: Iterable[int] | np.ndarray) -> TokenizedSamples:
        """The samples at these positions, in this order."""
        at = np.asarray(indices if isinstance(indices, np.ndarray) else list(indices), dtype=np.int64)
        offsets = np.concatenate([[0], np.cumsum(self.lengths[at])]).astype(np.int64)
        return replace(
            self,
            ids=[self.ids[i] for i in at.tolist()],
            tokens=self._taken(self.tokens, at, offsets),
            offsets=offsets,
            prompt_lengths=self.prompt_lengths[at],
            labelled=None if self.labelled is None else self._taken(self.labelled, at, offsets),
        )

    def _taken(self, values: np.ndarray, at: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """The values of the tokens of some samples. In blocks, since the positions of tokens take twice the memory
        of the tokens."""
        taken = np.empty(offsets[-1], values.dtype)
        for start in range(0, len(at), BLOCK):
            block = at[start : start + BLOCK]
            positions, _ = _positions(self.offsets[block], self.lengths[block])
            taken[offsets[start] : offsets[start + len(block)]] = values[positions]
        return taken

    def without_prompts(self) -> TokenizedSamples:
        """The answers, after the begin tokens."""
        if self.labelled is None:
            positions, offsets = _positions(self.offsets[:-1] + self.prompt_lengths, self.answer_lengths)
        else:
            positions, offsets = np.flatnonzero(self.labelled), np.cumsum([0, *self.answer_lengths])
        tokens = np.asarray(self.tokens[positions])
        if self.begin:
            opening = self.tokens[self.offsets[:-1, None] + np.arange(self.begin)]
            tokens = np.insert(tokens, np.repeat(offsets[:-1], self.begin), opening.ravel())
            offsets = offsets + self.begin * np.arange(len(offsets))
        lengths = np.full(len(self), self.begin, dtype=np.int64)
        return replace(self, tokens=tokens, offsets=offsets, prompt_lengths=lengths, labelled=None)

    def all_as_answer(self) -> TokenizedSamples:
        """The same tokens, with the prompt counted as part of the answer."""
        return replace(self, prompt_lengths=np.full(len(self), self.begin, dtype=np.int64), labelled=None)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of ids, tokens and labels."""
        digest = hashlib.sha256(json.dumps([list(self.ids), self.begin]).encode())
        for array, kind in ((self.tokens, np.int32), (self.offsets, np.int64), (self.prompt_lengths, np.int64)):
            digest.update(np.ascontiguousarray(array, dtype=kind).data)
        if self.labelled is not None:
            digest.update(np.packbits(self.labelled).tobytes())
        return digest.hexdigest()


def _positions(starts: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The positions from each of `starts` on, and their offsets."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths), offsets


@dataclass(frozen=True)
class Tokens(Stage):
    """Tokenises samples. Other stages are identified by the tokens themselves (`TokenizedSamples.fingerprint`).

    Attributes:
        reading: how the samples are formatted: `staff.models.family.Family.reading` and
            `staff.data.task.Task.reading`.
    """

    kind: ClassVar[str] = "tokens"
    version: ClassVar[int] = 1
    one_process: ClassVar[bool] = True

    samples: Sequence[Sample] = field(repr=False)
    spec: ModelSpec
    reading: Mapping[str, Any]

    @property
    def label(self) -> str:
        return f"tokenise {len(self.samples)} samples for {self.spec.name}"

    def key(self) -> dict[str, Any]:
        return {
            "samples": data_digest(self.samples),
            "tokenizer": self.spec.tokenizer_identity(),
            "reading": plain(dict(self.reading)),
            **({"answers": "behind their prompts"} if reads_before(self.spec.tokenizer()) else {}),
        }

    def run(self, folder: Path, meter: Meter, *inputs: Artifact) -> None:
        tokenized = tokenize(self.samples, self.spec.tokenizer(), **self.reading)
        np.save(folder / "tokens.npy", tokenized.tokens)
        np.save(folder / "offsets.npy", tokenized.offsets)
        np.save(folder / "prompt_lengths.npy", tokenized.prompt_lengths)
        if tokenized.labelled is not None:
            np.save(folder / LABELLED, tokenized.labelled)
        (folder / "samples.json").write_text(json.dumps({"ids": list(tokenized.ids), "begin": tokenized.begin}))


def read_tokens(tokens: Artifact) -> TokenizedSamples:
    """The samples that `Tokens` stored. Token ids are memory-mapped."""
    samples = json.loads((tokens.path / "samples.json").read_text())
    return TokenizedSamples(
        samples["ids"],
        np.load(tokens.path / "tokens.npy", mmap_mode="r"),
        np.load(tokens.path / "offsets.npy"),
        np.load(tokens.path / "prompt_lengths.npy"),
        samples["begin"],
        np.load(tokens.path / LABELLED) if (tokens.path / LABELLED).is_file() else None,
    )


def tokenize(
    samples: Sequence[Sample],
    tokenizer: Any,
    prompt_format: str = "plain",
    *,
    date: str = DATE,
    template_options: Mapping[str, Any] | None = None,
    loss_on: str = "last",
) -> TokenizedSamples:
    """The tokenised samples. Prompt and answer are tokenised separately, so that no token spans both.

    Args:
        prompt_format: "plain": begin token, prompt, answer and end token; "chat": the same with the texts and the
            end-of-turn token of the tokenizer's chat template.
        date, template_options: for the chat template, as in `staff.models.family.Family`.
        loss_on: "all": every answer of a conversation has labels; "last": its last one.

    Raises:
        UserError: a tokenizer without an end token, or without a usable chat template.
    """
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer of {tokenizer.name_or_path} has no end token to end answers with: set "
            "eos_token in its tokenizer_config.json."
        )
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end, every = tokenizer.eos_token_id, loss_on == "all"
    template = ChatTemplate(tokenizer, date, template_options) if prompt_format == "chat" else None
    if template is not None:
        begin, end = [], template.end  # the template includes the begin token

    def pieces_of(sample: Sample) -> Sequence[Piece]:
        if template is not None:
            return template.pieces(sample.id, sample.conversation(), every)
        return sample.plain_pieces()

    blocks = [TokenizedSamples.of_rows([], [], [], len(begin), [] if every else None)]
    several, left = False, iter(samples)
    with progress(len(samples), "tokenise") as bar:
        while some := list(islice(left, BLOCK)):
            pieces = [pieces_of(sample) for sample in some]
            several |= every and any(sum(piece.answer for piece in of_one) > 1 for of_one in pieces)
            blocks.append(_block([sample.id for sample in some], pieces, tokenizer, begin, end, every))
            bar.update(len(some))
    return _joined(blocks, labelled=several)


def _block(
    ids: Sequence[str],
    pieces: Sequence[Sequence[Piece]],
    tokenizer: Any,
    begin: list[int],
    end: int,
    every: bool,
) -> TokenizedSamples:
    """Samples from the pieces of each; `every`: all answers have labels, not the last alone."""
    tokens = iter(ids_of_pieces(pieces, tokenizer))
    rows, prompt_lengths, masks = [], [], []
    for of_one in pieces:
        parts = [next(tokens) + [end] * piece.ends for piece in of_one]
        parts[0] = begin + parts[0]
        rows.append(np.array([token for part in parts for token in part], dtype=np.int32))
        prompt_lengths.append(len(rows[-1]) - len(parts[-1]))
        masks.append(np.repeat([piece.answer for piece in of_one], [len(part) for part in parts]))
    return TokenizedSamples.of_rows(ids, rows, prompt_lengths, len(begin), masks if every else None)


def _joined(blocks: Sequence[TokenizedSamples], labelled: bool) -> TokenizedSamples:
    """The samples of all blocks, one after the other."""
    return TokenizedSamples(
        [id for block in blocks for id in block.ids],
        np.concatenate([block.tokens for block in blocks]),
        np.cumsum(np.concatenate([[0], *(block.lengths for block in blocks)]), dtype=np.int64),
        np.concatenate([block.prompt_lengths for block in blocks]),
        blocks[0].begin,
        np.concatenate([block.labelled for block in blocks if block.labelled is not None]) if labelled else None,
    )
