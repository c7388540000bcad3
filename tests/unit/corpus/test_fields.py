"""Records become documents by template, and a field that is not there is named with those that are."""

from __future__ import annotations

import datetime

import pytest

from secateur.corpus.fields import has_fields, parse_template, render
from secateur.errors import CorpusError

WHERE = "notes.jsonl, line 3"


def text_of(row: object, template: str | None) -> str:
    """Return the document of ``row`` by the template's source."""
    return render(row, None if template is None else parse_template(template), WHERE)


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("question", "why?"),
        ("meta.source", "web"),
        ("Q: {question}\nA: {answer}", "Q: why?\nA: so"),
        ("{meta.source}/{meta.year}", "web/2020"),
        ("{{{question}}}", "{why?}"),
        ("{question}{question}", "why?why?"),
        ("{dotted.name}", "whole"),
        ("{with space}", "kept"),
    ],
)
def test_template_fills_in_fields(template: str, expected: str) -> None:
    """Fields in braces, dotted or bare, are replaced; doubled braces are literal."""
    row = {
        "question": "why?",
        "answer": "so",
        "meta": {"source": "web", "year": 2020},
        "dotted.name": "whole",
        "with space": "kept",
    }
    assert text_of(row, template) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, ""),
        ("x", "x"),
        (3, "3"),
        (0.5, "0.5"),
        (["a", None, "b"], "a\n\nb"),
        (datetime.date(2020, 1, 2), "2020-01-02"),
    ],
)
def test_values_become_text(value: object, expected: str) -> None:
    """Null is empty, a list is its items on lines of their own, and scalars are written out."""
    assert text_of({"f": value}, "<{f}>") == f"<{expected}>"


def test_a_field_inside_a_null_object_is_empty() -> None:
    """A null object counts as null in all its fields."""
    assert text_of({"meta": None}, "<{meta.source}>") == "<>"


@pytest.mark.parametrize(
    ("template", "fragment"),
    [
        ("", "text: is empty"),
        ("{", "is not a template"),
        ("a } b", "is not a template"),
        ("{}", "not a plain name (found '')"),
        ("{0}", "not a plain name (found '0')"),
        ("{a[0]}", "not a plain name (found 'a[0]')"),
        ("{a.}", "not a plain name (found 'a.')"),
        ("{a!r}", "not a plain name (found 'a')"),
        ("{a:>10}", "not a plain name (found 'a')"),
        ("{{a}}", "names no field"),
    ],
)
def test_bad_templates_are_refused(template: str, fragment: str) -> None:
    """What is not a plain template is refused, and the message shows what was found."""
    with pytest.raises(CorpusError) as caught:
        parse_template(template)
    assert fragment in str(caught.value)


def test_missing_field_is_named_with_the_nearest() -> None:
    """The message has the place, the missing field, the nearest field and all fields, nested ones dotted."""
    with pytest.raises(CorpusError) as caught:
        text_of({"abstract": "x", "meta": {"year": 1}}, "{abstrct}")
    message = str(caught.value)
    assert message.startswith(f"{WHERE} has no field 'abstrct'. Did you mean 'abstract'?")
    assert "Fields there: abstract, meta.year." in message


def test_missing_field_of_an_empty_record() -> None:
    """A record without fields says so."""
    with pytest.raises(CorpusError, match="Fields there: none"):
        text_of({}, "abstract")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("a string", "a string"),
        ({"text": "t", "title": "x"}, "t"),
        ({"text": None, "title": "x"}, ""),
        ({"id": 7, "body": "b"}, "b"),
        ({"a": None, "b": None}, ""),
    ],
)
def test_without_template_the_text_is_found(row: object, expected: str) -> None:
    """The ``text`` field, or else the only string field, is the document."""
    assert text_of(row, None) == expected


@pytest.mark.parametrize(
    ("row", "fragment"),
    [
        ({"title": "a", "body": "b"}, "2 fields hold strings. Fields there: title, body. Set text:"),
        ({"id": 1}, "no field holds a string. Fields there: id. Set text:"),
        (["a"], f"{WHERE} holds one list. Give an object"),
        (None, f"{WHERE} holds one NoneType."),
    ],
)
def test_without_template_ambiguity_is_refused(row: object, fragment: str) -> None:
    """Nothing is guessed when several fields, or none, could be the text."""
    with pytest.raises(CorpusError) as caught:
        text_of(row, None)
    assert fragment in str(caught.value)


def test_template_over_a_string_is_refused() -> None:
    """A string has no fields for a template to name."""
    with pytest.raises(CorpusError, match="is a string without fields, but text: asks for abstract"):
        text_of("plain", "{abstract}")


def test_objects_and_bytes_are_not_text() -> None:
    """A field that holds an object or raw bytes is refused; for an object its inner fields are named."""
    with pytest.raises(CorpusError, match=r"field 'meta' is an object, not text.*meta\.year"):
        text_of({"meta": {"year": 1}}, "meta")
    with pytest.raises(CorpusError, match="field 'image' holds 2 raw bytes"):
        text_of({"image": b"ab"}, "image")


def test_has_fields_asks_for_all_of_them() -> None:
    """A record qualifies when no named field is missing; without a template, when it has ``text``."""
    record = {"a": 1, "b": {"c": None}}
    assert has_fields(record, parse_template("{a}{b.c}"))
    assert not has_fields(record, parse_template("{a}{b.d}"))
    assert not has_fields(record, None)
    assert has_fields({"text": ""}, None)
