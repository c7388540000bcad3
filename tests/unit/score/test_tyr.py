"""Tyr's score is half the least-squares error plus the explained energy, by loops."""

from __future__ import annotations

import pytest
import torch

from secateur.score.tyr import tyr
from tests.unit.score.evidence import second_order

GENERATOR = torch.Generator().manual_seed(4)
TOKENS = torch.randn(30, 6, dtype=torch.float64, generator=GENERATOR)
READER = torch.randn(4, 6, dtype=torch.float64, generator=GENERATOR)


@pytest.mark.parametrize("ridge", [0.0, 0.1])
@pytest.mark.parametrize("width", [1, 2, 3])
def test_it_equals_loops(width: int, ridge: float) -> None:
    """Both terms from single numbers, with the ridge in both."""
    gram = TOKENS.T @ TOKENS / 30
    gram = gram + ridge * gram.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    inverse = torch.linalg.inv(gram)
    expected = []
    for first in range(0, 6, width):
        unit = range(first, first + width)
        weights = READER[:, first : first + width]
        block = torch.linalg.inv(inverse[first : first + width, first : first + width])
        error = float(torch.trace(weights @ block @ weights.T))
        energy = sum(float(READER[i, j] * gram[j, k] * READER[i, k]) for i in range(4) for j in unit for k in range(6))
        expected.append(error / 2 + energy)
    assert tyr(second_order(TOKENS, READER, width), ridge=ridge).tolist() == pytest.approx(expected, rel=1e-9)


def test_energies_add_up_to_that_of_the_output() -> None:
    """Without a ridge the energy terms of all units are the mean squared output."""
    tokens = torch.eye(6, dtype=torch.float64) * 6**0.5
    errors = READER.square().sum(0)
    scores = tyr(second_order(tokens, READER), ridge=0.0)
    output = (tokens @ READER.T).square().sum(1).mean()
    assert float((scores - errors / 2).sum()) == pytest.approx(float(output))


def test_a_unit_that_works_against_the_rest_scores_lower() -> None:
    """Two cancelling units explain negative energy; turned around, the same two explain much."""
    tokens = torch.randn(50, 3, dtype=torch.float64, generator=GENERATOR)
    tokens[:, 1] = tokens[:, 0] + 0.1 * tokens[:, 1]
    against, along = torch.tensor([[1.0, -2.0, 1.0]]), torch.tensor([[1.0, 2.0, 1.0]])
    assert float(tyr(second_order(tokens, against))[0]) < 0 < float(tyr(second_order(tokens, along))[0])
