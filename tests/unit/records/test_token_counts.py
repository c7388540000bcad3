"""Counts of two shards add up."""

from __future__ import annotations

import pytest
import torch

from secateur.records.token_counts import TokenCounts, merge_token_counts


def counts(values: list[int], documents: list[int], fingerprint: str) -> TokenCounts:
    """Return made-up counts, two bytes per token."""
    return TokenCounts(
        counts=torch.tensor(values),
        num_tokens=sum(values),
        num_bytes=2 * sum(values),
        num_documents=len(documents),
        documents=torch.tensor(documents, dtype=torch.int64),
        fingerprint=fingerprint,
    )


FIRST, SECOND = counts([1, 0, 4], [3, 9], "b"), counts([2, 5, 0], [1], "a")


def test_counts_add_up() -> None:
    """Every sum is the sum of both, documents are those of either, and the order does not matter."""
    for merged in (merge_token_counts(FIRST, SECOND), merge_token_counts(SECOND, FIRST)):
        assert merged.counts.tolist() == [3, 5, 4]
        assert (merged.num_tokens, merged.num_bytes, merged.num_documents) == (12, 24, 3)
        assert merged.documents.tolist() == [1, 3, 9]
        assert merged.fingerprint == "a+b"


def test_a_document_of_both_shards_is_one_document() -> None:
    """Shards that overlap count their tokens twice, but a document is one."""
    merged = merge_token_counts(FIRST, counts([1, 1, 1], [9, 10], "b"))
    assert merged.documents.tolist() == [3, 9, 10]
    assert merged.num_documents == 3
    assert merged.num_tokens == 8
    assert merged.fingerprint == "b"


def test_merging_is_associative() -> None:
    """Three shards in any grouping are the same."""
    third = counts([0, 0, 1], [], "c")
    left = merge_token_counts(merge_token_counts(FIRST, SECOND), third)
    right = merge_token_counts(FIRST, merge_token_counts(SECOND, third))
    assert left.fingerprint == right.fingerprint == "a+b+c"
    assert left.counts.tolist() == right.counts.tolist()


def test_other_vocabularies_do_not_merge() -> None:
    """Counts over vocabularies of different size are of different models."""
    with pytest.raises(ValueError, match="counts of 3 and of 2 token ids cannot be merged"):
        merge_token_counts(FIRST, counts([1, 1], [4], "a"))
