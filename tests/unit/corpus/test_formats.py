"""Each format gives its rows in order, plain or gzipped, and says where it is broken."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from secateur.corpus import formats
from secateur.corpus.fields import parse_template
from secateur.corpus.formats import FORMATS, ReadOptions, check_encoding, read_rows
from secateur.errors import CorpusError

Write = Callable[[str, "str | bytes"], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a file, gzipped if its name says so."""

    def write_file(name: str, content: str | bytes) -> Path:
        data = content.encode() if isinstance(content, str) else content
        path = tmp_path / name
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return write_file


def rows(path: Path, **options: object) -> list[object]:
    """Return the rows of a file without their places."""
    return [row for _, row in read_rows(path, ReadOptions(**options))]  # type: ignore[arg-type]


def places(path: Path) -> list[str]:
    """Return the places of the rows, without the folder."""
    return [where.removeprefix(f"{path.parent}/") for where, _ in read_rows(path, ReadOptions())]


def refusal(path: Path, **options: object) -> str:
    """Return the message of the error that reading the file raises."""
    with pytest.raises(CorpusError) as caught:
        rows(path, **options)
    assert str(path) in str(caught.value)
    return str(caught.value)


def parquet_bytes(columns: dict[str, list[object]]) -> bytes:
    """Return a Parquet file with two rows per row group."""
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


CONTENTS: dict[str, tuple[str | bytes, list[object]]] = {
    ".txt": ("one\ntwo\n\n \t\nthree\n", ["one\ntwo", "three"]),
    ".md": ("# A\nx\n## B\ny\n", ["# A\nx", "## B\ny"]),
    ".jsonl": ('{"text": "a"}\n\n"b"\n', [{"text": "a"}, "b"]),
    ".json": ('[{"text": "a"}, "b"]', [{"text": "a"}, "b"]),
    ".csv": ('q,a\n"x, y",1\n\nz,\n', [{"q": "x, y", "a": "1"}, {"q": "z", "a": ""}]),
    ".parquet": (parquet_bytes({"q": ["x", None, "z"]}), [{"q": "x"}, {"q": None}, {"q": "z"}]),
}


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("suffix", sorted(FORMATS))
def test_every_format_plain_and_gzipped(write: Write, suffix: str, gz: str) -> None:
    """The rows of a file are the same whether it is compressed or not."""
    content, expected = CONTENTS[suffix]
    assert rows(write(f"f{suffix}{gz}", content)) == expected


@pytest.mark.parametrize("suffix", sorted(FORMATS))
def test_every_format_names_places(write: Write, suffix: str) -> None:
    """Every row says where it is, in the units of its format."""
    expected = {
        ".txt": ["f.txt, line 1", "f.txt, line 5"],
        ".md": ["f.md, line 1", "f.md, line 3"],
        ".jsonl": ["f.jsonl, line 1", "f.jsonl, line 3"],
        ".json": ["f.json, record 1", "f.json, record 2"],
        ".csv": ["f.csv, row 1 (line 2)", "f.csv, row 2 (line 4)"],
        ".parquet": ["f.parquet, row 1", "f.parquet, row 2", "f.parquet, row 3"],
    }
    assert places(write(f"f{suffix}", CONTENTS[suffix][0])) == expected[suffix]


@pytest.mark.parametrize("suffix", [".txt", ".md", ".jsonl", ".csv"])
def test_empty_files_have_no_rows(write: Write, suffix: str) -> None:
    """An empty file is no error by itself; formats without a frame give nothing."""
    assert rows(write(f"f{suffix}", "")) == []


def test_text_without_blank_lines_is_one_document(write: Write) -> None:
    """A file of one paragraph is one document, also when blank lines surround it."""
    assert rows(write("f.txt", "\n\na\nb\n\n")) == ["a\nb"]


