"""The text that questions are made from: a corpus's records of one split, as documents or as terms with definitions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal, TypeVar

from secateur.corpus.fields import Template, parse_template, render
from secateur.corpus.make_choices import SourceText, TermRecord
from secateur.corpus.readers import encodable, explicit_splits, read_records
from secateur.corpus.split import assign_split, document_hash
from secateur.errors import CorpusError
from secateur.recipe import CorpusSpec

Part = Literal["test", "validation", "calibration", "all"]
_Record = TypeVar("_Record")

QUESTION = 'Which of these is the definition of "{term}"?'
"""What is asked about a term, where nothing else is said."""


def read_texts(spec: CorpusSpec, part: Part = "test", *, subject: str | None = None) -> list[SourceText]:
    """Return the documents of a split.

    Args:
        spec: where the text is, and how a record becomes a document: as in the recipe, so that the split is the same.
        part: which split, or all of it.
        subject: field, or template over the fields, with what a document belongs to.

    Raises:
        CorpusError: the text cannot be read, or the split is empty.
    """
    wanted = None if subject is None else parse_template(subject, "--subject")
    found = []
    for where, row, text in _records_of(spec, part, wanted):
        found.append(SourceText(text, _source(where), _field(row, wanted, where, "--subject", spec)))
    return _required(found, part)


def read_terms(
    spec: CorpusSpec,
    term: str,
    definition: str,
    part: Part = "test",
    *,
    question: str = QUESTION,
    subject: str | None = None,
) -> list[TermRecord]:
    """Return the terms of a split's records with their definitions.

    Args:
        spec: where the text is, and how a record becomes a document, by which it is split.
        term: field, or template over the fields, with the term.
        definition: the same of the definition.
        part: which split, or all of it; then records need not become documents.
        question: what is asked; a template over the fields, in which ``{term}`` is the term.
        subject: field or template with what a term belongs to.

    Raises:
        CorpusError: the text cannot be read or has no fields, or the split is empty.
    """
    asked = parse_template(question, "--question")
    names, texts = parse_template(term, "--term"), parse_template(definition, "--definition")
    topic = None if subject is None else parse_template(subject, "--subject")
    own = [name for name in asked.fields if name != "term"]
    fields = (*names.fields, *texts.fields, *(topic.fields if topic else ()), *own)
    found = []
    for where, row, _ in _records_of(spec, part, Template(tuple(("", name) for name in fields)), renders=part != "all"):
        if not isinstance(row, Mapping):
            raise CorpusError(
                f"{where} has no fields, and --term asks for {', '.join(names.fields)}. Give .jsonl, .json, .csv or "
                ".parquet files, or leave --term and --definition out for questions about the next sentence."
            )
        name = " ".join(_field(row, names, where, "--term", spec).split())
        found.append(
            TermRecord(
                name,
                _field({**row, "term": name}, asked, where, "--question", spec),
                _field(row, texts, where, "--definition", spec),
                _source(where),
                _field(row, topic, where, "--subject", spec),
            )
        )
    return _required(found, part)


def _records_of(
    spec: CorpusSpec, part: Part, also: Template | None, *, renders: bool = True
) -> Iterator[tuple[str, object, str]]:
    owned = part if part != "all" and explicit_splits(spec) else None
    for where, row, text in read_records(spec, owned, also, renders=renders):
        if part == "all" or owned or (text.strip() and assign_split(document_hash(text), spec.splits) == part):
            yield where, row, text


def _field(row: object, template: Template | None, where: str, key: str, spec: CorpusSpec) -> str:
    return "" if template is None else encodable(render(row, template, where, key), spec.errors, where).strip()


def _source(where: str) -> str:
    """Return file and row without the folders of this machine."""
    path, comma, row = where.rpartition(", ")
    return f"{Path(path).name}{comma}{row}"


def _required(found: list[_Record], part: Part) -> list[_Record]:
    if not found:
        more = "" if part == "all" else " Give more text, or --split all if the model never learns from this text."
        raise CorpusError(f"the corpus has no record{'' if part == 'all' else f' in its {part} split'}.{more}")
    return found
