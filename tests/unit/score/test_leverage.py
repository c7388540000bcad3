"""Ridge leverage is what its definition says, and falls where units copy each other."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from secateur.score.leverage import leverage
from tests.unit.score.evidence import no_matrix, second_order

GENERATOR = torch.Generator().manual_seed(3)
TOKENS = torch.randn(20, 6, dtype=torch.float64, generator=GENERATOR)


@pytest.mark.parametrize("ridge", [1e-3, 0.5])
@pytest.mark.parametrize("width", [1, 3])
def test_it_is_the_diagonal_of_the_smoother(width: int, ridge: float) -> None:
    """H (H + lambda I)^-1 by an explicit product with an explicit inverse, mean over a group's channels."""
    gram = TOKENS.T @ TOKENS / 20
    size = ridge * gram.diagonal().mean()
    smoother = gram @ torch.linalg.inv(gram + size * torch.eye(6, dtype=torch.float64))
    expected = smoother.diagonal().reshape(-1, width).mean(1)
    item = second_order(TOKENS, torch.ones(1, 6), width)
    torch.testing.assert_close(leverage(item, ridge=ridge), expected)


def test_it_is_the_ridge_regressions_own_influence() -> None:
    """How much of channel j the best ridge prediction of channel j from all channels gives back to itself."""
    rows = torch.cat([TOKENS, torch.eye(6, dtype=torch.float64) * (0.1 * TOKENS.square().mean(0).mean() * 20).sqrt()])
    target = torch.cat([TOKENS, torch.zeros(6, 6, dtype=torch.float64)])
    fitted = torch.linalg.lstsq(rows, target).solution
    item = second_order(TOKENS, torch.ones(1, 6))
    torch.testing.assert_close(leverage(item, ridge=0.1), fitted.diagonal())


def test_silent_units_score_0_and_copies_score_half() -> None:
    """Scores lie between 0 and 1; of two copies each is needed half as much."""
    tokens = torch.randn(200, 4, dtype=torch.float64, generator=GENERATOR)
    tokens[:, 1] = tokens[:, 0]
    tokens[:, 3] = 0.0
    scores = leverage(second_order(tokens, torch.ones(1, 4)), ridge=1e-6)
    assert scores.tolist() == pytest.approx([0.5, 0.5, 1.0, 0.0], abs=1e-4)
    assert leverage(second_order(torch.zeros(3, 4), torch.ones(1, 4))).tolist() == pytest.approx([0.0] * 4, abs=1e-12)


def test_no_weights_are_read() -> None:
    """The score knows nothing of the reader."""
    item = second_order(TOKENS, torch.ones(1, 6))
    assert torch.equal(leverage(replace(item, load_reader=no_matrix)), leverage(item))
