"""One file to its rows, streamed: text, Markdown, JSON lines, JSON, CSV and Parquet, each also gzipped.

A row is a string (a document already) or a mapping of fields; which fields make the document is not decided here.
Every row comes with the words that name its place in messages, such as ``notes.jsonl, line 3``.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from secateur.corpus.fields import TEXT_FIELD, Template, has_fields
from secateur.corpus.files import COMPRESSED, data_suffix
from secateur.errors import CorpusError

Row = tuple[str, object]
"""Where it is, for messages; and the string or mapping there."""

PLAIN_SUFFIXES = frozenset({".txt", ".md"})
"""Formats whose rows are documents already and have no fields."""

_CHUNK_BYTES = 1 << 16
_PARQUET_ROWS = 1024
_CSV_FIELD_LIMIT = 2**31 - 1
_HEADING = re.compile(r" {0,3}#{1,6}(\s|$)")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How the bytes of a file are understood.

    Attributes:
        encoding: name of a text encoding; a byte order mark is stripped.
        errors: what happens to bytes that are not text in that encoding.
        template: the fields that are wanted; lets Parquet read only those columns.
        also: further fields that are wanted beside them.
    """

    encoding: str = "utf-8"
    errors: Literal["strict", "replace", "ignore"] = "strict"
    template: Template | None = None
    also: Template | None = None


def read_rows(path: Path, options: ReadOptions) -> Iterator[Row]:
    """Yield the rows of a file whose suffix is in ``FORMATS``, in file order.

    Raises:
        CorpusError: the file cannot be opened, is broken, or holds bytes that are not text.
    """
    try:
        yield from FORMATS[data_suffix(path)](path, options)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise CorpusError(f"{path} is broken gzip: {error}. Compress it again, or fetch it again.") from None
    except OSError as error:
        raise CorpusError(f"cannot read {path}: {error.strerror or error}. Check the file and its rights.") from None


def check_encoding(encoding: str) -> None:
    """Refuse a name that is not a text encoding.

    Raises:
        CorpusError: Python knows no text encoding of that name.
    """
    try:
        "".encode(encoding)
    except (LookupError, ValueError):
        raise CorpusError(f"encoding: {encoding!r} is not known. Write for example utf-8, latin-1 or cp1252.") from None


def _read_text(path: Path, options: ReadOptions) -> Iterator[Row]:
    """Paragraphs, parted by blank lines; a file without blank lines is one."""
    start = 1
    lines: list[str] = []
    for number, line in enumerate(_lines(path, options), start=1):
        if line.strip():
            if not lines:
                start = number
            lines.append(line)
        elif lines:
            yield f"{path}, line {start}", "\n".join(lines)
            lines = []
    if lines:
        yield f"{path}, line {start}", "\n".join(lines)


def _read_markdown(path: Path, options: ReadOptions) -> Iterator[Row]:
    """Sections, parted before headings; headings that follow one another stay with the text below them.

    A ``#`` inside a code fence is not a heading.
    """
    start, has_body, fence = 1, False, ""
    section: list[str] = []
    for number, line in enumerate(_lines(path, options), start=1):
        is_heading = not fence and _HEADING.match(line) is not None
        if is_heading and has_body:
            yield f"{path}, line {start}", "\n".join(section)
            start, section, has_body = number, [], False
        has_body = has_body or (bool(line.strip()) and not is_heading)
        fence = _fence_after(line, fence)
        section.append(line)
    if section:
        yield f"{path}, line {start}", "\n".join(section)


def _fence_after(line: str, fence: str) -> str:
    """Return the open code fence after a line, given the one before it; empty when none is open."""
    mark = _FENCE.match(line)
    if not mark:
        return fence
    if not fence:
        return mark[1]
    closes = mark[1].startswith(fence) and not line[mark.end() :].strip()
    return "" if closes else fence


