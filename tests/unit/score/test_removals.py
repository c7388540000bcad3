"""The methods that measure removals hand on what was measured."""

from __future__ import annotations

import pytest
import torch

from secateur.records.units import BLOCK_KINDS
from secateur.score import METHODS
from tests.unit.score.evidence import evidence


@pytest.mark.parametrize(("method", "measure"), [("perplexity_drop", "loss"), ("output_divergence", "js")])
def test_the_score_is_what_was_measured_without_the_block(method: str, measure: str) -> None:
    """Each asks for its own measure, and scores whole blocks only."""
    assert METHODS[method].function(evidence(torch.ones(1, 1), removal_loss=0.75)).tolist() == [0.75]
    assert (METHODS[method].measure, METHODS[method].kinds) == (measure, BLOCK_KINDS)
