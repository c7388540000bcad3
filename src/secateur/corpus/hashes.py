"""Sets of document hashes at eight bytes each, for corpora of many millions of documents; pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator

import numpy as np
from jaxtyping import Int64

_LATEST_HASHES = 1 << 16


class HashSet:
    """The hashes met so far, at eight bytes each.

    They are one sorted array; only the latest are a set, which is merged into the array when it is large.
    """

    def __init__(self, num_latest: int = _LATEST_HASHES) -> None:
        self._num_latest = num_latest
        self._sorted = np.empty(0, dtype=np.int64)
        self._latest: set[int] = set()

    def __len__(self) -> int:
        return len(self._sorted) + len(self._latest)

    def add(self, digest: int) -> bool:
        """Add a hash; return whether it is new."""
        if digest in self._latest or _holds(self._sorted, digest):
            return False
        self._latest.add(digest)
        if len(self._latest) >= self._num_latest:
            self._merge()
        return True

    def hashes(self) -> Int64[np.ndarray, " documents"]:
        """Return all of them, ascending."""
        self._merge()
        return self._sorted

    def _merge(self) -> None:
        latest = np.fromiter(self._latest, dtype=np.int64, count=len(self._latest))
        merged = np.concatenate([self._sorted, np.sort(latest)])
        merged.sort(kind="stable")  # both parts are sorted runs, which a stable sort only merges
        self._sorted = merged
        self._latest = set()


class DocumentHashes(Collection[int]):
    """A set of hashes that does not change; it goes through them in ascending order.

    Args:
        parts: hashes, as arrays or as any numbers; those that are there twice count once.
    """

    def __init__(self, *parts: Int64[np.ndarray, " _"] | Iterable[int]) -> None:
        arrays = [_array(part) for part in parts]
        self._sorted = np.unique(np.concatenate(arrays)) if arrays else np.empty(0, dtype=np.int64)

    @classmethod
    def of(cls, hashes: Collection[int]) -> DocumentHashes:
        """Return a collection of hashes as such a set; one that is one already as it is."""
        return hashes if isinstance(hashes, DocumentHashes) else cls(hashes)

    def __contains__(self, digest: object) -> bool:
        return isinstance(digest, int) and _holds(self._sorted, digest)

    def __iter__(self) -> Iterator[int]:
        return (int(digest) for digest in self._sorted)

    def __len__(self) -> int:
        return len(self._sorted)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DocumentHashes) and np.array_equal(self._sorted, other._sorted)


def _array(part: Int64[np.ndarray, " _"] | Iterable[int]) -> Int64[np.ndarray, " _"]:
    if isinstance(part, DocumentHashes):
        return part._sorted
    return part if isinstance(part, np.ndarray) else np.fromiter(part, dtype=np.int64)


def _holds(ascending: Int64[np.ndarray, " _"], digest: int) -> bool:
    place = int(np.searchsorted(ascending, digest))
    return place < len(ascending) and int(ascending[place]) == digest
