"""Structured Wanda is the mean absolute weight times the norm of the input, as its papers define it."""

from __future__ import annotations

import math

import pytest
import torch

from secateur.score.wanda import wanda
from tests.unit.score.evidence import evidence

GENERATOR = torch.Generator().manual_seed(1)
TOKENS = torch.randn(7, 6, dtype=torch.float64, generator=GENERATOR)
READER = torch.randn(4, 6, generator=GENERATOR)


def by_hand(width: int) -> list[float]:
    """Return the scores by loops over single weights and activations."""
    scores = []
    for unit in range(6 // width):
        total = 0.0
        for channel in range(unit * width, (unit + 1) * width):
            norm = math.sqrt(sum(float(TOKENS[t, channel]) ** 2 for t in range(7)) / 7)
            total += sum(abs(float(READER[row, channel])) * norm for row in range(4)) / 4
        scores.append(total)
    return scores


@pytest.mark.parametrize("width", [1, 2, 3])
def test_it_equals_a_loop(width: int) -> None:
    """Mean over outputs per channel, sum over the channels of a group."""
    scores = wanda(evidence(TOKENS, width, load_reader=lambda: READER))
    assert scores.dtype == torch.float64
    assert scores.tolist() == pytest.approx(by_hand(width), rel=1e-12)


def test_half_precision_weights_are_widened() -> None:
    """A sum of absolute values that float16 cannot hold is not lost."""
    reader = torch.full((4, 2), 60000.0).half()
    scores = wanda(evidence(torch.ones(3, 2), load_reader=lambda: reader))
    assert scores.tolist() == pytest.approx([float(reader[0, 0])] * 2)


def test_a_unit_that_nobody_reads_or_that_is_silent_scores_zero() -> None:
    """Either factor alone can make a unit worthless."""
    tokens, reader = torch.tensor([[1.0, 0.0, 1.0]]), torch.tensor([[0.0, 1.0, 1.0]])
    assert wanda(evidence(tokens, load_reader=lambda: reader)).tolist() == [0.0, 0.0, 1.0]
