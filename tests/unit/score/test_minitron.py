"""Minitron's score is the norm over sequences of mean absolute activations."""

from __future__ import annotations

import math

import pytest
import torch

from secateur.records.statistics import SequenceSums
from secateur.score.minitron import minitron
from tests.unit.score.evidence import evidence

SEQUENCES = [torch.randn(n, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(n)) for n in (3, 8, 5)]


@pytest.mark.parametrize("width", [1, 2, 3])
def test_it_is_a_loop_over_sequences_and_channels(width: int) -> None:
    """Means within each sequence, squares added over sequences and the unit's own channels, then the root."""
    expected = []
    for unit in range(6 // width):
        squares = [
            (sum(abs(float(token[channel])) for token in sequence) / len(sequence)) ** 2
            for sequence in SEQUENCES
            for channel in range(unit * width, (unit + 1) * width)
        ]
        expected.append(math.sqrt(sum(squares)))
    sums = SequenceSums(3, sum((sequence.abs().mean(0) ** 2 for sequence in SEQUENCES), torch.zeros(6).double()))
    assert minitron(evidence(torch.cat(SEQUENCES), width, sequences=sums)).tolist() == pytest.approx(
        expected, rel=1e-12
    )