def test_headings_without_text_stay_with_the_next_section(write: Write) -> None:
    """Headings in a row begin one section, and what stands before the first heading is one too."""
    text = "intro\n\n# Title\n\n## Part\nbody\n### Sub\n#hashtag\n"
    assert rows(write("f.md", text)) == ["intro\n", "# Title\n\n## Part\nbody", "### Sub\n#hashtag"]


def test_comments_in_code_are_no_headings(write: Write) -> None:
    """A line that begins with # in a fence does not part the section; a shorter fence does not close it."""
    text = "# A\n````sh\n# not one\n```\n# nor this\n````\n# B\nx"
    assert rows(write("f.md", text)) == [text[: text.index("\n# B")], "# B\nx"]


def test_fence_with_words_after_it_does_not_close(write: Write) -> None:
    """Only a bare fence closes a fence."""
    assert len(rows(write("f.md", "# A\n```\n```python\n# inside\n```\n"))) == 1


@pytest.mark.parametrize(
    ("content", "template", "expected"),
    [
        ('{"version": "1", "data": [{"q": "x"}]}', "q", [{"q": "x"}]),
        ('{"data": ["x", "y"]}', None, ["x", "y"]),
        ('{"text": "x", "tags": ["y"]}', None, [{"text": "x", "tags": ["y"]}]),
        ('{"q": "x", "answers": ["y"]}', "q", [{"q": "x", "answers": ["y"]}]),
        ('{"q": "x"}', None, [{"q": "x"}]),
        ('{"a": [1], "b": [2]}', None, [{"a": [1], "b": [2]}]),
        ("[]", None, []),
    ],
)
def test_shapes_of_json(write: Write, content: str, template: str | None, expected: list[object]) -> None:
    """A list, one list in an object, or a single record; an object with the wanted fields is a record."""
    parsed = None if template is None else parse_template(template)
    assert rows(write("f.json", content), template=parsed) == expected


@pytest.mark.parametrize(
    ("name", "content", "fragment"),
    [
        ("f.jsonl", '{"a": 1}\n{"a": \n', "f.jsonl, line 2 is not valid JSON: Expecting value"),
        ("f.json", "", "f.json is not valid JSON: Expecting value"),
        ("f.json", "3", "f.json holds one int. Give a list"),
        ("f.jsonl", "[" * 100_000, "f.jsonl, line 1 is not valid JSON: "),
        ("f.csv", "a,b\n1,2,3\n", "f.csv, row 1 (line 2) has 3 cells; the header has 2. Quote cells"),
        ("f.csv", 'a\n"open\n', "f.csv, line 2 is not valid CSV: unexpected end of data"),
        ("f.csv", "a,b,a\n", "the header names 'a' more than once"),
        ("f.parquet", b"PAR1 nonsense PAR1", "f.parquet is not a readable Parquet file: "),
    ],
)
def test_broken_files_name_the_place(write: Write, name: str, content: str | bytes, fragment: str) -> None:
    """What cannot be parsed is refused with file, place and cause."""
    assert fragment in refusal(write(name, content))


def test_short_csv_rows_end_in_nulls(write: Write) -> None:
    """Cells that are missing at the end of a row are null."""
    assert rows(write("f.csv", "a,b\n1\n")) == [{"a": "1", "b": None}]


def test_csv_cells_may_be_long_and_span_lines(write: Write) -> None:
    """A cell may exceed the csv module's default limit, which is left as it was, and hold line ends."""
    limit = csv.field_size_limit()
    long = "x" * (limit + 1)
    assert rows(write("f.csv", f'a,b\r\n"1\r\n2",{long}\r\n')) == [{"a": "1\n2", "b": long}]
    assert csv.field_size_limit() == limit


def test_parquet_reads_only_the_columns_it_needs(write: Write) -> None:
    """With a template, or a text column, other columns are not read; a missing column brings all for the message."""
    path = write("f.parquet", parquet_bytes({"text": ["t"], "q": ["x"], "m": [{"y": 1}], "d.t": ["z"]}))
    assert rows(path) == [{"text": "t"}]
    assert rows(path, template=parse_template("{q}{m.y}{d.t}")) == [{"q": "x", "m": {"y": 1}, "d.t": "z"}]
    assert set(rows(path, template=parse_template("{gone}"))[0]) == {"text", "q", "m", "d.t"}  # type: ignore[call-overload]


