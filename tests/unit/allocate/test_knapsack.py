"""The knapsack finds what trying every combination finds."""

from __future__ import annotations

import itertools
import random

import pytest

from secateur.allocate.knapsack import Option, choose_options, interpolated_loss
from secateur.errors import PlanError


def _layers(seed: int) -> list[list[Option]]:
    numbers = random.Random(seed)
    return [
        [Option({"ffn_channel": 8 - cut}, cut * 1000, cut * numbers.uniform(0.5, 2) ** 2) for cut in range(5)]
        for _ in range(4)
    ]


@pytest.mark.parametrize("seed", range(20))
def test_no_combination_that_removes_enough_loses_less(seed: int) -> None:
    """Against all 625 combinations; sizes are multiples of the bins here, so rounding plays no part."""
    layers, wanted = _layers(seed), 8192.0
    chosen = choose_options(layers, wanted)
    assert sum(option.removed for option in chosen) >= wanted * (1 - 4 / 8192)
    best = min(
        sum(option.loss for option in options)
        for options in itertools.product(*layers)
        if sum(option.removed for option in options) >= wanted
    )
    assert sum(option.loss for option in chosen) <= best + 1e-12


def test_everything_can_be_asked_for() -> None:
    """A budget of all that the options hold takes the largest of each layer."""
    layers = _layers(0)
    assert [option.removed for option in choose_options(layers, 16_000.0)] == [4000] * 4


def test_more_than_the_options_hold_is_refused_with_how_far_they_reach() -> None:
    """The message names both numbers."""
    with pytest.raises(PlanError, match=r"removes 16,001 parameters.*can remove 16,000 at most"):
        choose_options(_layers(0), 16_001.0)


def test_nothing_to_remove_removes_nothing() -> None:
    """A vocabulary that gives up more than the budget leaves the layers whole."""
    assert all(option.removed == 0 for option in choose_options(_layers(0), 0.0))


def test_interpolation_passes_through_what_was_measured_and_grows() -> None:
    """At the measured shares exactly; between and beyond them monotone."""
    measured = [(0.25, 0.1), (0.5, 0.5), (0.75, 1.5)]
    assert [interpolated_loss(share, measured) for share, _ in measured] == pytest.approx([0.1, 0.5, 1.5])
    curve = [interpolated_loss(share / 100, measured) for share in range(100)]
    assert curve == sorted(curve)
    assert curve[0] == 0
    assert interpolated_loss(0.125, measured) <= 0.05


def test_one_measured_share_gives_a_straight_line() -> None:
    """In proportion to the share."""
    assert interpolated_loss(0.25, [(0.5, 3.0)]) == pytest.approx(1.5)
