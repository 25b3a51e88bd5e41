"""Samples, and the plain text of the conversations that they may be."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from typing import Any, NamedTuple

Turns = tuple[tuple[str, str], ...]
"""Role ("system", "user" or "assistant") and text of every turn; the last is the assistant's."""


@dataclass(frozen=True)
class Sample:
    """One prompt with its answer; `references` are what an evaluation compares with (the answer, unless the
    test split has several).

    Attributes:
        turns: of a conversation, up to the assistant's last turn, which is the answer; prompt and answer are then
            its text in the plain prompt format.
        choices: answers that a metric chooses among, of a test sample.
        group: the part of the data it belongs to, where the task has a `group_field`.
    """

    id: str
    prompt: str
    answer: str
    references: tuple[str, ...]
    turns: Turns = ()
    group: str | None = None
    choices: tuple[str, ...] = ()

    def conversation(self) -> Turns:
        """Its turns; prompt and answer, where it has none."""
        return self.turns or (("user", self.prompt), ("assistant", self.answer))

    def plain_pieces(self) -> list[Piece]:
        """Its text in the plain prompt format."""
        return plain_pieces(self.turns) if self.turns else [Piece(self.prompt), Piece(self.answer, True, True)]


class Piece(NamedTuple):
    """A part of a sample's text, tokenised by itself.

    Attributes:
        answer: the assistant says it.
        ends: the end token follows.
    """

    text: str
    answer: bool = False
    ends: bool = False


def plain_pieces(turns: Turns) -> list[Piece]:
    """The text of a conversation in the plain prompt format.

    Every turn is "System: ...", "User: ..." or "Assistant: ...", with an empty line between two. The end token
    follows every turn of the assistant.
    """
    pieces, before = [], ""
    for role, text in turns:
        before += f"{role.capitalize()}:"
        if role == "assistant":
            pieces += [Piece(before), Piece(f" {text}", answer=True, ends=True)]
            before = "\n\n"
        else:
            before += f" {text}\n\n"
    return pieces


def plain_text(turns: Turns) -> tuple[str, str]:
    """Prompt and answer of a conversation in the plain prompt format, without end tokens."""
    *before, answer = plain_pieces(turns)
    return "".join(piece.text for piece in before), answer.text


def several_answers(samples: Iterable[Sample]) -> bool:
    """Whether any of the samples is a conversation in which the assistant speaks more than once."""
    known = getattr(samples, "several_answers", None)
    if known is not None:
        return known
    return any(sum(role == "assistant" for role, _ in sample.turns) > 1 for sample in samples)


def content_id(prompt: str, answer: str) -> str:
    """The id of a sample without one: a digest of its text."""
    return hashlib.blake2b(f"{prompt}\0{answer}".encode(), digest_size=8).hexdigest()


def asked_once(samples: Iterable[Sample]) -> list[Sample]:
    """One sample for each prompt, and the choices that it is asked with, with the references of all."""
    by_prompt: dict[tuple[str, ...], Sample] = {}
    for sample in samples:
        asked = (sample.prompt, *sample.choices)
        if first := by_prompt.get(asked):
            sample = replace(first, references=tuple(dict.fromkeys((*first.references, *sample.references))))
        by_prompt[asked] = sample
    return list(by_prompt.values())


def data_digest(samples: Sequence[Sample]) -> str:
    """SHA-256 of what the samples are, wherever they were read from; an empty field or None changes nothing."""
    return getattr(samples, "digest", None) or _remembered(tuple(samples))


@lru_cache(maxsize=8)  # the runs of a sweep share their samples
def _remembered(samples: tuple[Sample, ...]) -> str:
    return computed_digest(samples)


def computed_digest(samples: Iterable[Sample]) -> str:
    """`data_digest`, without remembering the samples."""
    digest = hashlib.sha256(b"[")
    for at, sample in enumerate(samples):
        row = json.dumps({name: value for name, value in vars(sample).items() if value})
        digest.update(f"{', ' if at else ''}{row}".encode())
    digest.update(b"]")
    return digest.hexdigest()


BEFORE = 32
"""Characters before an answer that it is read behind, where the tokenizer puts a space before every text."""


def ids_of_pieces(pieces: Sequence[Sequence[Piece]], tokenizer: Any) -> list[list[int]]:
    """The token ids of each piece of every sample.

    A tokenizer that puts a space before every text would put one inside a sample, before its answer; others drop
    white space behind a special token. There a piece is read behind what it follows.
    """
    texts = [[piece.text for piece in of_one] for of_one in pieces]
    alone = _plain_ids([*chain(*texts)], tokenizer)
    if not reads_before(tokenizer):
        return alone
    before = ["".join(of_one[:at])[-BEFORE:] for of_one in texts for at in range(len(of_one))]
    behind = _plain_ids([start + text for start, text in zip(before, chain(*texts), strict=True)], tokenizer)
    starts = _plain_ids(before, tokenizer)
    return [
        whole[len(start) :] if start and whole[: len(start)] == start else ids
        for ids, start, whole in zip(alone, starts, behind, strict=True)
    ]


def _plain_ids(texts: list[str], tokenizer: Any) -> list[list[int]]:
    # Not verbose, since `fitting` reports what is too long.
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    return tokenizer(texts, **options)["input_ids"]


def reads_before(tokenizer: Any) -> bool:
    """Whether the tokens of a text depend on what it follows.

    Many tokenizers of SentencePiece put a space before every text. A token with `rstrip` takes the white space
    behind it.
    """
    if any(token.rstrip for token in getattr(tokenizer, "added_tokens_decoder", {}).values()):
        return True
    start, text, both = _plain_ids([":", "x", ":x"], tokenizer)
    return both != start + text and both[: len(start)] == start
