"""Counting: how many units stay, with every rounding and every refusal."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.allocate.counts import (
    floor_count,
    global_counts,
    keep_best,
    round_to_multiple,
    standardised,
    threshold_counts,
    uniform_count,
)
from secateur.errors import PlanError


def vector(*values: float) -> Tensor:
    """Return a float64 vector."""
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("count", "multiple", "limit", "rounded"),
    [(50, 1, 64, 50), (48, 32, 64, 64), (50, 32, 64, 64), (47, 32, 64, 32), (1, 32, 64, 32),
     (0, 8, 64, 8), (0, 8, 4, 4), (63, 32, 60, 60)],
)  # fmt: skip
def test_rounding_to_a_multiple(count: int, multiple: int, limit: int, rounded: int) -> None:
    """The nearest multiple, halves up, at least one multiple, at most the limit."""
    assert round_to_multiple(count, multiple, limit=limit) == rounded


@pytest.mark.parametrize(
    ("num_units", "ratio", "floor"), [(64, 0.1, 7), (100, 0.07, 7), (3, 0.1, 1), (10, 0.5, 5), (1, 0.99, 1)]
)
def test_a_floor_is_rounded_up(num_units: int, ratio: float, floor: int) -> None:
    """A layer never keeps less than the share, and float noise does not add a unit (100 * 0.07 is above 7)."""
    assert floor_count(num_units, ratio) == floor


def test_the_best_units_stay_in_order() -> None:
    """Indices ascend, whatever the order of the scores."""
    assert keep_best(vector(0.1, 0.9, 0.5, 0.7), 2) == (1, 3)
    assert keep_best(vector(0.1, 0.9), 2) == (0, 1)


def test_among_equals_the_lower_index_stays() -> None:
    """Ties are broken the same way on every machine, also in long vectors."""
    assert keep_best(vector(1, 1, 1, 1), 2) == (0, 1)
    assert keep_best(vector(0, 1, 0, 1, 0), 3) == (0, 1, 3)
    assert keep_best(torch.zeros(5000, dtype=torch.float64), 2500) == tuple(range(2500))


def count(ratio: float, num_units: int, multiple: int = 1, **changes: Any) -> int:
    """Return the uniform count of FFN channels, everything allowed."""
    fields: dict[str, Any] = {"multiple": multiple, "kind": "ffn_channel", "is_allowed": lambda _: True, **changes}
    return uniform_count(ratio, num_units, **fields)


@pytest.mark.parametrize(
    ("ratio", "num_units", "multiple", "kept"),
    [(0.1, 100, 1, 90), (0.5, 3, 1, 2), (1 / 3, 3, 1, 2), (0.1, 1536, 32, 1376), (0.99, 100, 1, 1), (0.5, 96, 32, 64)],
)
def test_a_ratio_becomes_a_count(ratio: float, num_units: int, multiple: int, kept: int) -> None:
    """What stays is rounded to the nearest multiple, halves towards keeping."""
    assert count(ratio, num_units, multiple) == kept


def test_a_ratio_that_rounds_to_nothing_is_refused() -> None:
    """The message names ratio, units and multiple, and lists counts that can be had."""
    with pytest.raises(PlanError) as caught:
        count(0.01, 160, 32)
    assert str(caught.value) == (
        "removing 0.01 of 160 ffn_channels rounds to none (kept counts are multiples of 32). Allowed counts to keep: "
        "128 (ratio 0.2), 96 (ratio 0.4), 64 (ratio 0.6), 32 (ratio 0.8)."
    )


def test_a_ratio_that_leaves_nothing_is_refused() -> None:
    """Removing everything is not pruning; the reachable counts are listed."""
    with pytest.raises(
        PlanError, match=r"removing 0\.95 of 64 ffn_channels leaves none \(kept .* Allowed .*: 32 \(ratio 0\.5\)"
    ):
        count(0.95, 64, 32)


def test_a_count_that_the_configuration_refuses_is_refused() -> None:
    """The counts that it accepts are listed, and the other shape is named."""
    with pytest.raises(PlanError) as caught:
        count(3 / 8, 8, kind="gqa_group", is_allowed=lambda n: n in (1, 2, 4, 8))
    assert str(caught.value) == (
        "removing 0.375 of 8 gqa_groups leaves 5 per layer, which this family's configuration refuses. "
        "Allowed counts to keep: 4 (ratio 0.5), 2 (ratio 0.75), 1 (ratio 0.875). Or use shape: uneven."
    )


def test_when_nothing_smaller_is_allowed_the_message_says_so() -> None:
    """No list of alternatives is invented, also where a layer is narrower than the multiple."""
    with pytest.raises(PlanError, match="No smaller count is allowed"):
        count(0.5, 1)
    with pytest.raises(PlanError, match="No smaller count is allowed"):
        count(0.5, 20, 32)


@pytest.mark.parametrize(("num_units", "multiple"), [(160, 32), (64, 1), (1000, 8), (4864, 32)])
def test_the_advice_can_be_followed(num_units: int, multiple: int) -> None:
    """Every suggested ratio gives the count that it is said to give."""
    with pytest.raises(PlanError) as caught:
        count(1e-6, num_units, multiple)
    suggestions = re.findall(r"(\d+) \(ratio ([0-9.]+)\)", str(caught.value))
    assert 1 <= len(suggestions) <= 8
    for kept, ratio in suggestions:
        assert count(float(ratio), num_units, multiple) == int(kept)


def test_a_threshold_counts_what_is_above_it() -> None:
    """A unit exactly at the threshold goes, as in the paper."""
    assert threshold_counts([vector(0.1, 0.2, 0.3), vector(0, 0, 0.2)], 0.2) == [1, 0]
    assert threshold_counts([vector(0.0, 0.1)], 0.0) == [1]


def ranked(scores: list[Tensor], removed: int, multiple: int = 1, min_keep_ratio: float = 0.01) -> list[int]:
    """Return the counts of a global ranking."""
    return global_counts(scores, removed, min_keep_ratio=min_keep_ratio, multiple=multiple, kind="ffn_channel")


def test_the_lowest_of_the_whole_model_go() -> None:
    """A layer with low scores gives more."""
    scores = [vector(0.9, 0.8, 0.7, 0.6), vector(0.1, 0.95, 0.2, 0.65)]
    assert ranked(scores, 2) == [4, 2]
    assert ranked(scores, 3) == [3, 2]
    assert ranked(scores, 0) == [4, 4]


def test_ties_go_to_the_earlier_layer() -> None:
    """Equal scores are removed from the first layer first, the same way every time."""
    scores = [vector(0.5, 0.5, 0.5), vector(0.5, 0.5, 0.5)]
    assert ranked(scores, 1) == [2, 3]
    assert ranked(scores, 3) == [1, 2]


def test_no_layer_falls_below_its_floor() -> None:
    """The worst layer keeps its floor and the next one gives instead; at least one unit stays anyway."""
    scores = [vector(*[0.0] * 10), vector(*[1.0] * 10)]
    assert ranked(scores, 9, min_keep_ratio=0.35) == [4, 7]
    assert ranked([vector(0.0, 0.0), vector(1.0, 1.0)], 2) == [1, 1]


def test_a_budget_beyond_the_floors_is_refused() -> None:
    """The message says how far the budget can reach."""
    with pytest.raises(PlanError) as caught:
        ranked([vector(*[0.0] * 10), vector(*[1.0] * 10)], 13, min_keep_ratio=0.35)
    assert str(caught.value) == (
        "the budget removes 13 ffn_channels, but with min_keep_ratio 0.35 at most 12 of 20 can go. "
        "Lower the budget or prune.min_keep_ratio."
    )


def test_widths_are_rounded_to_multiples_and_the_total_is_kept() -> None:
    """Rounding up in one layer is paid for in the layer that was rounded furthest."""
    layers = [torch.arange(64, dtype=torch.float64) + shift for shift in (0.0, 6.0, 12.0, 18.0)]
    exact = ranked(layers, 100, min_keep_ratio=0.1)
    rounded = ranked(layers, 100, 8, min_keep_ratio=0.1)
    assert sum(exact) == 156
    assert all(width % 8 == 0 for width in rounded)
    assert abs(sum(rounded) - 156) <= 4
    assert all(abs(a - b) < 8 for a, b in zip(exact, rounded, strict=True))


def test_standardised_scores_forget_scale_and_offset() -> None:
    """Each layer ends with mean 0 and deviation 1 in the same order; equal scores become zeros, not NaN."""
    first = vector(1.0, 2.0, 4.0)
    scaled, flat = standardised([1000 * first + 7, vector(3.0, 3.0)])
    torch.testing.assert_close(scaled, standardised([first])[0])
    assert float(scaled.mean()) == pytest.approx(0, abs=1e-12)
    assert float(scaled.square().mean()) == pytest.approx(1)
    assert flat.tolist() == [0.0, 0.0]
