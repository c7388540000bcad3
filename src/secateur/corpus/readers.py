"""A corpus spec to its documents or prompts, streamed from files or a hub data set; it neither splits nor tokenizes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal

from secateur.corpus.fields import Template, parse_template, render
from secateur.corpus.files import data_suffix, source_files
from secateur.corpus.formats import FORMATS, PLAIN_SUFFIXES, ReadOptions, Row, check_encoding, read_rows
from secateur.corpus.split import SPLITS, Split
from secateur.errors import CorpusError, UnavailableError
from secateur.recipe import CorpusSpec, SplitRatios
from secateur.registry import unknown_name

PROMPT_KEY = "recover.responses.prompt"
"""The recipe's key for the template of the prompts that are trained on, for messages."""


def read_documents(spec: CorpusSpec, split: str | None = None) -> Iterator[str]:
    """Yield the documents of a corpus, in an order that depends only on the spec and the text.

    Args:
        spec: where the text is, and how a record becomes a document. Records that come out blank are passed over.
        split: reads only the paths given for that split, where the spec gives explicit ones; otherwise it changes
            nothing, because one source is split by document hash later.

    Raises:
        CorpusError: a path, file, template or record cannot be used; the message names the file and the row.
        UnavailableError: a hub data set could not be had.
    """
    template = _checked_template(spec)
    if spec.dataset is not None:
        yield from _rendered(_dataset_rows(spec, spec.dataset), template, spec)
        return
    for path in _spec_files(spec, split):
        yield from _file_documents(path, template, spec)


def read_prompts(
    spec: CorpusSpec, prompt: str, split: str | None = None, key: str = PROMPT_KEY
) -> Iterator[tuple[str, str]]:
    """Yield each document of ``read_documents``, and beside it the same record under another template.

    Records whose fields all come out blank under that other template are passed over too.

    Args:
        spec: where the text is, and how a record becomes a document.
        prompt: how a record becomes a prompt: a template such as ``"Question: {question}"``, or the name of a field.
        split: as in ``read_documents``.
        key: the recipe's key for the template, for messages.

    Raises:
        CorpusError: as in ``read_documents``, or the corpus is plain text, whose documents have no fields.
        UnavailableError: a hub data set could not be had.
    """
    document_template, template = _checked_template(spec), parse_template(prompt, key)
    for where, row in _rows(spec, split, document_template, template):
        if not isinstance(row, Mapping):
            raise CorpusError(
                f"{where} has no fields, and {key}: asks for {', '.join(template.fields)}. Prompts are made "
                f"from records: give .jsonl, .json, .csv or .parquet files, or leave {key.removesuffix('.prompt')} out."
            )
        document = encodable(render(row, document_template, where), spec.errors, where)
        text = encodable(render(row, template, where, key), spec.errors, where)
        if document.strip() and text.split() != template.literal.split():
            yield document, text


def read_records(
    spec: CorpusSpec, split: str | None = None, also: Template | None = None, *, renders: bool = True
) -> Iterator[tuple[str, object, str]]:
    """Yield where each record stands, the record as it was read, and its document, which may be blank.

    Args:
        spec: where the text is, and how a record becomes a document.
        split: as in ``read_documents``.
        also: further fields that are wanted of a record.
        renders: whether records become documents; if not, those are blank.

    Raises:
        CorpusError: as in ``read_documents``.
        UnavailableError: a hub data set could not be had.
    """
    template = _checked_template(spec)
    for where, row in _rows(spec, split, template, also):
        own = None if isinstance(row, str) else template
        yield where, row, encodable(render(row, own, where), spec.errors, where) if renders else ""


def check_prompts(spec: CorpusSpec, prompt: str, key: str = PROMPT_KEY) -> None:
    """Refuse a corpus whose records give no prompts, before anything expensive starts; it looks at the first one.

    Raises:
        CorpusError: as in ``read_prompts``.
        UnavailableError: a hub data set could not be had.
    """
    for split in explicit_splits(spec) or (None,):
        next(read_prompts(spec, prompt, split, key), None)


def _rows(spec: CorpusSpec, split: str | None, template: Template | None, also: Template | None) -> Iterator[Row]:
    if spec.dataset is not None:
        yield from _dataset_rows(spec, spec.dataset)
        return
    for path in _spec_files(spec, split):
        yield from read_rows(path, ReadOptions(spec.encoding, spec.errors, template, also))


def check_sources(spec: CorpusSpec) -> None:
    """Refuse a corpus that cannot be read, before anything expensive starts.

    Looks at the template and the encoding, at every path, and reads one document: the first of the first file of each
    explicit split, or of the data set.

    Raises:
        CorpusError: as in ``read_documents``, or the spec has a template but no file with fields.
        UnavailableError: a hub data set could not be had.
    """
    template = _checked_template(spec)
    if spec.dataset is not None:
        next(_rendered(_dataset_rows(spec, spec.dataset), template, spec), None)
        return
    for split in explicit_splits(spec) or (None,):
        files = _spec_files(spec, split)
        if template is not None and all(data_suffix(path) in PLAIN_SUFFIXES for path in files):
            raise CorpusError(
                f"text: names {', '.join(template.fields)}, but {files[0]} is plain text without fields. Remove text:, "
                "or give .jsonl, .json, .csv or .parquet files."
            )
        next(_file_documents(files[0], template, spec), None)


