"""Layouts: how the columns of rows hold conversations, or prompts and answers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from staff.data.samples import Turns
from staff.data.templates import checked_text, has, lookup, shortened
from staff.errors import UserError

Row = Mapping[str, Any]

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "bing", "bard", "ai"), "assistant"),
}
TOOLS = ("tool", "function", "function_call", "observation", "tool_call", "tool_response")

ROLE_KEYS = ("role", "from")
TEXT_KEYS = ("content", "value", "text")
"""Names of a turn's fields, by OpenAI and by ShareGPT; files mix them."""

UNREAD = ("reasoning_content", "reasoning", "thinking", "refusal")
"""Fields with what a model is to think before its answer, which templates place in ways of their own, or with what
it says in place of an answer.
"""

WEIGHTS = ("weight", "loss", "train")
"""Fields that say whether a turn of the assistant is trained."""

MEDIA = ("image", "images", "video", "videos", "audio", "audios")
BESIDE = ("system", "system_prompt", "context", "input", "history", "choices", "options", *MEDIA)
"""Fields that belong to a prompt, where a row fills them."""


class Layout(NamedTuple):
    """How the columns of rows hold a prompt and its answer.

    Attributes:
        reads: fields that it reads beside those that it is known by.
        templates: of the prompt and of the answer; None where the rows hold conversations.
        turns: the conversation in a row (row, place for messages, whether every answer is trained).
        folds: whether the columns have its names in another case, or with white space around them.
    """

    name: str
    fits: Callable[[Row], bool]
    reads: Sequence[str] = ()
    templates: tuple[str, str] | None = None
    turns: Callable[[Row, str, bool], Turns] | None = None
    folds: bool = False

    def named(self, row: Row) -> Row:
        """The row with the names of its columns as the layout has them."""
        return _folded(row) if self.folds else row

    def check(self, row: Row, where: str, known: Sequence[str | None] = ()) -> None:
        """Refuse a row with a part of the prompt in a field that is not read; `known` are read for other ends."""
        read = {*self.reads, *(str(name).lower() for name in known)}
        for field in BESIDE:
            if field not in read and is_filled(row.get(field)):
                raise UserError(
                    f"{where}: field {field!r} is filled, but the layout {self.name!r} does not read it: set "
                    "task.prompt and task.answer to templates, or remove the field."
                )
        if row.get("label") is False and "completion" in self.name:  # as for KTO
            raise UserError(f"{where}: field 'label' calls the completion a bad one; remove the row, or the field.")


def layout_of(row: Row, where: str) -> Layout:
    """The layout of a row, by its columns.

    Raises:
        UserError: none that is known.
    """
    for layout in LAYOUTS:
        if layout.fits(row):
            return layout
    for layout in LAYOUTS:
        if layout.fits(_folded(row)):
            return layout._replace(folds=True)
    if "chosen" in row and "rejected" in row:
        raise UserError(
            f"{where}: a pair of a chosen and a rejected answer, which is not trained as such: keep the field with "
            "the chosen one under the name completion, or messages where it holds the prompt too."
        )
    if len(row) == 1:
        raise UserError(
            f"{where}: the row has the field {has(row)} alone, but a sample is a prompt and its answer: write them "
            "into two fields, such as prompt and completion."
        )
    known, first = "; ".join(layout.name for layout in LAYOUTS), next(iter(row), "field")
    raise UserError(
        f"{where}: task.prompt and task.answer are null, and the fields {has(row)} are of no known layout: set "
        f"both to templates of fields, such as '{{{first}}}', or name the fields as one of: {known}."
    )


def _folded(row: Row) -> Row:
    named = {name.strip().lower() if isinstance(name, str) else name: value for name, value in row.items()}
    return named if len(named) == len(row) else row


def is_filled(value: Any) -> bool:
    """Whether a field says anything: null, NaN, blank text and empty lists do not."""
    if isinstance(value, float):
        return not math.isnan(value)
    return bool(value.strip() if isinstance(value, str) else value)


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
            mend = "it" if role == "system" else "the row"
            raise UserError(f"{where}: {what} is empty; fill it, or remove {mend}.")
    if not any(role == "user" for role, _ in kept):
        raise UserError(f"{where}: no turn of the user before the answer; remove the row, or give it a prompt.")
    return kept


def _listed(**fields: str) -> Callable[[Row, str, bool], Turns]:
    """Reads the turns that lists of messages hold; the role of a field that is text instead."""

    def turns(row: Row, where: str, every: bool) -> Turns:
        for field in ("tools", "functions"):
            if is_filled(row.get(field)) and row[field] not in ("[]", "{}", "null"):  # JSON in a table
                raise UserError(
                    f"{where}: field {field!r} is filled, and tool calls are not supported; remove the row."
                )
        told, answers = [], []
        for field, role in fields.items():
            messages = _messages(row, field, where)
            if isinstance(messages, str) and role:
                told.append((role, checked_text(messages, [field], where, "the conversation").strip()))
                continue
            if not isinstance(messages, list):
                raise UserError(f"{where}: field {field!r} is {type(messages).__name__}, not a list of turns.")
            for at, message in enumerate(messages):
                told.append(_turn(message, [field, str(at)], where))
                if told[-1][0] == "assistant":
                    answers.append((f"{where}: {field}[{at}]", message))
        for place, message in answers if every else answers[-1:]:
            _check_trained(place, message, len(answers) > 1)
        # ShareGPT's system text may stand beside the turns.
        if is_filled(row.get("system")) and not any(role == "system" for role, _ in told):
            told = [("system", checked_text(row["system"], ["system"], where, "the conversation").strip()), *told]
        return checked_turns(told, where)

    return turns


