"""Prompts are the records of a split's documents under another template; the document decides the split."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from secateur.corpus import check_prompts, load_prompts
from secateur.corpus.packing import load_split
from secateur.corpus.prompts import document_starts
from secateur.corpus.readers import read_documents, read_prompts
from secateur.corpus.split import SPLITS, document_hash
from secateur.errors import CorpusError
from secateur.recipe import CorpusSpec

TEXT = "Question: {question}\nAnswer: {answer}"
PROMPT = "Question: {question}\nAnswer:"
RECORDS = [{"question": f"What is {n}?", "answer": f"It is {n * n}.", "level": n % 3} for n in range(80)]


def write(folder: Path, suffix: str, records: list[dict[str, Any]] = RECORDS) -> CorpusSpec:
    """Write the records in a format and return the corpus."""
    file = folder / f"records{suffix}"
    if suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), file)
    elif suffix == ".csv":
        rows = [",".join(f'"{value}"' for value in record.values()) for record in records]
        file.write_text("\n".join([",".join(records[0]), *rows]), encoding="utf-8")
    elif suffix == ".json":
        file.write_text(json.dumps(records), encoding="utf-8")
    else:
        lines = "\n".join(json.dumps(record) for record in records)
        file.write_bytes(gzip.compress(lines.encode()) if suffix.endswith(".gz") else lines.encode())
    return CorpusSpec(path=str(file), text=TEXT)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet"])
def test_prompts_belong_to_the_documents_of_their_split(tmp_path: Path, suffix: str, plain_tokenizer: Any) -> None:
    """Hashes are those of the documents that a split is made of, and each prompt is that document's."""
    spec = write(tmp_path, suffix)
    by_hash = {document_hash(text): text for text in read_documents(spec)}
    seen: list[int] = []
    for split in SPLITS:
        found = load_prompts(spec, PROMPT, split)
        blocks = load_split(spec, split, plain_tokenizer, block_size=16, max_tokens=None)
        assert list(found.documents) == blocks.documents.tolist()
        for prompt, digest in zip(found.texts, found.documents, strict=True):
            assert by_hash[digest].startswith(prompt + " It is")
        seen += found.documents
    assert sorted(seen) == sorted(by_hash)


def test_exclusion_and_limit_take_the_smallest_hashes(tmp_path: Path) -> None:
    spec = write(tmp_path, ".jsonl")
    everything = load_prompts(spec, PROMPT, "calibration")
    gone = set(everything.documents[::3])
    found = load_prompts(spec, PROMPT, "calibration", exclude=gone, max_documents=7)
    assert found.documents == tuple(d for d in everything.documents if d not in gone)[:7]
    assert set(zip(found.documents, found.texts, strict=True)) <= set(
        zip(everything.documents, everything.texts, strict=True)
    )


def test_records_of_one_document_give_one_prompt_in_any_order(tmp_path: Path) -> None:
    """The longest, because what is not in the document must not decide by where it stands."""
    records = [{"text": "same", "hint": hint} for hint in ("b", "long hint", "a")]
    for number, ordered in enumerate((records, records[::-1])):
        file = tmp_path / f"{number}.jsonl"
        file.write_text("\n".join(map(json.dumps, ordered)), encoding="utf-8")
        spec = CorpusSpec(calibration=str(file), test=str(file))
        assert load_prompts(spec, "hint", "calibration").texts == ("long hint",)
        assert load_prompts(spec, "{text}?", "calibration").texts == ("same?",)


def test_blank_documents_and_prompts_are_passed_over(tmp_path: Path) -> None:
    """A prompt without any of its fields asks nothing; a record without a document belongs to no split."""
    records = [
        {"question": " ", "answer": "yes"},
        {"question": None, "answer": "yes"},
        {"question": "Why?", "answer": "x"},
    ]
    spec = write(tmp_path, ".jsonl", records)
    assert [prompt for _, prompt in read_prompts(spec, PROMPT)] == ["Question: Why?\nAnswer:"]
    bare = spec.model_copy(update={"text": "answer"})
    file = write(tmp_path, ".json", [{"question": "Why?", "answer": ""}, *records[2:]]).path
    assert len(list(read_prompts(bare.model_copy(update={"path": file}), PROMPT))) == 1


