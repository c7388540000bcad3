"""Documents of the demo: what the parsers keep, drop and undo, on invented entries."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from secateur.demo.corpora import parse_data_version, parse_obo, parse_summaries, write_jsonl
from secateur.errors import CorpusError

OBO = r"""format-version: 1.2
data-version: zz/releases/2020-02-02
ontology: zz.obo

[Term]
id: ZZ:1
name: Blue thumb
def: "A thumb that is \"blue\", or\nnearly so\: see [1]." [PMID:1, http://example.org/a\,b] {source="x"}
comment: Seen in gardeners. {xref="PMID:2", xref="https://example.org/3"}
synonym: "Azure thumb" EXACT []
is_a: ZZ:0 ! All

[Term]
id: ZZ:2
name: No definition
comment: Only a comment.

[Term]
id: ZZ:3
name: obsolete Red thumb
def: "A red thumb." []
is_obsolete: true

[Term]
id: ZZ:4
name: Green thumb
def: "A back\\slash (and {braces} kept)." []

[Typedef]
id: has_part
name: has part
def: "Not a term." []
"""


def test_terms_become_documents() -> None:
    """Name, definition and comment, with escapes undone and cross-references gone."""
    assert list(parse_obo(OBO.splitlines())) == [
        {
            "id": "ZZ:1",
            "name": "Blue thumb",
            "text": 'Blue thumb: A thumb that is "blue", or\nnearly so: see [1]. Seen in gardeners.',
        },
        {"id": "ZZ:4", "name": "Green thumb", "text": "Green thumb: A back\\slash (and {braces} kept)."},
    ]


def test_line_ends_do_not_matter() -> None:
    """Lines of an open file and of a file from another system parse alike."""
    expected = list(parse_obo(OBO.splitlines()))
    assert list(parse_obo(OBO.splitlines(keepends=True))) == expected
    assert list(parse_obo(OBO.replace("\n", "\r\n").splitlines(keepends=True))) == expected


def test_a_definition_that_is_not_quoted_is_refused() -> None:
    """The term and what was found are named."""
    with pytest.raises(CorpusError, match=r"definition of ZZ:9 is not a quoted string: 'loose words'"):
        list(parse_obo(["[Term]", "id: ZZ:9", "name: Odd", "def: loose words"]))


def test_the_release_is_read_from_the_header() -> None:
    """The data-version line, without its tag."""
    assert parse_data_version(OBO.splitlines(keepends=True)) == "zz/releases/2020-02-02"


def test_a_missing_release_is_refused() -> None:
    """A data-version below the header does not count."""
    with pytest.raises(CorpusError, match="no data-version line"):
        parse_data_version(["format-version: 1.2", "[Term]", "data-version: late"])


def test_summaries_become_documents() -> None:
    """Title and extract are kept, the rest is not; an empty extract is no document."""
    data = {
        "Paper boat": {"title": "Paper boat", "extract": " It floats. ", "description": "toy", "topic": "Play"},
        "Nothing": {"title": "Nothing", "extract": " ", "description": "", "topic": ""},
    }
    assert list(parse_summaries(data)) == [{"name": "Paper boat", "text": "It floats."}]


def test_jsonl_has_one_object_a_line_in_utf8(tmp_path: Path) -> None:
    """Newlines inside a text do not break lines, and letters are not escaped."""
    records = [{"text": "a\nb"}, {"text": "Köhler"}]
    assert write_jsonl(tmp_path / "a.jsonl", records) == 2
    content = (tmp_path / "a.jsonl").read_bytes().decode("utf-8")
    assert [json.loads(line) for line in content.splitlines()] == records
    assert "Köhler" in content


def test_a_failing_source_leaves_no_file(tmp_path: Path) -> None:
    """Half a corpus never lies under the final name."""

    def records() -> Iterator[dict[str, str]]:
        yield {"text": "one"}
        raise CorpusError("broken")

    with pytest.raises(CorpusError):
        write_jsonl(tmp_path / "a.jsonl", records())
    assert list(tmp_path.iterdir()) == []
