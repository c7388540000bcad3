"""Shares per layer have the mean that was asked for, and the shape of their rule."""

from __future__ import annotations

import pytest

from secateur.allocate.layer_ratios import by_influence, log_increase, scaled
from secateur.errors import PlanError


@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.6, 0.9])
def test_log_increase_has_the_asked_mean_and_grows(ratio: float) -> None:
    """Up to the cap."""
    shares = log_increase(ratio, 12, cap=0.9)
    assert sum(shares) / 12 == pytest.approx(ratio)
    assert shares == sorted(shares)
    assert max(shares) <= 0.9 + 1e-12


def test_the_first_layer_loses_half_the_mean() -> None:
    """Where nothing is capped."""
    assert log_increase(0.2, 12, cap=0.9)[0] == pytest.approx(0.1)


def test_layers_of_little_influence_lose_most() -> None:
    """In the ratio that the softmax says."""
    shares = by_influence(0.2, [0.3, 0.1, 0.2], cap=0.9)
    assert sum(shares) / 3 == pytest.approx(0.2)
    assert shares[1] / shares[0] == pytest.approx(2.718281828**2)


def test_what_the_cap_takes_away_the_others_carry() -> None:
    """One layer at the cap, the rest in proportion."""
    assert scaled([10.0, 1.0, 1.0], 0.5, cap=0.9) == pytest.approx([0.9, 0.3, 0.3])


def test_a_mean_above_the_cap_is_refused() -> None:
    """The message names both."""
    with pytest.raises(PlanError, match=r"share of 0.95 is to go.*lets 0.9 of a layer go"):
        scaled([1.0], 0.95, cap=0.9)
