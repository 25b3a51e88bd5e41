"""Templates that are filled with the fields of a row."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from functools import cache
from string import Formatter
from typing import Any

from staff.errors import UserError, in_one_line

log = logging.getLogger(__name__)


def lookup(row: Mapping[str, Any], path: Sequence[str], where: str, setting: str) -> Any:
    """The value at `path`, a field, and the keys of mappings and positions in lists below it.

    Args:
        where: the place of the row, for messages.
        setting: the setting that names the field, for messages.

    Raises:
        UserError: there is no such field.
    """
    value: Any = row
    for depth, name in enumerate(path):
        if isinstance(value, Mapping) and name in value:
            value = value[name]
        elif isinstance(value, list) and name.isdecimal() and int(name) < len(value):
            value = value[int(name)]
        else:
            raise UserError(
                f"{where}: no field {_spelt(path[: depth + 1])} (wanted by {setting}); it has {has(row)}."
            )
    return value


def has(row: Mapping[str, Any]) -> str:
    """The names of a row's fields, for a message."""
    names = [str(field) for field in sorted(row, key=str)]
    plain = (name if name.isprintable() and name == name.strip() else repr(name) for name in names)
    return shortened(", ".join(plain) or "none")


def text_of(row: Mapping[str, Any], path: Sequence[str], where: str, setting: str) -> str:
    """The text at `path`; numbers and truth values as JSON has them."""
    return checked_text(lookup(row, path, where, setting), path, where, setting)


def checked_text(value: Any, path: Sequence[str], where: str, setting: str) -> str:
    """A value as text; `path` says where it stands.

    Raises:
        UserError: it is neither text nor a number nor a truth value, or cannot be encoded.
    """
    text = as_text(value)
    if text is None:
        hints = {
            list: f"name one of it by {{{_joined(path)}[0]}}",
            dict: f"name a field of it by {{{_joined(path)}[KEY]}}",
        }
        unknown = "fill it or remove the row" if value is None or isinstance(value, float) else "write it as text"
        hint = hints.get(type(value), unknown)
        raise UserError(f"{where}: field {_spelt(path)} is {_kind(value)}, not text (wanted by {setting}); {hint}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can escape half a surrogate pair
        raise UserError(
            f"{where}: field {_spelt(path)} has half a surrogate pair (character {error.start + 1}); fix the text."
        ) from None
    return text


def _kind(value: Any) -> str:
    return str(value) if isinstance(value, float) else type(value).__name__


def as_text(value: Any) -> str | None:
    """Text as it is, numbers and truth values as JSON has them; None for anything else, such as NaN."""
    if isinstance(value, bool):
        return "true" if value else "false"
    finite = isinstance(value, int | float | Decimal) and math.isfinite(value)
    return str(value) if finite or isinstance(value, str) else None


def render(template: str, row: Mapping[str, Any], where: str, setting: str) -> str:
    """The template with the row's fields: Jinja where it has {{ or {%, else {field} and {field[key]}.

    Args:
        where, setting: as in `lookup`.

    Raises:
        UserError: no template, a field that is missing, or a value that is no text.
    """
    if is_jinja(template):
        return _rendered_by_jinja(template, row, where, setting)
    parts = _parsed(template, setting)
    return "".join(text + (text_of(row, path, where, setting) if path else "") for text, path in parts)


def path_in(row: Mapping[str, Any], field: str, setting: str) -> list[str]:
    """The path that a setting spells as in a template, braces left out: `field` or `field[key]`."""
    if field in row:
        return [field]
    (part,) = _parsed(f"{{{field}}}", setting)
    return part[1]


def field_of(row: Mapping[str, Any], field: str, where: str, setting: str) -> str:
    """The text of a field that a setting names."""
    return text_of(row, path_in(row, field, setting), where, setting)


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
            other = f", or {{{{ row[{spelt[1:-1]!r}] }}}} for a column of that name" if name else ""
            raise UserError(
                f"{setting}={template!r}: {spelt!r} names no field; write {{field}} or {{field[key]}}{other}."
            )
        parsed.append((text, [part.rstrip("]") for part in name.split("[")] if name else []))
    return parsed


def is_jinja(template: str) -> bool:
    return "{{" in template or "{%" in template


def _rendered_by_jinja(template: str, row: Mapping[str, Any], where: str, setting: str) -> str:
    try:
        text = _compiled(template, setting).render({"row": row, **row})
        text.encode()
    except UserError:
        raise
    except Exception as error:  # whatever a template's expressions may raise
        said = shortened(in_one_line(error))
        lacks = re.match(r"'(\w+)' is undefined", said)
        mend = f": where only some rows have the field, write {{% if row.get({lacks[1]!r}) %}}" if lacks else ""
        raise UserError(f"{where}: {setting} fails with {said!r}; the row has {has(row)}{mend}.") from None
    return text


@cache
def _compiled(template: str, setting: str) -> Any:
    from jinja2 import StrictUndefined, TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, keep_trailing_newline=True, finalize=_finalized
    )
    try:
        return environment.from_string(template)
    except TemplateSyntaxError as error:
        raise UserError(
            f"{setting}={template!r} is not a Jinja template ({error.message}); write fields as {{{{ field }}}}."
        ) from None


