"""Fluctuation is the error left when a unit is replaced by its mean."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from secateur.records.statistics import Moments
from secateur.score.fluctuation import fluctuation
from tests.unit.score.evidence import evidence

GENERATOR = torch.Generator().manual_seed(2)
TOKENS = torch.randn(9, 6, dtype=torch.float64, generator=GENERATOR) + torch.arange(6)
READER = torch.randn(4, 6, dtype=torch.float64, generator=GENERATOR)


def error_with_best_bias(channel: int) -> float:
    """Return the mean squared output error without a channel, after the best bias, fitted by least squares."""
    lost = TOKENS[:, channel : channel + 1] * READER[:, channel]
    constant = torch.ones(len(TOKENS), 1, dtype=torch.float64)
    bias = torch.linalg.lstsq(constant, lost).solution
    return float((lost - constant @ bias).square().sum(1).mean())


def scores(width: int = 1, **options: str) -> Tensor:
    """Return the scores of the random projection above."""
    return fluctuation(evidence(TOKENS, width, load_reader=lambda: READER), **options)


def test_it_is_the_exact_error_under_bias_compensation() -> None:
    """Channel by channel, the error is that of explicit data and an explicit fit."""
    expected = [error_with_best_bias(channel) for channel in range(6)]
    assert scores().tolist() == pytest.approx(expected, rel=1e-10)
    assert torch.equal(scores(pool="mean"), scores())


def test_groups_pool_their_channels_as_asked() -> None:
    """By default squares are averaged, as the released code does with heads; or the errors themselves."""
    errors = torch.tensor([error_with_best_bias(channel) for channel in range(6)]).double()
    torch.testing.assert_close(scores(3), errors.square().reshape(2, 3).mean(1))
    torch.testing.assert_close(scores(3, pool="mean"), errors.reshape(2, 3).mean(1))


def test_a_constant_unit_scores_zero_and_never_less() -> None:
    """Its mean stands in for it; rounding of the two moments does not show as a negative variance."""
    ones, below = torch.ones(2).double(), torch.tensor([1.0, 1.0 - 2**-53], dtype=torch.float64)
    item = evidence(torch.ones(1, 2), moments=Moments(1, ones, ones, below), load_reader=lambda: torch.ones(3, 2))
    assert fluctuation(item).tolist() == [0.0, 0.0]
