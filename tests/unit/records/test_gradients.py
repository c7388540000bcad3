"""Gradient sums of several texts add up, or are weighed by their means."""

from __future__ import annotations

import pytest
import torch

from secateur.records.gradients import SUMS, GradientStatistics, UnitGradients, merge_gradients

SITE = (0, "ffn_channel")


def text(tokens: int, count: int, value: float) -> GradientStatistics:
    """Return gradients whose means over sequences are ``value``, twice it, and so on."""
    sums = {name: torch.tensor([(i + 1) * value * count], dtype=torch.float64) for i, name in enumerate(SUMS)}
    return GradientStatistics(tokens, {SITE: UnitGradients(count, **sums)})


@pytest.mark.parametrize(("shares", "mean"), [(None, (2 * 1.0 + 8 * 6.0) / 10), ([0.9, 0.1], 0.9 * 1.0 + 0.1 * 6.0)])
def test_means_are_of_all_sequences_or_weighed_by_text(shares: list[float] | None, mean: float) -> None:
    """Without shares every sequence counts the same; with them, every text's mean counts by its share."""
    merged = merge_gradients([text(10, 2, 1.0), text(30, 8, 6.0)], shares)
    units = merged.units[SITE]
    assert (merged.num_tokens, units.count) == (40, 10)
    for i, name in enumerate(SUMS):
        assert float(getattr(units, name)) / units.count == pytest.approx((i + 1) * mean)


def test_one_text_is_itself_and_other_sites_are_refused() -> None:
    """Gradients of different models cannot be added by mistake."""
    assert torch.equal(merge_gradients([text(5, 1, 0.3)]).units[SITE].mask_sq, text(5, 1, 0.3).units[SITE].mask_sq)
    with pytest.raises(ValueError, match="different sites"):
        merge_gradients([text(5, 1, 0.3), GradientStatistics(5, {})])
