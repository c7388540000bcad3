"""Documents are split by their own hash, and a sample depends on nothing else."""

from __future__ import annotations

from collections import Counter

import pytest

from secateur.corpus.split import SPLITS, Selection, assign_split, document_hash, select_documents
from secateur.recipe import SplitRatios

TEXTS = [f"document number {number}" for number in range(300)]


def everything(texts: list[str], *, max_bytes: int | None = None) -> Selection:
    """Return the selection of texts that were split by their owner."""
    return select_documents(texts, split="test", ratios=None, max_bytes=max_bytes)


def test_hash_is_fixed() -> None:
    """The hash never changes between versions or machines: splits of earlier runs stay as they were."""
    assert document_hash("secateur") == 4698545807402373699
    assert 0 <= document_hash("") < 2**63


@pytest.mark.parametrize("other", [" a \n\tcafé ", "a\u00a0café", "a cafe\u0301"])
def test_hash_ignores_spacing_and_unicode_form(other: str) -> None:
    """Texts that look the same are the same document."""
    assert document_hash(other) == document_hash("a café")


@pytest.mark.parametrize("other", ["A café", "a cafe", "acafé", ""])
def test_hash_tells_texts_apart(other: str) -> None:
    """Case, accents and the presence of a space count."""
    assert document_hash(other) != document_hash("a café")


def test_splits_have_their_shares() -> None:
    """Over many documents each split gets its ratio, within four standard errors."""
    ratios = SplitRatios(calibration=0.5, validation=0.3, test=0.2)
    hashes = [document_hash(str(number)) for number in range(4000)]
    counts = Counter(assign_split(digest, ratios) for digest in hashes)
    for split in SPLITS:
        share = getattr(ratios, split)
        assert abs(counts[split] / 4000 - share) < 4 * (share * (1 - share) / 4000) ** 0.5


def test_smallest_hashes_fall_into_all_splits() -> None:
    """The order in which a limited sample is taken says nothing about the split."""
    hashes = sorted(document_hash(text) for text in TEXTS)
    counts = Counter(assign_split(digest, SplitRatios()) for digest in hashes[:100])
    assert counts.keys() == set(SPLITS)
    assert 60 <= counts["calibration"] <= 95


def test_splits_share_no_document_and_lose_none() -> None:
    """The three splits together are the corpus."""
    parts = [select_documents(TEXTS, split=split, ratios=SplitRatios(), max_bytes=None) for split in SPLITS]
    assert sorted(text for part in parts for text in part.texts) == sorted(TEXTS)
    assert {part.num_seen for part in parts} == {300}


def test_selection_is_sorted_by_hash() -> None:
    """Texts and hashes belong together and ascend."""
    selection = everything(TEXTS)
    assert list(selection.hashes) == sorted(selection.hashes)
    assert [document_hash(text) for text in selection.texts] == list(selection.hashes)


@pytest.mark.parametrize("max_bytes", [1, 100, 1000])
def test_sample_is_the_shortest_run_of_smallest_hashes(max_bytes: int) -> None:
    """Documents are taken in order of hash until the bytes are reached, and no further."""
    expected: list[str] = []
    for text in everything(TEXTS).texts:
        if sum(len(taken.encode()) for taken in expected) < max_bytes:
            expected.append(text)
    assert list(everything(TEXTS, max_bytes=max_bytes).texts) == expected


def test_a_limit_above_the_corpus_takes_all() -> None:
    """Too large a limit is no limit."""
    assert everything(TEXTS, max_bytes=10**9) == everything(TEXTS)


def test_copies_are_dropped_and_counted() -> None:
    """Each document comes once, as its longest copy, and its copies are counted; blank texts do not count."""
    selection = everything(["a b", "a  b", "a b", "c", "  "])
    assert sorted(selection.texts) == ["a  b", "c"]
    assert (selection.num_seen, selection.num_duplicates) == (4, 2)


def test_bytes_count_in_utf8() -> None:
    """The limit is in bytes, not in characters."""
    texts = sorted(["é" * 10, "è" * 10], key=document_hash)
    assert everything(texts, max_bytes=20).texts == (texts[0],)
    assert len(everything(texts, max_bytes=21).texts) == 2


def test_excluded_documents_are_dropped_and_counted_once() -> None:
    """Excluded hashes never come back; copies of one count as one, and those of other splits do not count."""
    gone = [document_hash(text) for text in TEXTS[:50]]
    selection = select_documents(TEXTS * 2, split="test", ratios=SplitRatios(), max_bytes=None, exclude=gone)
    assert not set(selection.hashes) & set(gone)
    assert selection.num_excluded == sum(assign_split(digest, SplitRatios()) == "test" for digest in gone) > 0


def test_nothing_gives_nothing() -> None:
    """An empty corpus gives an empty selection."""
    assert everything([]) == Selection((), (), 0, 0, 0)
