"""Statistics add up."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from secateur.records.statistics import BucketStatistics, Moments, SequenceSums, merge_buckets


def doubles(*values: float) -> Tensor:
    """Return a float64 vector."""
    return torch.tensor(values, dtype=torch.float64)


def bucket(scale: int, fingerprint: str, documents: list[int], tokens_per_s: float = 0.0) -> BucketStatistics:
    """Return small made-up sums."""
    return BucketStatistics(
        num_tokens=10 * scale,
        num_blocks=scale,
        token_counts=torch.tensor([scale, 0, 2 * scale]),
        moments={(0, "ffn_channel"): Moments(10 * scale, doubles(scale, -scale), doubles(scale, 5), doubles(1, scale))},
        sequences={(0, "ffn_channel"): SequenceSums(scale, doubles(scale, 7))},
        linear_abs={(0, "ffn_channel.linear0"): doubles(scale, 3)},
        cosine_sum=doubles(scale),
        sublayer_cosine_sum={"attention": doubles(2 * scale), "ffn": doubles(-scale)},
        documents=torch.tensor(documents),
        corpus_fingerprint=fingerprint,
        tokens_per_s=tokens_per_s,
    )


def test_sums_add_and_documents_unite() -> None:
    """Every sum is the sum of both; a document in both shards is one document."""
    both = merge_buckets(bucket(1, "b", [7, 9]), bucket(2, "a", [3, 9]))
    assert (both.num_tokens, both.num_blocks) == (30, 3)
    assert both.token_counts.tolist() == [3, 0, 6]
    moments = both.moments[0, "ffn_channel"]
    assert moments.count == 30
    assert moments.sum.tolist() == [3, -3]
    assert moments.sum_abs.tolist() == [3, 10]
    assert moments.sum_sq.tolist() == [2, 3]
    assert both.linear_abs[0, "ffn_channel.linear0"].tolist() == [3, 6]
    sequences = both.sequences[0, "ffn_channel"]
    assert (sequences.count, sequences.mean_abs_sq.tolist()) == (3, [3, 14])
    assert both.cosine_sum.tolist() == [3]
    assert {kind: total.tolist() for kind, total in both.sublayer_cosine_sum.items()} == {"attention": [6], "ffn": [-3]}
    assert both.documents.tolist() == [3, 7, 9]


def test_the_order_of_merging_leaves_no_trace() -> None:
    """Shards may be merged in any order and grouping."""
    a, b, c = bucket(1, "a", [1]), bucket(2, "b", [2]), bucket(3, "c", [3])
    left = merge_buckets(merge_buckets(a, b), c)
    right = merge_buckets(b, merge_buckets(c, a))
    assert left.corpus_fingerprint == right.corpus_fingerprint == "a+b+c"
    assert torch.equal(left.moments[0, "ffn_channel"].sum_sq, right.moments[0, "ffn_channel"].sum_sq)
    assert torch.equal(left.documents, right.documents)


def test_merging_equal_text_keeps_its_name() -> None:
    """A fingerprint is not repeated."""
    assert merge_buckets(bucket(1, "a", [1]), bucket(1, "a", [2])).corpus_fingerprint == "a"


@pytest.mark.parametrize(
    ("first", "second", "merged"),
    [(10.0, 10.0, 10.0), (10.0, 40.0, 30 / (1 + 0.5)), (10.0, 0.0, 10.0), (0.0, 0.0, 0.0)],
)
def test_speed_is_tokens_over_time(first: float, second: float, merged: float) -> None:
    """Merged speed is all tokens over all seconds, of the shards whose speed is known."""
    both = merge_buckets(bucket(1, "a", [1], first), bucket(2, "b", [2], second))
    assert both.tokens_per_s == pytest.approx(merged)


def test_statistics_of_different_taps_are_not_mixed() -> None:
    """Two models' statistics cannot be added by mistake."""
    first, second = bucket(1, "a", [1]), bucket(1, "b", [2])
    other = replace(second, moments={(1, "ffn_channel"): second.moments[0, "ffn_channel"]})
    with pytest.raises(ValueError, match="different taps"):
        merge_buckets(first, other)
    with pytest.raises(ValueError, match="different taps"):
        merge_buckets(first, replace(second, linear_abs={}))
