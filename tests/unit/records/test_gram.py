"""Gram matrices mix and merge site by site."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from secateur.records.gram import Grams, GramsInMemory, MixedGrams, SummedGrams, effective_tokens, merge_grams
from secateur.records.statistics import SiteKey

SITES: list[SiteKey] = [(0, "ffn_channel"), (1, "gqa_group")]


def rows(tokens: int, seed: int) -> Tensor:
    """Return activations of three channels."""
    return torch.randn(tokens, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def of(x: Tensor) -> GramsInMemory:
    """Return the Gram matrices of activations, larger in the second site."""
    return GramsInMemory(x.shape[0], {site: (factor + 1) * x.T @ x for factor, site in enumerate(SITES)})


def test_all_kinds_are_grams() -> None:
    """Whoever reads them need not know where they lie or how they come about."""
    a = of(rows(4, 0))
    for grams in (a, MixedGrams([a], [1.0]), merge_grams(a, a)):
        assert isinstance(grams, Grams)


@pytest.mark.parametrize("site", SITES)
def test_merged_shards_are_the_sums_of_all_tokens(site: SiteKey) -> None:
    """Adding up is exact, in any order, and also for sums of sums."""
    a, b, c = rows(4, 0), rows(7, 1), rows(1, 2)
    merged = merge_grams(merge_grams(of(a), of(b)), of(c))
    assert isinstance(merged, SummedGrams)
    assert merged.count == 12
    torch.testing.assert_close(merged.load(site), of(torch.cat([c, a, b])).load(site))
    assert torch.equal(merge_grams(of(a), of(b)).load(site), merge_grams(of(b), of(a)).load(site))


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_a_mixture_is_linear_in_its_weights(site: SiteKey, weight: float) -> None:
    """Its mean per token is the weighted mean of the texts' means, whatever their lengths."""
    a, b = of(rows(4, 0)), of(rows(12, 1))
    mixed = MixedGrams([a, b], [weight, 1 - weight])
    assert mixed.count == 16
    expected = weight * a.load(site) / 4 + (1 - weight) * b.load(site) / 12
    torch.testing.assert_close(mixed.load(site) / mixed.count, expected)


def test_a_mixture_by_length_is_the_sum() -> None:
    """Weights in proportion to the tokens treat every token alike."""
    a, b, c = of(rows(4, 0)), of(rows(12, 1)), of(rows(16, 2))
    mixed = MixedGrams([a, b, c], [4 / 32, 12 / 32, 16 / 32])
    torch.testing.assert_close(mixed.load(SITES[0]), merge_grams(merge_grams(a, b), c).load(SITES[0]))


def test_mixing_and_merging_change_no_part() -> None:
    """The matrices in memory are read only."""
    a, b = of(rows(4, 0)), of(rows(12, 1))
    before = a.load(SITES[0]).clone()
    MixedGrams([a, b], [0.5, 0.5]).load(SITES[0])
    MixedGrams([a], [1.0]).load(SITES[0]).zero_()
    merge_grams(a, b).load(SITES[0]).zero_()
    assert torch.equal(a.load(SITES[0]), before)


def test_parts_without_weights_are_refused() -> None:
    """A forgotten weight is not taken for zero."""
    with pytest.raises(ValueError, match="zip"):
        MixedGrams([of(rows(4, 0)), of(rows(12, 1))], [1.0]).load(SITES[0])


def test_a_mixture_says_less_the_more_unequal_its_weights() -> None:
    """Effective tokens are all tokens where weights follow the lengths, and give the variance of a weighted mean."""
    assert effective_tokens([300, 100], [0.75, 0.25]) == pytest.approx(400)
    assert effective_tokens([300, 100], [0.5, 0.5]) == pytest.approx(300)
    assert effective_tokens([300], [1.0]) == pytest.approx(300)
    draws = torch.randn(20_000, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mean = 0.9 * draws[:, :30].mean(1) + 0.1 * draws[:, 30:].mean(1)
    assert 1 / float(mean.var()) == pytest.approx(effective_tokens([30, 10], [0.9, 0.1]), rel=0.03)
