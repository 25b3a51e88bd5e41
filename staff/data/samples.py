"""Samples, and the conversations that they may be: the layouts in which rows hold them, and their plain text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

from staff.data.templates import checked_text, has, lookup, shortened
from staff.errors import UserError

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


Row = Mapping[str, Any]

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "bing", "bard"), "assistant"),
}
TOOLS = ("tool", "function", "function_call", "observation", "tool_call", "tool_response")


UNREAD = ("reasoning_content", "reasoning", "thinking")
"""Fields with what a model is to think before its answer, which templates place in ways of their own."""


class Piece(NamedTuple):
    """A part of a sample's text, tokenised by itself.

    Attributes:
        answer: the assistant says it.
        ends: the end token follows.
    """

    text: str
    answer: bool = False
    ends: bool = False


class Layout(NamedTuple):
    """How the columns of rows hold a prompt and its answer.

    Attributes:
        templates: of the prompt and of the answer; None where the rows hold conversations.
        turns: the conversation in a row (row, place for messages).
    """

    name: str
    fits: Callable[[Row], bool]
    templates: tuple[str, str] | None = None
    turns: Callable[[Row, str], Turns] | None = None


def layout_of(row: Row, where: str) -> Layout:
    """The layout of a row, by its columns.

    Raises:
        UserError: none that is known.
    """
    for layout in LAYOUTS:
        if layout.fits(row):
            return layout
    raise UserError(
        f"{where}: task.prompt and task.answer are null, and the fields {has(row)} are of no known layout "
        f"({'; '.join(layout.name for layout in LAYOUTS)}): set both to templates, such as {{question}}."
    )


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


def checked_turns(turns: Sequence[tuple[str, str]], where: str) -> Turns:
    """The turns up to the last one of the assistant, which is the answer.

    Raises:
        UserError: no answer, nothing before it, or an empty turn.
    """
    answers = [at for at, (role, _) in enumerate(turns) if role == "assistant"]
    if not answers:
        raise UserError(f"{where}: no turn of the assistant; remove the row, or give it an answer.")
    kept = tuple(turns[: answers[-1] + 1])
    for at, (role, text) in enumerate(kept, start=1):
        if not text:
            what = "the answer" if at == len(kept) else f"turn {at} ({role})"
            raise UserError(f"{where}: {what} is empty; remove the row or fill it.")
    if not any(role == "user" for role, _ in kept):
        raise UserError(f"{where}: no turn of the user before the answer; remove the row, or give it a prompt.")
    return kept


def _listed(*fields: str) -> Callable[[Row, str], Turns]:
    """Reads the turns that lists of messages hold."""

    def turns(row: Row, where: str) -> Turns:
        if row.get("tools"):
            raise UserError(f"{where}: field 'tools' is filled, and tool calls are not supported; remove the row.")
        told = []
        for field in fields:
            if not isinstance(messages := lookup(row, [field], where, "the conversation"), list):
                raise UserError(f"{where}: field {field!r} is {type(messages).__name__}, not a list of turns.")
            told += [_turn(message, [field, str(at)], where) for at, message in enumerate(messages)]
        # ShareGPT's system text may stand beside the turns.
        if isinstance(row.get("system"), str) and row["system"].strip() and not any(r == "system" for r, _ in told):
            told = [("system", row["system"].strip()), *told]
        return checked_turns(told, where)

    return turns


def _turn(message: Any, path: list[str], where: str) -> tuple[str, str]:
    place = f"{where}: {path[0]}[{path[1]}]"
    if not isinstance(message, Mapping):
        raise UserError(f"{place} is {type(message).__name__}, not a turn; write {{role, content}}.")
    role_key, text_key = ("role", "content") if "role" in message else ("from", "value")
    role = message.get(role_key)
    role = role.lower() if isinstance(role, str) else role
    if role in TOOLS or any(message.get(key) for key in ("tool_calls", "function_call")):
        raise UserError(f"{place} is a tool call or its result, which are not supported; remove the row.")
    if found := next((key for key in UNREAD if message.get(key)), None):
        raise UserError(f"{place} has {found!r}, which is not read: write it into {text_key!r}, or remove it.")
    if message.get("weight") == 0:  # OpenAI's word for a turn that is not trained
        raise UserError(f"{place} has the weight 0, which is not supported: remove it, or set task.loss_on=last.")
    if not isinstance(role, str) or role not in ROLES:
        known = ", ".join(ROLES)
        raise UserError(f"{place} has the role {shortened(repr(role))}, which is unknown; choose {known}.")
    content = message.get(text_key)
    parts = content if isinstance(content, list) else [content]
    texts = [_part(part, [*path, text_key], place, where) for part in parts]
    return ROLES[role], "".join(texts).strip()


def _part(part: Any, path: list[str], place: str, where: str) -> str:
    """The text of a message's content, or of one of its parts."""
    if isinstance(part, Mapping):
        kind = part.get("type")
        if kind not in ("text", "input_text", "output_text") or part.get("text") is None:
            raise UserError(
                f"{place} has a part of type {shortened(repr(kind))}; only text is supported, remove the row."
            )
        part = part["text"]
    return checked_text(part, path, where, "the conversation")


def _alpaca(row: Row, where: str) -> Turns:
    def text(name: str, needed: bool = False) -> str:
        value = row.get(name)
        return (
            "" if value is None and not needed else checked_text(value, [name], where, "the Alpaca layout").strip()
        )

    if row.get("history"):
        raise UserError(f"{where}: field 'history' is filled, and is not read; write the rows as messages.")
    asked = "\n\n".join(filter(None, (text("instruction", needed=True), text("input"))))
    system = [("system", text("system"))] if text("system") else []
    return checked_turns([*system, ("user", asked), ("assistant", text("output", needed=True))], where)


def _lists(*fields: str) -> Callable[[Row], bool]:
    return lambda row: all(isinstance(row.get(field), list) for field in fields)


def _columns(*fields: str) -> Callable[[Row], bool]:
    return lambda row: all(field in row for field in fields)


TRL = ("prompt", "completion")
LAYOUTS = (
    Layout("OpenAI messages", _lists("messages"), turns=_listed("messages")),
    Layout("ShareGPT conversations", _lists("conversations"), turns=_listed("conversations")),
    Layout("TRL turns in prompt and completion", _lists(*TRL), turns=_listed(*TRL)),
    Layout("Alpaca instruction, input and output", _columns("instruction", "output"), turns=_alpaca),
    Layout("prompt and completion", _columns(*TRL), templates=("{prompt}", "{completion}")),
    Layout("prompt and answer", _columns("prompt", "answer"), templates=("{prompt}", " {answer}")),
)


def several_answers(samples: Iterable[Sample]) -> bool:
    """Whether any of the samples is a conversation in which the assistant speaks more than once."""
    known = getattr(samples, "several_answers", None)
    if known is not None:
        return known
    return any(sum(role == "assistant" for role, _ in sample.turns) > 1 for sample in samples)


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
