"""Activation norm is the root mean square, and what CFSP's released metric comes down to."""

from __future__ import annotations

import math

import pytest
import torch

from secateur.score.activation_norm import activation_norm
from tests.unit.score.evidence import evidence

GENERATOR = torch.Generator().manual_seed(0)
TOKENS = torch.randn(7, 6, dtype=torch.float64, generator=GENERATOR)


@pytest.mark.parametrize("width", [1, 2, 3])
def test_it_is_the_root_mean_square_over_tokens_and_channels(width: int) -> None:
    """A loop over single activations gives the same, for channels and for groups of them."""
    expected = []
    for unit in range(6 // width):
        squares = [float(TOKENS[t, c]) ** 2 for t in range(7) for c in range(unit * width, (unit + 1) * width)]
        expected.append(math.sqrt(sum(squares) / len(squares)))
    assert activation_norm(evidence(TOKENS, width)).tolist() == pytest.approx(expected, rel=1e-12)


def test_signs_do_not_cancel_and_zeros_score_zero() -> None:
    """Only size counts."""
    tokens = torch.tensor([[3.0, 0.0], [-3.0, 0.0]])
    assert activation_norm(evidence(tokens)).tolist() == [3.0, 0.0]


def test_the_weights_of_cfsps_metric_cancel() -> None:
    """Its sum of three weight ratios, each normalised over the axis it is averaged on, is this score times 3/hidden."""
    hidden = 5
    gate, up, down = (torch.randn(hidden, 6, dtype=torch.float64, generator=GENERATOR).abs() for _ in range(3))
    norm = TOKENS.square().mean(0).sqrt()
    metric = sum((weight / weight.sum(0)).mean(0) for weight in (down * norm, up, gate)) * norm
    torch.testing.assert_close(activation_norm(evidence(TOKENS)) * 3 / hidden, metric)
