"""The reversed control is another method, upside down."""

from __future__ import annotations

import pytest
import torch

from secateur.errors import ConfigError
from secateur.score import METHODS
from secateur.score.contextual import contextual
from secateur.score.magnitude import magnitude
from secateur.score.reversed_control import reversed_scores
from tests.unit.score.evidence import evidence

TOKENS = torch.tensor([[1.0, -2.0, 0.5, 4.0]])


def test_it_is_minus_the_contextual_score_unless_told_otherwise() -> None:
    """The best unit becomes the worst."""
    item = evidence(TOKENS)
    assert torch.equal(reversed_scores(item), -contextual(item))
    assert reversed_scores(item).argsort().tolist() == contextual(item).argsort(descending=True).tolist()


def test_any_method_can_be_reversed() -> None:
    """The option names the method."""
    item = evidence(TOKENS, load_weights=lambda: [torch.arange(12.0).reshape(4, 3)])
    assert torch.equal(reversed_scores(item, of="magnitude"), -magnitude(item))


def test_an_unknown_method_is_refused_before_anything_is_scored() -> None:
    """The option is checked with the others; the nearest method is suggested."""
    with pytest.raises(ConfigError, match=r"'magnitud'.* Did you mean 'magnitude'"):
        METHODS["reversed"].check_options({"of": "magnitud"})
    with pytest.raises(ConfigError, match=r"'magnitud'.* Did you mean 'magnitude'"):
        reversed_scores(evidence(TOKENS), of="magnitud")