def test_plain_text_has_no_prompts(tmp_path: Path) -> None:
    """The message says what has fields; strings in JSON have none either."""
    (tmp_path / "notes.txt").write_text("One paragraph.", encoding="utf-8")
    (tmp_path / "strings.json").write_text('["a document"]', encoding="utf-8")
    for name in ("notes.txt", "strings.json"):
        with pytest.raises(CorpusError, match=r"has no fields, and recover.responses.prompt: asks for question.*jsonl"):
            check_prompts(CorpusSpec(path=str(tmp_path / name)), PROMPT)


def test_templates_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    spec = write(tmp_path, ".parquet")
    check_prompts(spec, PROMPT)
    with pytest.raises(CorpusError, match=r"no field 'questoin'. Did you mean 'question'.*recover.responses.prompt:"):
        check_prompts(spec, "{questoin}")
    with pytest.raises(CorpusError, match=r"recover.responses.prompt: '\{' is not a template"):
        check_prompts(spec, "{")
    with pytest.raises(CorpusError, match=r"recover.responses.prompt: is empty.*\{question\}"):
        check_prompts(spec, " ")


def test_a_split_without_prompts_is_refused(tmp_path: Path) -> None:
    spec = write(tmp_path, ".jsonl", RECORDS[:1])
    empty = [split for split in SPLITS if not any_prompt(spec, split)]
    assert len(empty) == 2


def any_prompt(spec: CorpusSpec, split: Any) -> bool:
    """Return whether the split has a prompt; the error of one that has none is looked at."""
    try:
        return bool(load_prompts(spec, PROMPT, split).texts)
    except CorpusError as error:
        assert "1 documents gave 0 for split" in str(error)
        return False


def test_document_starts_are_the_first_tokens_of_the_first_documents(plain_tokenizer: Any) -> None:
    """So many tokens but at most half of a document, in the order of hashes, also of documents in several pieces."""
    texts = [" ".join(f"w{n}x{place}" for place in range(n)) for n in range(2, 60)]
    blocks = load_split(texts, "calibration", plain_tokenizer, block_size=512, max_tokens=None)
    by_hash = {document_hash(text): text for text in texts}
    starts = document_starts(blocks, plain_tokenizer, num_documents=20, num_tokens=8)
    wholes = [by_hash[digest] for digest in blocks.documents.tolist()]
    assert len(starts) == 20
    for start, whole in zip(starts, wholes, strict=False):
        assert whole.startswith(start)
        assert len(start) <= len(whole) / 2 + 4
    pieces = load_split(texts, "calibration", plain_tokenizer, block_size=16, max_tokens=None)
    assert document_starts(pieces, plain_tokenizer, num_documents=20, num_tokens=4) == document_starts(
        blocks, plain_tokenizer, num_documents=20, num_tokens=4
    )


def test_document_starts_are_all_there_are_and_each_once(plain_tokenizer: Any) -> None:
    """Documents that begin alike give one prompt."""
    texts = [f"one and the same beginning {n}" for n in range(30)]
    blocks = load_split(texts, "calibration", plain_tokenizer, block_size=8, max_tokens=None)
    assert len(document_starts(blocks, plain_tokenizer, num_documents=9, num_tokens=2)) == 1


def test_another_key_is_named_in_messages(tmp_path: Path) -> None:
    spec, key = write(tmp_path, ".jsonl"), "evaluate.generations.prompt"
    with pytest.raises(CorpusError, match=r"no field 'questoin'.*evaluate.generations.prompt:"):
        load_prompts(spec, "{questoin}", "test", key=key)
    plain = tmp_path / "a.txt"
    plain.write_text("Some text.")
    with pytest.raises(
        CorpusError, match=r"has no fields, and evaluate.generations.prompt: .*leave evaluate.generations"
    ):
        check_prompts(CorpusSpec(path=str(plain)), "{question}", key)
