"""Which documents belong to which split, decided by each document's own hash; it reads no corpus files."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

from secateur.corpus.gathering import MEMORY_BYTES, Gathered, Gathering
from secateur.corpus.hashes import DocumentHashes, HashSet
from secateur.recipe import SplitRatios

Split = Literal["calibration", "validation", "test"]
SPLITS: tuple[Split, ...] = ("calibration", "validation", "test")


@dataclass(frozen=True, slots=True)
class Selection:
    """The documents taken for one split.

    Attributes:
        texts: the documents, in ascending order of hash.
        hashes: their hashes, each once.
        num_seen: documents looked at, of all splits, copies included; blank ones do not count.
        num_duplicates: copies of the taken documents that were dropped.
        num_excluded: different documents of this split that were dropped because they were to be excluded.
    """

    texts: tuple[str, ...]
    hashes: tuple[int, ...]
    num_seen: int
    num_duplicates: int
    num_excluded: int


@dataclass(frozen=True, slots=True)
class GatheredSplit:
    """The documents taken for one split, wherever they are.

    Attributes:
        documents: in ascending order of hash; they can be gone through several times, one after another.
        num_documents: how many they are.
        num_seen: as in ``Selection``, and so are the others.
        num_duplicates: copies of the taken documents that were dropped.
        num_excluded: different documents of this split that were to be excluded.
    """

    documents: Iterable[Gathered]
    num_documents: int
    num_seen: int
    num_duplicates: int
    num_excluded: int


def document_hash(text: str) -> int:
    """Return the 63-bit hash of a document; texts that differ only in white space or Unicode form share it."""
    canonical = " ".join(unicodedata.normalize("NFC", text).split())
    return int.from_bytes(hashlib.blake2b(canonical.encode(), digest_size=8).digest(), "big") >> 1


def assign_split(digest: int, ratios: SplitRatios) -> Split:
    """Return the split of a document.

    The hash is hashed again with a salt, so that the smallest hashes, which are what a limited sample takes, fall
    into the splits like all others.

    Args:
        digest: the document's hash.
        ratios: share of each split.
    """
    salted = hashlib.blake2b(digest.to_bytes(8, "big"), digest_size=8, person=b"secateur-split").digest()
    position = int.from_bytes(salted, "big") / 2**64
    if position < ratios.calibration:
        return "calibration"
    return "validation" if position < ratios.calibration + ratios.validation else "test"


def gather_documents(
    documents: Iterable[str],
    *,
    split: Split,
    ratios: SplitRatios | None,
    max_bytes: int | None,
    exclude: Collection[int] = (),
    memory_bytes: int = MEMORY_BYTES,
) -> GatheredSplit:
    """Return the documents of a split, each once, to be read in ascending order of hash.

    One pass. The result does not depend on the order of the documents. Of texts that share a hash the longest is
    taken. Memory is bounded by ``memory_bytes``, by eight bytes for each excluded document, and by one document.

    Args:
        documents: all documents of the corpus; blank ones are passed over.
        split: the one wanted.
        ratios: share of each split; None takes every document, for text that was split by its owner.
        max_bytes: takes the documents with the smallest hashes, as few as reach this many bytes of UTF-8 (at
            least 1); None takes all.
        exclude: hashes of documents that must not be taken.
        memory_bytes: of text that stays in memory; more goes to temporary files.

    Raises:
        CorpusError: there is no room for those files.
    """
    excluded = DocumentHashes.of(exclude)
    gathering = Gathering(max_bytes, memory_bytes)
    met_excluded = HashSet()
    num_seen = 0
    for text in documents:
        if not text.strip():
            continue
        num_seen += 1
        digest = document_hash(text)
        if ratios is not None and assign_split(digest, ratios) != split:
            continue
        if digest in excluded:
            met_excluded.add(digest)
            continue
        gathering.add(digest, text)
    num_documents, num_duplicates = gathering.close()
    return GatheredSplit(gathering, num_documents, num_seen, num_duplicates, len(met_excluded))


def select_documents(
    documents: Iterable[str],
    *,
    split: Split,
    ratios: SplitRatios | None,
    max_bytes: int | None,
    exclude: Collection[int] = (),
) -> Selection:
    """Return what ``gather_documents`` gives as lists in memory, for text that fits there."""
    found = gather_documents(documents, split=split, ratios=ratios, max_bytes=max_bytes, exclude=exclude)
    taken = list(found.documents)
    return Selection(
        texts=tuple(document.text for document in taken),
        hashes=tuple(document.digest for document in taken),
        num_seen=found.num_seen,
        num_duplicates=found.num_duplicates,
        num_excluded=found.num_excluded,
    )