def _read_json_lines(path: Path, options: ReadOptions) -> Iterator[Row]:
    for number, line in enumerate(_lines(path, options), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _parse_json(line, where)


def _read_json(path: Path, options: ReadOptions) -> Iterator[Row]:
    data = _parse_json("".join(_decoded(path, options)), str(path))
    if isinstance(data, Mapping):
        rows = _list_inside(data, options.template)
        if rows is None:
            yield str(path), data
            return
        data = rows
    if not isinstance(data, list):
        raise CorpusError(f"{path} holds one {type(data).__name__}. Give a list of records or strings, or one record.")
    for number, row in enumerate(data, start=1):
        yield f"{path}, record {number}", row


def _list_inside(data: Mapping[str, Any], template: Template | None) -> list[Any] | None:
    """Return the only list among the object's values, unless the object is a record itself."""
    lists = [value for value in data.values() if isinstance(value, list)]
    return lists[0] if len(lists) == 1 and not has_fields(data, template) else None


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CorpusError(f"{where} is not valid JSON: {error}. Correct the file.") from None


def _read_csv(path: Path, options: ReadOptions) -> Iterator[Row]:
    reader = csv.reader((line + "\n" for line in _lines(path, options)), strict=True)
    header: list[str] | None = None
    number = 0
    while (cells := _next_cells(reader, path)) is not None:
        if not cells:
            continue
        if header is None:
            header = _checked_header(cells, path)
            continue
        number += 1
        where = f"{path}, row {number} (line {reader.line_num})"
        if len(cells) > len(header):
            raise CorpusError(
                f"{where} has {len(cells)} cells; the header has {len(header)}. Quote cells that hold a comma."
            )
        yield where, dict(zip(header, cells + [None] * (len(header) - len(cells)), strict=True))


def _next_cells(reader: Any, path: Path) -> list[Any] | None:
    """Return the next row of cells, or None at the end.

    The csv module's limit on the length of a cell is one setting for the whole process, so it is lifted only here.
    """
    limit = csv.field_size_limit(_CSV_FIELD_LIMIT)
    try:
        return next(reader, None)
    except csv.Error as error:
        raise CorpusError(f"{path}, line {reader.line_num} is not valid CSV: {error}. Correct the quotes.") from None
    finally:
        csv.field_size_limit(limit)


def _checked_header(cells: list[str], path: Path) -> list[str]:
    twice = sorted({cell for cell in cells if cells.count(cell) > 1})
    if twice:
        raise CorpusError(f"{path}: the header names {', '.join(map(repr, twice))} more than once. Rename a column.")
    return cells


def _read_parquet(path: Path, options: ReadOptions) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with _random_access(path) as stream:
            file = pyarrow.parquet.ParquetFile(stream)
            columns = _wanted_columns(file.schema_arrow.names, options)
            number = 0
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row
    except pyarrow.ArrowException as error:
        raise CorpusError(
            f"{path} is not a readable Parquet file: {error}. Write it again, or fetch it again."
        ) from None


@contextmanager
def _random_access(path: Path) -> Iterator[IO[bytes]]:
    """Open a file that is read from its end; a compressed one is unpacked to a temporary file first."""
    if path.suffix.lower() != COMPRESSED:
        with path.open("rb") as stream:
            yield stream
        return
    with tempfile.TemporaryFile() as unpacked:
        with gzip.open(path, "rb") as packed:
            shutil.copyfileobj(packed, unpacked)
        unpacked.seek(0)
        yield unpacked


def _wanted_columns(names: list[str], options: ReadOptions) -> list[str] | None:
    """Return the columns to read; None for all, also when one is missing, so that the message can list them."""
    fields = options.template.fields if options.template else (TEXT_FIELD,)
    fields += options.also.fields if options.also else ()
    columns = [field if field in names else field.split(".")[0] for field in fields]
    return sorted(set(columns)) if set(columns) <= set(names) else None


def _lines(path: Path, options: ReadOptions) -> Iterator[str]:
    """Yield decoded lines without their ends; only line feeds, carriage returns and the two together end one."""
    pending: list[str] = []
    for text in _decoded(path, options):
        first, *others = text.split("\n")
        pending.append(first)
        for line in others:
            yield "".join(pending)
            pending = [line]
    last = "".join(pending)
    if last:
        yield last


def _decoded(path: Path, options: ReadOptions) -> Iterator[str]:
    """Yield the text of a file in portions, without a byte order mark, every line end a line feed."""
    decoder = codecs.getincrementaldecoder(options.encoding)(options.errors)
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    fed = num_lines = 0
    at_start = True
    for chunk in _chunks(path):
        kept = len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            line = 1 + num_lines + error.object[: error.start].count(b"\n")
            raise _not_text(path, options.encoding, error, line, fed - kept + error.start) from None
        fed += len(chunk)
        if at_start and text:
            text, at_start = text.removeprefix("\ufeff"), False
        text = newlines.decode(text, final=not chunk)
        num_lines += text.count("\n")
        yield text


def _chunks(path: Path) -> Iterable[bytes]:
    """Yield the bytes of a file, unpacked, in portions; the last portion is empty."""
    opened = gzip.open(path, "rb") if path.suffix.lower() == COMPRESSED else path.open("rb")
    with opened as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            yield chunk
    yield b""


def _not_text(path: Path, encoding: str, error: UnicodeDecodeError, line: int, offset: int) -> CorpusError:
    return CorpusError(
        f"{path}, line {line}: byte 0x{error.object[error.start]:02x} at offset {offset} is not {encoding} "
        f"({error.reason}). Name the right encoding: (for example latin-1), or set errors: replace."
    )


FORMATS: dict[str, Callable[[Path, ReadOptions], Iterator[Row]]] = {
    ".txt": _read_text,
    ".md": _read_markdown,
    ".jsonl": _read_json_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
"""Reader of each suffix; any of them may be followed by ``.gz``."""