def open_source(
    source: CorpusSpec | Sequence[str], split: Split, name: str
) -> tuple[Iterable[str], SplitRatios | None]:
    """Return the documents of a source, and the shares by which they are split (None: by their owner, already).

    Args:
        source: a corpus spec, or documents in memory, which are split with the default shares.
        split: the one wanted; documents of others may be among those returned unless their owner split them.
        name: of the corpus, for messages.

    Raises:
        CorpusError: the source is a single string. Documents that cannot be read raise when they are reached.
    """
    if isinstance(source, CorpusSpec):
        return read_documents(source, split), None if explicit_splits(source) else source.splits
    if isinstance(source, str):
        raise CorpusError(f"corpus {name!r} is one string. Give a list of documents, or a CorpusSpec for files.")
    documents = (
        encodable(text, "strict", f"document {number} of corpus {name!r}")
        for number, text in enumerate(source, start=1)
    )
    return documents, SplitRatios()


def require_documents(num_seen: int, num_taken: int, num_excluded: int, split: Split, name: str) -> None:
    """Refuse a corpus without text, or one whose split has no document.

    Args:
        num_seen: documents with text, of all splits.
        num_taken: documents of the split that were taken.
        num_excluded: documents of the split that were to be excluded.
        split: the one wanted.
        name: of the corpus.

    Raises:
        CorpusError: nothing was seen, or nothing taken.
    """
    if not num_seen:
        raise CorpusError(f"corpus {name!r} is empty: no record holds any text. Give files or records with text.")
    if not num_taken:
        excluded = f" ({num_excluded} were excluded)" if num_excluded else ""
        raise CorpusError(
            f"corpus {name!r}: {num_seen} documents gave 0 for split {split}{excluded}; give more text or set splits."
        )


def explicit_splits(spec: CorpusSpec) -> tuple[Split, ...]:
    """Return the splits for which the spec names paths of their own; none if the text is split by hash."""
    return tuple(split for split in SPLITS if getattr(spec, split) is not None)


def _checked_template(spec: CorpusSpec) -> Template | None:
    check_encoding(spec.encoding)
    return None if spec.text is None else parse_template(spec.text)


def _spec_files(spec: CorpusSpec, split: str | None) -> list[Path]:
    if split is not None and split not in SPLITS:
        raise CorpusError(unknown_name("split", split, SPLITS))
    explicit = explicit_splits(spec)
    if spec.path is not None:
        return source_files(spec.path, FORMATS)
    if split is not None and split not in explicit:
        raise CorpusError(
            f"the corpus names paths for {', '.join(explicit)} but none for {split}. Add {split}:, or give one path: "
            "to be split by document."
        )
    wanted = explicit if split is None else (split,)
    return [file for name in wanted for file in source_files(getattr(spec, name), FORMATS)]


def _file_documents(path: Path, template: Template | None, spec: CorpusSpec) -> Iterator[str]:
    options = ReadOptions(spec.encoding, spec.errors, template)
    has_fields = data_suffix(path) not in PLAIN_SUFFIXES
    return _rendered(read_rows(path, options), template if has_fields else None, spec)


def _rendered(rows: Iterator[Row], template: Template | None, spec: CorpusSpec) -> Iterator[str]:
    for where, row in rows:
        text = encodable(render(row, template, where), spec.errors, where)
        if text.strip():
            yield text


def encodable(text: str, errors: Literal["strict", "replace", "ignore"], where: str) -> str:
    """Return text that UTF-8 can express: half surrogate pairs, as JSON escapes may leave them, are not text.

    Raises:
        CorpusError: there is such a half and ``errors`` is strict.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        if errors == "strict":
            raise CorpusError(
                f"{where} holds half a surrogate pair, U+{ord(text[error.start]):04X}, which is not text. Correct the "
                "record, or set errors: replace."
            ) from None
        return text.encode("utf-16", "surrogatepass").decode("utf-16", errors)
    return text


def _dataset_rows(spec: CorpusSpec, dataset: str) -> Iterator[Row]:
    """Yield the rows of a hub data set; ``datasets`` may fail with almost any exception, so all are caught."""
    import datasets

    config = f" (config {spec.config})" if spec.config else ""
    where = f"data set {dataset}{config}, split {spec.dataset_split}"
    try:
        rows = datasets.load_dataset(dataset, spec.config, split=spec.dataset_split, streaming=True)
        for number, row in enumerate(rows, start=1):
            yield f"{where}, row {number}", row
    except ValueError as error:
        raise CorpusError(
            f"{where} cannot be read: {_sentence(error)} Correct dataset:, config: or dataset_split:."
        ) from None
    except Exception as error:
        raise UnavailableError(
            f"{where} could not be had: {type(error).__name__}: {_sentence(error)} Check the name and the "
            "connection; for a gated data set log in with `hf auth login`; or download it and give its files in path:."
        ) from None


def _sentence(error: Exception) -> str:
    return f"{str(error).strip().rstrip('.')}."
