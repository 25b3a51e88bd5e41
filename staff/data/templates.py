"""Templates with the fields of a row."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from string import Formatter
from typing import Any

from staff.errors import UserError


def lookup(row: Mapping[str, Any], path: Sequence[str], where: str, setting: str) -> Any:
    """The value at `path`, a field and the keys below it.

    Args:
        where: the place of the row, for messages.
        setting: the setting that names the field, for messages.

    Raises:
        UserError: there is no such field.
    """
    value: Any = row
    for depth, name in enumerate(path):
        if not isinstance(value, Mapping) or name not in value:
            has = ", ".join(" ".join(str(field).split()) for field in sorted(row, key=str)) or "none"
            raise UserError(
                f"{where}: no field {_spelt(path[: depth + 1])} (wanted by {setting}); it has {shortened(has)}."
            )
        value = value[name]
    return value


def text_of(row: Mapping[str, Any], path: Sequence[str], where: str, setting: str) -> str:
    """As `lookup`, for a value that must be valid text."""
    value = lookup(row, path, where, setting)
    if not isinstance(value, str):
        kind = type(value).__name__
        raise UserError(f"{where}: field {_spelt(path)} is {kind}, not text (wanted by {setting}).")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can escape half a surrogate pair
        raise UserError(
            f"{where}: field {_spelt(path)} has half a surrogate pair (character {error.start + 1}); fix the text."
        ) from None
    return value


def render(template: str, row: Mapping[str, Any], where: str, setting: str) -> str:
    """The template with the row's fields; `where` and `setting` as in `lookup`."""
    parts = _parsed(template, setting)
    return "".join(text + (text_of(row, path, where, setting) if path else "") for text, path in parts)


@cache
def _parsed(template: str, setting: str) -> list[tuple[str, list[str]]]:
    """The template as pieces of text, each with the path of the field that follows it (empty for none).

    Only fields are supported: the other features of `str.format` would give access to Python objects.
    """
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"{setting}={template!r} is not a template ({error}); write fields as {{field}}.") from None
    parsed = []
    for text, name, form, conversion in parts:
        if name is not None and (form or conversion or not re.fullmatch(r"[^.\[\]]+(\[[^\[\]]+\])*", name)):
            spelt = f"{{{name}{'!' + conversion if conversion else ''}{':' + form if form else ''}}}"
            raise UserError(f"{setting}={template!r}: {spelt!r} names no field; write {{field}} or {{field[key]}}.")
        parsed.append((text, [part.rstrip("]") for part in name.split("[")] if name else []))
    return parsed


def _spelt(path: Sequence[str]) -> str:
    """A path as it is written in a template, quoted."""
    return repr(shortened(path[0] + "".join(f"[{key}]" for key in path[1:])))


def shortened(text: str) -> str:
    """At most 200 characters of a text, for messages."""
    return text if len(text) <= 200 else f"{text[:200]}..."
