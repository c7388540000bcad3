"""What one streaming pass over a corpus leaves behind: sums per channel, per token id and per layer.

Everything is a sum over tokens, so statistics of two shards add up to the statistics of both, and any method or budget
is computed from them without a second pass. Sums are float64; padding never enters them.

Dims: ``channels`` inputs of one tapped linear layer, ``vocab`` token ids, ``layers`` decoder layers, ``documents``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float64, Int64
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Moments:
    """Sums over ``count`` tokens of x, |x| and x^2, one value per channel."""

    count: int
    sum: Float64[Tensor, " channels"]
    sum_abs: Float64[Tensor, " channels"]
    sum_sq: Float64[Tensor, " channels"]

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.count + other.count,
            self.sum + other.sum,
            self.sum_abs + other.sum_abs,
            self.sum_sq + other.sum_sq,
        )


SiteKey = tuple[int, str]
"""(layer, tap name): where in the model a statistic was taken."""


@dataclass(frozen=True, slots=True)
class BucketStatistics:
    """Sums over the calibration split of one corpus bucket.

    Attributes:
        num_tokens: real tokens that were run (padding excluded).
        num_blocks: blocks that were run.
        token_counts: how often each token id occurred, indexed by id.
        moments: per tap, sums over the input of the projection that reads the units.
        linear_abs: per pre-activation tap, the sum of |output| per channel.
        cosine_sum: per layer, the sum over tokens of cos(layer input, layer output).
        documents: 63-bit hashes of the documents that were run; evaluation excludes them.
        corpus_fingerprint: identifies the calibration text.
        tokens_per_s: speed of the pass (0 where unknown); not part of the sums.
    """

    num_tokens: int
    num_blocks: int
    token_counts: Int64[Tensor, " vocab"]
    moments: Mapping[SiteKey, Moments]
    linear_abs: Mapping[SiteKey, Float64[Tensor, " channels"]]
    cosine_sum: Float64[Tensor, " layers"]
    documents: Int64[Tensor, " documents"]
    corpus_fingerprint: str
    tokens_per_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Statistics:
    """The statistics of one model on one or more named buckets.

    Attributes:
        model_fingerprint: identifies the exact weights.
        family: name of the model family.
        buckets: per bucket name, its sums.
        versions: package versions that produced them.
    """

    model_fingerprint: str
    family: str
    buckets: Mapping[str, BucketStatistics]
    versions: Mapping[str, str] = field(default_factory=dict)


def merge_buckets(first: BucketStatistics, second: BucketStatistics) -> BucketStatistics:
    """Return the statistics of both shards together; they must come from the same model and taps."""
    if first.moments.keys() != second.moments.keys() or first.linear_abs.keys() != second.linear_abs.keys():
        raise ValueError("statistics with different taps cannot be merged")
    timed = [bucket for bucket in (first, second) if bucket.tokens_per_s]
    seconds = sum(bucket.num_tokens / bucket.tokens_per_s for bucket in timed)
    texts = {*first.corpus_fingerprint.split("+"), *second.corpus_fingerprint.split("+")}
    return BucketStatistics(
        num_tokens=first.num_tokens + second.num_tokens,
        num_blocks=first.num_blocks + second.num_blocks,
        token_counts=first.token_counts + second.token_counts,
        moments={key: value + second.moments[key] for key, value in first.moments.items()},
        linear_abs={key: value + second.linear_abs[key] for key, value in first.linear_abs.items()},
        cosine_sum=first.cosine_sum + second.cosine_sum,
        documents=torch.unique(torch.cat([first.documents, second.documents])),
        corpus_fingerprint="+".join(sorted(texts)),
        tokens_per_s=sum(bucket.num_tokens for bucket in timed) / seconds if seconds else 0.0,
    )
