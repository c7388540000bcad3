"""The course of the learning rate."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from secateur.recover.schedule import Schedule, learning_rate_factor


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 100])
@pytest.mark.parametrize("warmup_ratio", [0.0, 0.05, 0.5, 0.99])
def test_no_step_is_wasted_and_the_highest_rate_is_reached(
    schedule: Schedule, num_steps: int, warmup_ratio: float
) -> None:
    """It rises through the warm-up to 1 at the step after it, never rises again, and is never 0."""
    factors = [learning_rate_factor(step, num_steps, warmup_ratio, schedule) for step in range(num_steps)]
    warmup = int(num_steps * warmup_ratio)
    assert all(0.0 < factor <= 1.0 for factor in factors)
    assert factors[warmup] == 1.0
    assert all(before < after for before, after in pairwise(factors[: warmup + 1]))
    assert all(before >= after for before, after in pairwise(factors[warmup:]))


def test_the_values_are_those_of_the_formulas() -> None:
    """Half a cosine, a line, and a constant, over the steps after the warm-up."""
    assert learning_rate_factor(1, 10, 0.2, "cosine") == pytest.approx(2 / 3)
    assert learning_rate_factor(4, 10, 0.2, "cosine") == pytest.approx((1 + math.cos(math.pi / 4)) / 2)
    assert learning_rate_factor(4, 10, 0.2, "linear") == pytest.approx(0.75)
    assert learning_rate_factor(9, 10, 0.2, "constant") == 1.0
    assert learning_rate_factor(10, 10, 0.2, "linear") == learning_rate_factor(12, 10, 0.2, "cosine") == 0.0
