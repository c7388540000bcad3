"""Sets of hashes in arrays are sets."""

from __future__ import annotations

import random

import numpy as np
import pytest

from secateur.corpus.hashes import DocumentHashes, HashSet


@pytest.mark.parametrize("num_latest", [1, 3, 1000])
def test_a_hash_set_is_a_set(num_latest: int) -> None:
    """It knows what it has met, wherever it keeps it, and gives it back in order."""
    draw = random.Random(1)
    pool = [0, 2**63 - 1, *(draw.getrandbits(63) for _ in range(40))]
    met: set[int] = set()
    hashes = HashSet(num_latest)
    for digest in draw.choices(pool, k=200):
        assert hashes.add(digest) is (digest not in met)
        met.add(digest)
    assert len(hashes) == len(met)
    assert hashes.hashes().tolist() == sorted(met)
    assert hashes.hashes().dtype.itemsize == 8


def test_document_hashes_are_a_set() -> None:
    """Made of arrays, of numbers and of another one; each hash is there once, in order."""
    first = DocumentHashes(np.array([5, 1, 5]), {2**63 - 1, 0})
    both = DocumentHashes(first, [7], np.empty(0, dtype=np.int64))
    assert list(first) == [0, 1, 5, 2**63 - 1] and len(first) == 4
    assert list(both) == [0, 1, 5, 7, 2**63 - 1]
    assert [digest in both for digest in (0, 5, 7, 2**63 - 1, 2, 6, "5")] == [True] * 4 + [False] * 3
    assert DocumentHashes.of(both) is both and DocumentHashes.of([1, 0, 5, 2**63 - 1]) == first != both
    assert not len(DocumentHashes()) and 0 not in DocumentHashes()
