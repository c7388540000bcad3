"""Which documents belong to which split, decided by each document's own hash; pure, it reads no files."""

from __future__ import annotations

import hashlib
import heapq
import unicodedata
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Literal

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


@dataclass(slots=True)
class _Kept:
    text: str
    num_bytes: int
    num_copies: int


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


def select_documents(
    documents: Iterable[str],
    *,
    split: Split,
    ratios: SplitRatios | None,
    max_bytes: int | None,
    exclude: Collection[int] = (),
) -> Selection:
    """Return the documents of a split, each once, in ascending order of hash.

    One pass. The result does not depend on the order of the documents. Of texts that share a hash the longest is
    taken. Memory is bounded by ``max_bytes`` and one document.

    Args:
        documents: all documents of the corpus; blank ones are passed over.
        split: the one wanted.
        ratios: share of each split; None takes every document, for text that was split by its owner.
        max_bytes: takes the documents with the smallest hashes, as few as reach this many bytes of UTF-8 (at
            least 1); None takes all.
        exclude: hashes of documents that must not be taken.
    """
    excluded = frozenset(exclude)
    kept: dict[int, _Kept] = {}
    largest_first: list[int] = []  # negated hashes: heapq keeps the smallest on top
    met_excluded: set[int] = set()
    num_seen = num_bytes = 0
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
        size = len(text.encode())
        if digest in kept:
            num_bytes += _add_copy(kept[digest], text, size)
        else:
            kept[digest] = _Kept(text, size, 0)
            heapq.heappush(largest_first, -digest)
            num_bytes += size
        while max_bytes is not None and num_bytes - kept[-largest_first[0]].num_bytes >= max_bytes:
            num_bytes -= kept.pop(-heapq.heappop(largest_first)).num_bytes
    hashes = tuple(sorted(kept))
    return Selection(
        texts=tuple(kept[digest].text for digest in hashes),
        hashes=hashes,
        num_seen=num_seen,
        num_duplicates=sum(document.num_copies for document in kept.values()),
        num_excluded=len(met_excluded),
    )


def _add_copy(kept: _Kept, text: str, size: int) -> int:
    """Count a copy in ``kept``, keep the longer text there, and return by how many bytes it grew.

    A size that only grows keeps the selection independent of order: what was once too much stays too much.
    """
    growth = max(size - kept.num_bytes, 0)
    kept.text = max((kept.num_bytes, kept.text), (size, text))[1]
    kept.num_bytes += growth
    kept.num_copies += 1
    return growth
