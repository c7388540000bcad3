"""Turns the two published text files of the demo into documents, one JSON object a line; fetches nothing.

Phenotype terms come in the OBO flat file format 1.2 (https://owlcollab.github.io/oboformat/doc/GO.format.obo-1_2.html),
of which only the tags that carry text are used. The wording of the sources is kept as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from secateur.errors import CorpusError
from secateur.files import replacing

_QUOTED = re.compile(r'"((?:[^"\\]|\\.)*)"')
_ESCAPE = re.compile(r"\\(.)")
_ESCAPED = {"n": "\n", "t": "\t", "W": " "}
_TRAILING_MODIFIER = re.compile(r'\s*\{\w+="[^"]*"(?:,\s*\w+="[^"]*")*\}\s*$')


def parse_obo(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """Yield one record per term that is not obsolete and has a definition, in the order of the file.

    Args:
        lines: an OBO file, with or without line ends.

    Yields:
        ``id``, ``name`` and ``text``, which is ``"{name}: {definition} {comment}"`` with escapes undone and
        cross-references dropped.

    Raises:
        CorpusError: a definition is not a quoted string.
    """
    for term in _terms(lines):
        if {"id", "name", "def"} <= term.keys() and term.get("is_obsolete") != "true":
            yield _phenotype_record(term)


def parse_data_version(lines: Iterable[str]) -> str:
    """Return the release that the header of an OBO file names, for example ``hp/releases/2025-01-16``.

    Raises:
        CorpusError: the header has no ``data-version`` line.
    """
    for line in lines:
        if line.startswith("["):
            break
        tag, _, value = line.partition(":")
        if tag == "data-version":
            return value.strip()
    raise CorpusError(
        "the OBO file has no data-version line before its first stanza, so its release cannot be named. "
        "Use a released file of the ontology."
    )


def parse_summaries(data: Mapping[str, Mapping[str, str]]) -> Iterator[dict[str, str]]:
    """Yield one record per encyclopedia summary that is not empty, in the order of ``data``.

    Args:
        data: title to an entry with at least ``extract``, the text.

    Yields:
        ``name`` (the title) and ``text`` (the extract).
    """
    for title, entry in data.items():
        text = entry["extract"].strip()
        if text:
            yield {"name": title, "text": text}


def write_jsonl(path: Path, records: Iterable[Mapping[str, str]]) -> int:
    """Write the records to ``path``, one JSON object a line in UTF-8, whole or not at all; return their number.

    Raises:
        OSError: the folder is missing, full or cannot be written.
    """
    count = 0
    with replacing(path) as output:
        for record in records:
            output.write((json.dumps(record, ensure_ascii=False) + "\n").encode())
            count += 1
    return count


def _terms(lines: Iterable[str]) -> Iterator[dict[str, str]]:
    """Yield the tags of each ``[Term]`` stanza; of a repeated tag, the first value."""
    term: dict[str, str] | None = None
    for line in lines:
        if line.startswith("["):
            if term is not None:
                yield term
            term = {} if line.strip() == "[Term]" else None
        elif term is not None:
            tag, colon, value = line.partition(":")
            if colon:
                term.setdefault(tag, value.strip())
    if term is not None:
        yield term


def _phenotype_record(term: Mapping[str, str]) -> dict[str, str]:
    name = _unescape(term["name"])
    quoted = _QUOTED.match(term["def"])
    if quoted is None:
        raise CorpusError(
            f"the definition of {term['id']} is not a quoted string: {term['def'][:80]!r}. "
            "Use a released file of the ontology."
        )
    comment = _unescape(_TRAILING_MODIFIER.sub("", term.get("comment", "")))
    text = f"{name}: {_unescape(quoted[1]).strip()} {comment}".strip()
    return {"id": term["id"], "name": name, "text": text}


def _unescape(value: str) -> str:
    return _ESCAPE.sub(lambda match: _ESCAPED.get(match[1], match[1]), value)