@pytest.mark.parametrize("name", ["f.txt.gz", "f.parquet.gz"])
@pytest.mark.parametrize("damage", ["cut", "not gzip", "flipped"])
def test_broken_gzip(tmp_path: Path, name: str, damage: str) -> None:
    """A compressed file that is cut, altered or not compressed at all is refused as such."""
    packed = gzip.compress(bytes(range(256)) * 16)
    damaged = {"cut": packed[:-20], "not gzip": b"plain", "flipped": packed[:12] + b"\xff\xff" + packed[14:]}
    path = tmp_path / name
    path.write_bytes(damaged[damage])
    assert "is broken gzip: " in refusal(path, errors="replace")


def test_a_file_that_vanished_is_refused(tmp_path: Path) -> None:
    """A file that cannot be opened gives the system's reason."""
    assert "No such file or directory. Check the file" in refusal(tmp_path / "gone.txt")


def test_bytes_that_are_not_text_are_located(write: Write) -> None:
    """The message names line, byte, offset and both ways out."""
    message = refusal(write("f.txt", b"abc\nde\xff\n"))
    assert "line 2: byte 0xff at offset 6 is not utf-8 (invalid start byte)" in message
    assert "encoding: (for example latin-1), or set errors: replace" in message


@pytest.mark.parametrize("chunk", [1, 2, 3, 64])
def test_location_does_not_depend_on_portions(write: Write, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Line and offset are right wherever the portions of a file are cut."""
    monkeypatch.setattr(formats, "_CHUNK_BYTES", chunk)
    message = refusal(write("f.txt", "東京\r\né\r\n".encode() + b"a\xe6\x9d"))
    assert "line 3: byte 0xe6 at offset 13" in message


@pytest.mark.parametrize("chunk", [1, 2, 3, 64])
def test_text_does_not_depend_on_portions(write: Write, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """Characters and line ends that two portions share come out whole."""
    monkeypatch.setattr(formats, "_CHUNK_BYTES", chunk)
    words = ["東京", "é", "x\u2028y"]
    path = write("f.jsonl", "".join(json.dumps(word, ensure_ascii=False) + "\r\n" for word in words))
    assert rows(path) == words


@pytest.mark.parametrize(("errors", "expected"), [("replace", "a\ufffdb"), ("ignore", "ab")])
def test_errors_option_is_honoured(write: Write, errors: str, expected: str) -> None:
    """Bytes that are not text are replaced or left out when that is asked for."""
    assert rows(write("f.txt", b"a\xffb"), errors=errors) == [expected]


@pytest.mark.parametrize(
    ("encoding", "data"),
    [
        ("utf-8", b"\xef\xbb\xbf" + "é".encode()),
        ("utf-16", "é".encode("utf-16")),
        ("utf-16-le", "\ufeffé".encode("utf-16-le")),
        ("latin-1", b"\xe9"),
    ],
)
def test_encodings_and_byte_order_marks(write: Write, encoding: str, data: bytes) -> None:
    """Other encodings are read when named, and a byte order mark is no part of the text."""
    assert rows(write("f.txt", data), encoding=encoding) == ["é"]


def test_carriage_returns_end_lines(write: Write) -> None:
    """Old line ends part paragraphs too, and none stays in the text."""
    assert rows(write("f.txt", b"a\rb\r\rc\r\n\r\nd")) == ["a\nb", "c", "d"]


@pytest.mark.parametrize("encoding", ["utf-9", "hex", "", "a\0b"])
def test_unknown_encodings_are_refused(encoding: str) -> None:
    """A name that is not a text encoding is refused with examples."""
    with pytest.raises(CorpusError, match=r"is not known\. Write for example utf-8, latin-1 or cp1252"):
        check_encoding(encoding)
