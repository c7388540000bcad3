"""Masks of several texts add up to their mean, by weight."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from secateur.records.masks import LowRank, MaskStatistics, MaskStep, merge_masks


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


def test_masks_with_weights_of_their_own_are_not_averaged() -> None:
    """Two trainings of the weights are two models; one text keeps its own."""
    plain, adapted = masks([1.0], 1, 0.0), replace(masks([0.5], 1, 0.0), adapters=LowRank(1.0, {}))
    assert merge_masks([adapted]).adapters is not None
    with pytest.raises(ValueError, match="adapters of their own cannot be merged"):
        merge_masks([plain, adapted])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_what_was_learned_is_added_to_its_weight_alone(dtype: torch.dtype) -> None:
    """W + scale B A, in either layout, computed in float32 at least and rounded once; biases and others stay."""
    first, second = torch.randn(2, 5, dtype=torch.float64), torch.randn(3, 2, dtype=torch.float64)
    weight = torch.randn(3, 5).to(dtype)
    change = LowRank(0.5, {"layers.0.up": (first, second)})
    wide = torch.promote_types(dtype, torch.float32)
    expected = (weight.to(wide) + 0.5 * (second.to(wide) @ first.to(wide))).to(dtype)
    assert torch.equal(change.merged("layers.0.up.weight", weight, "out_in"), expected)
    turned = change.merged("layers.0.up.weight", weight.T.contiguous(), "in_out")
    torch.testing.assert_close(turned, expected.T)
    for name in ("layers.0.up.bias", "layers.1.up.weight", "layers.0.up"):
        assert change.merged(name, weight, "out_in") is weight