def _finalized(value: Any) -> Any:
    from jinja2 import Undefined

    if isinstance(value, Undefined):  # which says itself what is missing
        return value
    if (text := as_text(value)) is None:
        raise TypeError(f"a value is {type(value).__name__}, not text")
    return text


def check_template(template: str, setting: str) -> None:
    """Refuse a text that is no template, before any row is read."""
    _tell_of_escapes(template, setting)
    if is_jinja(template):
        _compiled(template, setting)
    else:
        _parsed(template, setting)


@cache
def _tell_of_escapes(template: str, setting: str) -> None:
    """Warn of a line break that is spelt, as a shell's quotes leave it. Jinja reads those within its braces."""
    if re.search(r"\\[nt](?![a-z])", re.sub(r"\{[{%].*?[%}]\}", "", template, flags=re.S)):
        how = f"""in bash write $'{setting}="...\\n..."', or use a YAML file"""
        log.warning("%s has a backslash and a letter, which is no line break: %s", setting, how)


def _spelt(path: Sequence[str]) -> str:
    """A path as it is written in a template, quoted."""
    return repr(_joined(path))


def _joined(path: Sequence[str]) -> str:
    return shortened(path[0] + "".join(f"[{key}]" for key in path[1:]))


def shortened(text: str) -> str:
    """At most 200 characters of a text, for messages."""
    return text if len(text) <= 200 else f"{text[:200]}..."


def texts_of(row: Mapping[str, Any], fields: Sequence[str], where: str, setting: str) -> tuple[str, ...]:
    """The texts of these fields, and of the lists among them."""
    texts: list[str] = []
    for field in fields:
        path = path_in(row, field, setting)
        value = lookup(row, path, where, setting)
        several = value if isinstance(value, list) else [value]
        texts += [checked_text(one, path, where, setting) for one in several]
    if not texts:
        raise UserError(f"{where}: the lists of {setting} are empty; remove the row, or give it an answer.")
    return tuple(texts)


def id_of(row: Mapping[str, Any], field: str, where: str) -> str:
    """The id in a field: a whole number or a text that is not empty."""
    path = path_in(row, field, "task.id_field")
    value = lookup(row, path, where, "task.id_field")
    if type(value) is int:
        return str(value)
    if value == "" or not isinstance(value, str):
        kind = _kind(value) if value != "" else "empty"
        raise UserError(
            f"{where}: field {field!r} is {kind}, not an id (wanted by task.id_field); fill it, or set "
            "task.id_field=null for ids from the text."
        )
    return text_of(row, path, where, "task.id_field")
