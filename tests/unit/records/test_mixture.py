"""A mixture of texts: means are weighted means, whatever the texts' lengths; checked on every field of real sums."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import secateur
from secateur.records.statistics import BucketStatistics, Statistics, merge_buckets, mix_buckets, normalised
from secateur.store.artifacts import statistics_digest
from tests.pico import general_paragraphs, medical_records, pico_tokenizer, random_model


@pytest.fixture(scope="module")
def buckets() -> Mapping[str, BucketStatistics]:
    """The statistics of a short and a long text on one model."""
    tokenizer = pico_tokenizer()
    texts = {"long": general_paragraphs(300), "short": [str(record) for record in medical_records(80)]}
    sizes = {"long": 1024, "short": 384}
    model = random_model(len(tokenizer))
    found: dict[str, BucketStatistics] = {}
    for name, text in texts.items():
        taken: Statistics = secateur.calibrate(model, tokenizer, text, max_tokens=sizes[name], block_size=64)
        found[name] = taken.buckets["domain"]
    return found


def means(value: Any, count: int, place: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield every mean in some statistics with its place: floating-point sums over the nearest count."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from means(inner, count, f"{place}[{key}]")
    elif is_dataclass(value):
        own = getattr(value, "count", getattr(value, "num_tokens", count))
        for entry in fields(value):
            yield from means(getattr(value, entry.name), own, f"{place}.{entry.name}")
    elif isinstance(value, Tensor) and value.is_floating_point():
        yield place, value / count


def test_every_mean_is_the_weighted_mean(buckets: Mapping[str, BucketStatistics]) -> None:
    """In every field, over the count that the field has, at weights of any scale."""
    mixed = mix_buckets(buckets, {"short": 4, "long": 1.0})
    parts = {name: dict(means(bucket, 0)) for name, bucket in buckets.items()}
    found = dict(means(mixed, 0))
    assert {".moments[(0, 'ffn_channel')].sum_sq", ".cosine_sum", ".linear_abs[(1, 'ffn_channel.linear0')]"} <= set(
        found
    )
    for place, mean in found.items():
        torch.testing.assert_close(mean, 0.8 * parts["short"][place] + 0.2 * parts["long"][place], msg=place)


def test_counts_are_of_what_was_run(buckets: Mapping[str, BucketStatistics]) -> None:
    """Tokens, blocks, token ids and documents are not weighed, and neither is a count beside a sum."""
    mixed, merged = mix_buckets(buckets, {"short": 0.9, "long": 0.1}), merge_buckets(*buckets.values())
    for name in ("num_tokens", "num_blocks"):
        assert getattr(mixed, name) == getattr(merged, name)
    for name in ("token_counts", "documents"):
        assert torch.equal(getattr(mixed, name), getattr(merged, name))
    assert {key: part.count for key, part in mixed.moments.items()} == {k: p.count for k, p in merged.moments.items()}


def test_more_of_the_same_text_changes_no_mean(buckets: Mapping[str, BucketStatistics]) -> None:
    """A bucket counts by its weight: the same tokens twice are the same text."""
    weights = {"short": 0.5, "long": 0.5}
    twice = {**buckets, "short": merge_buckets(buckets["short"], buckets["short"])}
    first, second = (dict(means(mix_buckets(these, weights), 0)) for these in (buckets, twice))
    for place, mean in first.items():
        torch.testing.assert_close(mean, second[place], msg=place)


def test_weights_by_length_give_the_merged_sums(buckets: Mapping[str, BucketStatistics]) -> None:
    """Where every token counts the same, mixing is adding; for sums over blocks, where every block has as many."""
    mixed = mix_buckets(buckets, {name: bucket.num_tokens for name, bucket in buckets.items()})
    merged = merge_buckets(*buckets.values())
    torch.testing.assert_close(mixed.cosine_sum, merged.cosine_sum)
    for site, moments in merged.moments.items():
        torch.testing.assert_close(mixed.moments[site].sum_abs, moments.sum_abs)


def test_a_mixture_of_one_text_is_that_text(buckets: Mapping[str, BucketStatistics]) -> None:
    """To the last bit, whatever its weight."""
    assert mix_buckets(buckets, {"short": 0.3}) is buckets["short"]


def test_identities_follow_the_shares(buckets: Mapping[str, BucketStatistics]) -> None:
    """Other shares are other statistics; another scale or order of the same shares is not."""
    same = [{"short": 4, "long": 1}, {"long": 0.2, "short": 0.8}]
    first, second = (mix_buckets(buckets, weights) for weights in same)
    other = mix_buckets(buckets, {"short": 0.8, "long": 0.21})
    assert first.corpus_fingerprint == second.corpus_fingerprint != other.corpus_fingerprint
    assert first.corpus_fingerprint != merge_buckets(*buckets.values()).corpus_fingerprint
    assert statistics_digest(first) != statistics_digest(other)


def test_parts_are_left_alone(buckets: Mapping[str, BucketStatistics]) -> None:
    """Sums in memory are read only."""
    before = {place: mean.clone() for place, mean in means(buckets["short"], 0)}
    mix_buckets(buckets, {"short": 0.5, "long": 0.5})
    for place, mean in means(buckets["short"], 0):
        assert torch.equal(mean, before[place]), place


@pytest.mark.parametrize("weights", [{}, {"short": 0.0}, {"short": -1.0, "long": 2.0}, {"short": float("nan")}])
def test_weights_that_are_none_are_refused(weights: dict[str, float]) -> None:
    """A bucket that is not to count is left out, not weighed by nothing."""
    with pytest.raises(ValueError, match="weights above 0"):
        normalised(weights)