def _messages(row: Row, field: str, where: str) -> Any:
    """A list of messages; tables have it as JSON."""
    messages = lookup(row, [field], where, "the conversation")
    if not _is_json_list(messages):
        return messages
    try:
        return json.loads(messages)
    except ValueError:
        raise UserError(
            f"{where}: field {field!r} is text that begins like a list of turns, but is not JSON: write it by "
            "json.dumps."
        ) from None


def _is_json_list(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip().startswith("[{")


def _turn(message: Any, path: list[str], where: str) -> tuple[str, str]:
    place = f"{where}: {path[0]}[{path[1]}]"
    if not isinstance(message, Mapping):
        raise UserError(f"{place} is {type(message).__name__}, not a turn; write {{role, content}}.")
    role, text_key = (message.get(_key(message, ROLE_KEYS)), _key(message, TEXT_KEYS))
    role = role.lower() if isinstance(role, str) else role
    if role in TOOLS or any(is_filled(message.get(key)) for key in ("tool_calls", "function_call")):
        raise UserError(f"{place} is a tool call or its result, which are not supported; remove the row.")
    if found := next((key for key in UNREAD if is_filled(message.get(key))), None):
        raise UserError(f"{place} has {found!r}, which is not read: write it into {text_key!r}, or remove it.")
    if not isinstance(role, str) or role not in ROLES:
        known = ", ".join(ROLES)
        raise UserError(
            f"{place} has the role {shortened(repr(role))}, which is unknown; choose {known}; the turn has "
            f"{has(message)}."
        )
    content = message.get(text_key)
    parts = content if isinstance(content, list) else [content]
    texts = [_part(part, [*path, text_key], place, where) for part in parts]
    return ROLES[role], "".join(texts).strip()


def _key(message: Row, keys: Sequence[str]) -> str:
    """The first of the keys that has a value: tables give every turn all keys."""
    return next(
        (key for key in keys if is_filled(message.get(key))), next(filter(message.__contains__, keys), keys[0])
    )


def _check_trained(place: str, message: Row, several: bool) -> None:
    for key in WEIGHTS:
        if (weight := message.get(key)) is not None and weight != 1:
            mend = "set task.loss_on=last where the last answer alone counts, or " if several else ""
            raise UserError(
                f"{place} has {key}={shortened(repr(weight))}, but every answer is trained with the weight 1: "
                f"{mend}remove the field or the turn."
            )


def _part(part: Any, path: list[str], place: str, where: str) -> str:
    """The text of a message's content, or of one of its parts."""
    if isinstance(part, Mapping):
        kind = part.get("type", "text" if isinstance(part.get("text"), str) and len(part) == 1 else None)
        if kind not in ("text", "input_text", "output_text"):
            raise UserError(
                f"{place} has a part of type {shortened(repr(kind))}; only text is supported, remove the row."
            )
        part = part.get("text")
    return checked_text(part, path, where, "the conversation")


def _asked(question: str, answer: str, *more: str) -> Layout:
    """A conversation of one question, with what is filled of `more` below it."""

    def turns(row: Row, where: str, every: bool) -> Turns:
        def text(field: str, needed: bool = False) -> str:
            if not needed and not is_filled(row.get(field)):
                return ""
            return checked_text(lookup(row, [field], where, "the layout"), [field], where, "the layout").strip()

        asked = "\n\n".join(filter(None, (text(question, needed=True), *map(text, more))))
        system = [("system", text(field)) for field in ("system", "system_prompt") if text(field)]
        return checked_turns([*system, ("user", asked), ("assistant", text(answer, needed=True))], where)

    def fits(row: Row) -> bool:
        return question in row and answer in row

    return Layout(f"{question} and {answer}", fits, ("system", "system_prompt", *more), turns=turns)


def _texts(prompt: str, answer: str, space: str = " ") -> Layout:
    """Text that is continued."""

    def fits(row: Row) -> bool:
        return prompt in row and answer in row

    return Layout(f"{prompt} and {answer}", fits, (prompt,), (f"{{{prompt}}}", f"{space}{{{answer}}}"))


def _lists(field: str) -> Callable[[Row], bool]:
    return lambda row: isinstance(row.get(field), list) or _is_json_list(row.get(field))


def _trl(row: Row) -> bool:
    values = [row.get("prompt"), row.get("completion")]
    return any(isinstance(v, list) for v in values) and all(isinstance(v, list | str) for v in values)


_OWN = tuple(field for field in BESIDE if field not in MEDIA)
LAYOUTS = (
    Layout("messages", _lists("messages"), _OWN, turns=_listed(messages="")),
    Layout("conversations", _lists("conversations"), _OWN, turns=_listed(conversations="")),
    Layout("conversation", _lists("conversation"), _OWN, turns=_listed(conversation="")),
    Layout(
        "turns in prompt and completion",
        _trl,
        ("system",),
        turns=_listed(prompt="user", completion="assistant"),
    ),
    _asked("instruction", "output", "input"),
    _asked("instruction", "response", "input", "context"),
    _texts("prompt", "completion", space=""),
    _texts("prompt", "answer"),
    _texts("prompt", "response"),
    _texts("inputs", "targets"),
    _texts("input", "output"),
    _asked("question", "answer"),
    _asked("question", "response"),
    _asked("query", "response"),
    _asked("problem", "solution"),
)
