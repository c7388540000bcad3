"""How a record becomes a document: a template over the record's fields. Pure; it opens no files."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from string import Formatter
from typing import Any

from secateur.errors import CorpusError

TEXT_FIELD = "text"
"""The field a record's document is read from when the recipe names none."""

_MISSING = object()


@dataclass(frozen=True, slots=True)
class Template:
    """A parsed ``text`` option: literal text and the fields between.

    Attributes:
        parts: pairs of (literal text, name of the field that follows it, or None after the last literal).
    """

    parts: tuple[tuple[str, str | None], ...]

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields it names, in order of appearance."""
        return tuple(field for _, field in self.parts if field is not None)

    @property
    def literal(self) -> str:
        """The text between the fields, which is what a record without values leaves."""
        return "".join(literal for literal, _ in self.parts)


def parse_template(text: str, key: str = "text") -> Template:
    """Return the template in ``text``: ``"Question: {question}"``, or the bare name of one field.

    Args:
        text: field names stand in braces and may be dotted to reach into nested objects; ``{{`` and ``}}`` are
            literal braces. Text without any brace is the name of a field.
        key: the recipe's key for it, for messages.

    Raises:
        CorpusError: a brace is not closed, a field is empty, numbered or indexed, a field has a conversion or a
            format, or no field is named.
    """
    if "{" not in text and "}" not in text:
        if not text.strip():
            raise CorpusError(f"{key}: is empty. Name a field, or write a template such as 'Question: {{question}}'.")
        return Template((("", text),))
    try:
        pieces = list(Formatter().parse(text))
    except ValueError as error:
        raise CorpusError(
            f"{key}: {text!r} is not a template: {error}. Write fields as {{name}} and literal braces as {{{{ and }}}}."
        ) from None
    for _, field, format_spec, conversion in pieces:
        if field is not None and (not _is_plain(field) or format_spec or conversion):
            raise CorpusError(
                f"{key}: {text!r} has a field that is not a plain name (found {field!r}). Write {{name}} or "
                "{outer.inner}: no numbers, no [index], no '!r', no ':format'."
            )
    template = Template(tuple((literal, field) for literal, field, _, _ in pieces))
    if not template.fields:
        raise CorpusError(f"{key}: {text!r} names no field. Put at least one in braces, for example {{abstract}}.")
    return template


def _is_plain(field: str) -> bool:
    return not any(mark in field for mark in "[]{}") and all(
        part.strip() and not part.isdigit() for part in field.split(".")
    )


def render(row: object, template: Template | None, where: str, key: str = "text") -> str:
    """Return the document in a row.

    Args:
        row: what a reader gave: a mapping of fields, or a string (which is a document already).
        template: which fields, and the text between them. Without one the ``text`` field is the document, or else
            the only field that holds a string.
        where: file and row, for messages.
        key: the recipe's key for the template, for messages.

    Raises:
        CorpusError: the row is neither an object nor a string, it lacks a field, no single field is the text, or a
            field holds something that is not text.
    """
    if isinstance(row, str):
        if template is not None:
            raise CorpusError(
                f"{where} is a string without fields, but {key}: asks for {_listed(template.fields)}. Remove {key}:, "
                "or give records."
            )
        return row
    if not isinstance(row, Mapping):
        raise CorpusError(f"{where} holds one {type(row).__name__}. Give an object with fields, or a string.")
    if template is None:
        field = _only_text_field(row, where)
        return "" if field is None else _as_text(row[field], field, where)
    return "".join(
        literal + (_field_text(row, field, where, key) if field else "") for literal, field in template.parts
    )


def has_fields(record: Mapping[str, Any], template: Template | None) -> bool:
    """Return whether the record has every field the template names (without a template: ``text``)."""
    fields = template.fields if template else (TEXT_FIELD,)
    return all(_look_up(record, field) is not _MISSING for field in fields)


def _field_text(record: Mapping[str, Any], field: str, where: str, key: str) -> str:
    return _as_text(field_value(record, field, where, key), field, where)


def field_value(record: Mapping[str, Any], field: str, where: str, key: str) -> Any:
    """Return what a record holds in a field, which may be dotted; None inside a null object.

    Args:
        record: fields by name.
        field: the one wanted.
        where: file and row, for messages.
        key: the recipe's key that asks for it, for messages.

    Raises:
        CorpusError: there is no such field; the nearest name is suggested.
    """
    value = _look_up(record, field)
    if value is _MISSING:
        known = list(_field_names(record))
        near = difflib.get_close_matches(field, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise CorpusError(f"{where} has no field {field!r}.{hint} Fields there: {_listed(known)}. Correct {key}:.")
    return value


def _look_up(record: Mapping[str, Any], field: str) -> Any:
    """Return the value of a dotted field, None inside a null object, or ``_MISSING``."""
    if field in record:
        return record[field]
    value: Any = record
    for part in field.split("."):
        if value is None:
            return None
        if not isinstance(value, Mapping) or part not in value:
            return _MISSING
        value = value[part]
    return value


def _field_names(record: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for name, value in record.items():
        if isinstance(value, Mapping) and value:
            yield from _field_names(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _only_text_field(record: Mapping[str, Any], where: str) -> str | None:
    """Return the field that must be the text; None if there is nothing but nulls."""
    if TEXT_FIELD in record:
        return TEXT_FIELD
    strings = [name for name, value in record.items() if isinstance(value, str)]
    if len(strings) == 1:
        return strings[0]
    if not strings and all(value is None for value in record.values()):
        return None
    found = "no field holds a string" if not strings else f"{len(strings)} fields hold strings"
    raise CorpusError(
        f"{where} has no field {TEXT_FIELD!r} and {found}. Fields there: {_listed(list(_field_names(record)))}. "
        "Set text: to a field, or to a template such as 'Question: {question}'."
    )


def _as_text(value: object, field: str, where: str) -> str:
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return "\n".join(_as_text(item, field, where) for item in value)
    if isinstance(value, Mapping):
        inner = [f"{field}.{name}" for name in _field_names(value)]
        raise CorpusError(f"{where}: field {field!r} is an object, not text. Name a field inside it: {_listed(inner)}.")
    if isinstance(value, bytes | bytearray):
        raise CorpusError(f"{where}: field {field!r} holds {len(value)} raw bytes, not text. Name another field.")
    return str(value)


def _listed(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names) or "none"
