"""What one streaming pass over a corpus leaves behind: sums per channel, per token id and per layer.

Everything is a sum over tokens, so statistics of two shards add up to the statistics of both, and any method or budget
is computed from them without a second pass. Sums are float64; padding never enters them.

Dims: ``channels`` inputs of one tapped linear layer, ``vocab`` token ids, ``layers`` decoder layers, ``documents``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import reduce
from typing import Any

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from secateur.records.gradients import GradientStatistics
from secateur.records.gram import BucketGrams
from secateur.records.impacts import ImpactStatistics
from secateur.records.routing import RoutingSums, mix_routing
from secateur.records.units import SiteKey as SiteKey


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


@dataclass(frozen=True, slots=True)
class SequenceSums:
    """Sums over ``count`` sequences of (mean over the sequence's tokens of |x|)^2, one value per channel.

    A sequence is the real tokens of one calibration block.
    """

    count: int
    mean_abs_sq: Float64[Tensor, " channels"]

    def __add__(self, other: SequenceSums) -> SequenceSums:
        return SequenceSums(self.count + other.count, self.mean_abs_sq + other.mean_abs_sq)


@dataclass(frozen=True, slots=True)
class BucketStatistics:
    """Sums over the calibration split of one corpus bucket.

    Attributes:
        num_tokens: real tokens that were run (padding excluded).
        num_blocks: blocks that were run.
        token_counts: how often each token id occurred, indexed by id.
        moments: per tap, sums over the input of the projection that reads the units.
        sequences: at the same taps, sums over blocks instead of tokens.
        linear_abs: per pre-activation tap, the sum of |output| per channel.
        cosine_sum: per layer, the sum over tokens of cos(layer input, layer output).
        sublayer_cosine_sum: for ``attention`` and ``ffn``, per layer, the sum over tokens of the cosine of the residual
            stream before and after the sub-layer; where the two are parallel, of the layer's input without and with it.
        documents: 63-bit hashes of the documents that were run; evaluation excludes them.
        corpus_fingerprint: identifies the calibration text.
        tokens_per_s: speed of the pass (0 where unknown); not part of the sums.
        routing: per mixture-of-experts layer, sums over the tokens sent to each expert; empty in dense models.
    """

    num_tokens: int
    num_blocks: int
    token_counts: Int64[Tensor, " vocab"]
    moments: Mapping[SiteKey, Moments]
    sequences: Mapping[SiteKey, SequenceSums]
    linear_abs: Mapping[SiteKey, Float64[Tensor, " channels"]]
    cosine_sum: Float64[Tensor, " layers"]
    sublayer_cosine_sum: Mapping[str, Float64[Tensor, " layers"]]
    documents: Int64[Tensor, " documents"]
    corpus_fingerprint: str
    tokens_per_s: float = 0.0
    routing: Mapping[SiteKey, RoutingSums] = field(default_factory=dict)

    def layer_influence(self) -> list[float]:
        """Return per layer 1 - mean cosine of its input and output."""
        influence: list[float] = (1 - self.cosine_sum / self.num_tokens).tolist()
        return influence


@dataclass(frozen=True, slots=True)
class Statistics:
    """The statistics of one model on one or more named buckets.

    Attributes:
        model_fingerprint: identifies the exact weights.
        family: name of the model family.
        buckets: per bucket name, its sums.
        versions: package versions that produced them.
        grams: per bucket name, its Gram matrices, where they were asked for.
        gradients: per bucket name, its gradient sums, where they were asked for.
        impacts: per bucket name, what its documents say of the units, where that was asked for.
    """

    model_fingerprint: str
    family: str
    buckets: Mapping[str, BucketStatistics]
    versions: Mapping[str, str] = field(default_factory=dict)
    grams: Mapping[str, BucketGrams] = field(default_factory=dict)
    gradients: Mapping[str, GradientStatistics] = field(default_factory=dict)
    impacts: Mapping[str, ImpactStatistics] = field(default_factory=dict)


def merge_buckets(first: BucketStatistics, second: BucketStatistics) -> BucketStatistics:
    """Return the statistics of both shards together; they must come from the same model and taps."""
    by_tap = ("moments", "linear_abs", "routing")
    if any(getattr(first, name).keys() != getattr(second, name).keys() for name in by_tap):
        raise ValueError("statistics with different taps cannot be merged")
    timed = [bucket for bucket in (first, second) if bucket.tokens_per_s]
    seconds = sum(bucket.num_tokens / bucket.tokens_per_s for bucket in timed)
    texts = {*first.corpus_fingerprint.split("+"), *second.corpus_fingerprint.split("+")}
    return BucketStatistics(
        num_tokens=first.num_tokens + second.num_tokens,
        num_blocks=first.num_blocks + second.num_blocks,
        token_counts=first.token_counts + second.token_counts,
        moments={key: value + second.moments[key] for key, value in first.moments.items()},
        sequences={key: value + second.sequences[key] for key, value in first.sequences.items()},
        linear_abs={key: value + second.linear_abs[key] for key, value in first.linear_abs.items()},
        cosine_sum=first.cosine_sum + second.cosine_sum,
        sublayer_cosine_sum={
            kind: total + second.sublayer_cosine_sum[kind] for kind, total in first.sublayer_cosine_sum.items()
        },
        documents=torch.unique(torch.cat([first.documents, second.documents])),
        corpus_fingerprint="+".join(sorted(texts)),
        tokens_per_s=sum(bucket.num_tokens for bucket in timed) / seconds if seconds else 0.0,
        routing={key: value + second.routing[key] for key, value in first.routing.items()},
    )


def normalised(weights: Mapping[str, int | float]) -> dict[str, float]:
    """Return positive weights of any scale as shares that add up to 1, in the same order."""
    if not weights or not all(0 < weight < float("inf") for weight in weights.values()):
        raise ValueError(f"a mixture needs weights above 0, one at least; got {dict(weights)}")
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def mix_buckets(buckets: Mapping[str, BucketStatistics], weights: Mapping[str, int | float]) -> BucketStatistics:
    """Return the statistics of a mixture: every mean over tokens is the weighted mean of the buckets' means.

    So how much text a bucket has does not matter, only its weight does. Sums are scaled to the count of all buckets
    together; counts of tokens, blocks and token ids are what was run, not weighed, and documents unite. Sums
    with a count of their own (``Moments``, ``SequenceSums``) are weighed by means over that count. Those of experts are
    weighed by each expert's part of the layer's total (``mix_routing``).

    Args:
        buckets: statistics by name; those without a weight are left out.
        weights: by bucket name, above 0, of any scale.

    Raises:
        ValueError: there is no weight, or one is not positive and finite; or the statistics have different taps.
    """
    shares = normalised(weights)
    parts = [buckets[name] for name in shares]
    if len(parts) == 1:
        return parts[0]
    merged = reduce(merge_buckets, parts)
    mixed: dict[str, Any] = {
        entry.name: _mix(
            getattr(merged, entry.name),
            [getattr(part, entry.name) for part in parts],
            [part.num_tokens for part in parts],
            list(shares.values()),
        )
        for entry in fields(BucketStatistics)
    }
    names = sorted(
        f"{share:.9g}*({part.corpus_fingerprint})" for part, share in zip(parts, shares.values(), strict=True)
    )
    return replace(merged, **{**mixed, "corpus_fingerprint": "+".join(names)})


def _mix(merged: Any, parts: Sequence[Any], counts: Sequence[int], shares: Sequence[float]) -> Any:
    """Return ``merged`` with every sum in it, at any depth, replaced by the weighted mean of means times the count.

    Sums are floating-point tensors; everything else, counts among it, stays as merging gave it.
    """
    if isinstance(merged, Mapping):
        return {key: _mix(value, [part[key] for part in parts], counts, shares) for key, value in merged.items()}
    if isinstance(merged, RoutingSums):
        return mix_routing(parts, shares)
    if is_dataclass(merged) and not isinstance(merged, type):
        own = [int(getattr(part, "count", count)) for part, count in zip(parts, counts, strict=True)]
        inner = {f.name: (getattr(merged, f.name), [getattr(part, f.name) for part in parts]) for f in fields(merged)}
        return replace(merged, **{name: _mix(value, old, own, shares) for name, (value, old) in inner.items()})
    if not (isinstance(merged, Tensor) and merged.is_floating_point()):
        return merged
    total = sum(counts)
    # A place that no token of a bucket reached has no mean there, and its sum is zero.
    scaled = [part * (share * total / max(count, 1)) for part, count, share in zip(parts, counts, shares, strict=True)]
    return torch.stack(scaled).sum(0)
