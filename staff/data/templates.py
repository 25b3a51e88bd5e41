"""Templates over the fields of a row."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from string import Formatter
from typing import Any

from staff.errors import UserError


def lookup(row: Mapping[str, Any], path: Sequence[str], where: str, setting: str) -> Any:
    """The value at `path`, a field and the keys below it."""
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
    value = lookup(row, path, where, setting)
    if not isinstance(value, str):
        kind = type(value).__name__
        raise UserError(f"{where}: field {_spelt(path)} is {kind}, not text (wanted by {setting}).")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell what no text may hold
        raise UserError(
            f"{where}: field {_spelt(path)} has half a surrogate pair (character {error.start + 1}); mend the text."
        ) from None
    return value


def render(template: str, row: Mapping[str, Any], where: str, setting: str) -> str:
    parts = _parsed(template, setting)
    return "".join(text + (text_of(row, path, where, setting) if path else "") for text, path in parts)


@cache
def _parsed(template: str, setting: str) -> list[tuple[str, list[str]]]:
    """The template as pieces of text, each with the path of the field that follows it, if one does.

    Nothing but fields is understood: what else `str.format` offers would reach into Python's objects.
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
    """A path as a template has it, quoted."""
    return repr(shortened(path[0] + "".join(f"[{key}]" for key in path[1:])))


def shortened(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."
