"""Ranks, maxima and histograms over documents are what their definitions say."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.records.impacts import RANK_BINS, competition_ranks, judged, judged_alike


def impacts(documents: int = 200, units: int = 50) -> Tensor:
    """Return made-up impacts, some of them equal."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 40, (documents, units), generator=generator).double()


def test_ranks_count_the_smaller_and_ties_share_the_lowest() -> None:
    """Against counting."""
    values = impacts(5)
    expected = (values[:, :, None] > values[:, None, :]).sum(2) + 1
    assert torch.equal(competition_ranks(values), expected)
    assert judged_alike(4).rank_max.tolist() == [0.25] * 4


def test_a_maximum_says_what_is_low_on_every_document() -> None:
    """For any share, a unit's largest rank is at most it exactly if its rank is on each document."""
    values = impacts(9)
    ranks, found = competition_ranks(values) / values.shape[1], judged(values)
    for share in (0.1, 0.5, 0.92):
        assert torch.equal(found.rank_max <= share, (ranks <= share).all(0))
        assert torch.equal(found.impact_max <= 40 * share, (values <= 40 * share).all(0))


def test_histograms_hold_every_document_in_its_bin() -> None:
    """Bin k is above k / bins up to (k + 1) / bins."""
    values = impacts(30)
    ranks, found = competition_ranks(values) / values.shape[1], judged(values)
    for k in range(RANK_BINS):
        inside = (ranks > k / RANK_BINS) & (ranks <= (k + 1) / RANK_BINS)
        assert torch.equal(found.rank_counts[:, k], inside.sum(0))


def test_quantiles_are_at_most_a_bin_off() -> None:
    """And all documents is the maximum."""
    values = impacts()
    ranks, found = competition_ranks(values) / values.shape[1], judged(values)
    for share in (0.25, 0.9):
        exact = ranks.sort(0).values[int(share * len(values)) - 1]
        assert float((found.rank_quantile(share) - exact).abs().max()) <= 1 / RANK_BINS
    assert torch.equal(found.rank_quantile(1.0), found.rank_max)


def test_records_of_shards_add_up() -> None:
    """Documents in any order and any portions."""
    values = impacts(20)
    together, parts = judged(values), judged(values[12:]) + judged(values[:12])
    for name in ("impact_max", "rank_max", "rank_counts"):
        assert torch.equal(getattr(together, name), getattr(parts, name))
    torch.testing.assert_close(together.impact_sq, parts.impact_sq)
    torch.testing.assert_close(together.rank_sum, parts.rank_sum)
