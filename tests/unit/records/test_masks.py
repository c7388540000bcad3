"""Masks of several texts add up to their mean, by weight."""

from __future__ import annotations

import pytest
import torch

from secateur.records.masks import MaskStatistics, MaskStep, merge_masks


def masks(values: list[float], tokens: int, removed: float, layer: int = 0) -> MaskStatistics:
    """Return the masks of one layer's units after one step."""
    units = {(layer, "ffn_channel"): torch.tensor(values, dtype=torch.float64)}
    return MaskStatistics(tokens, removed, units, (MaskStep(2.0, 0.0, 0.1),))


def test_probabilities_are_averaged() -> None:
    """Every text counts the same, or by its share; a single text stays as it is, its steps too."""
    one, two = masks([0.0, 1.0], 10, 0.2), masks([1.0, 0.6], 30, 0.4)
    both = merge_masks([one, two])
    assert both.units[0, "ffn_channel"].tolist() == [0.5, 0.8] and both.num_tokens == 40
    assert both.removed == pytest.approx(0.3) and both.steps == ()
    assert merge_masks([one, two], [0.75, 0.25]).units[0, "ffn_channel"].tolist() == [0.25, 0.9]
    assert merge_masks([one]) is one


def test_other_sites_are_refused() -> None:
    """Masks of different kinds or layers are not those of one model."""
    with pytest.raises(ValueError, match="different sites"):
        merge_masks([masks([1.0], 1, 0.0), masks([1.0], 1, 0.0, layer=1)])
