"""Contextual importance is the mean absolute activation, as the paper defines it."""

from __future__ import annotations

import pytest
import torch

from secateur.errors import ConfigError
from secateur.score.contextual import contextual
from tests.unit.score.evidence import evidence

TOKENS = torch.tensor([[1.0, -2.0, 0.0, 4.0], [-3.0, 2.0, 0.0, 4.0], [2.0, -2.0, 0.0, -4.0]])


def test_activation_is_the_mean_absolute_value_per_channel() -> None:
    """Signs do not cancel, and the mean is over tokens."""
    torch.testing.assert_close(contextual(evidence(TOKENS)), torch.tensor([2.0, 2.0, 0.0, 4.0]).double())


def test_a_unit_of_several_channels_is_their_mean() -> None:
    """A group's score is the mean over its own, neighbouring channels."""
    torch.testing.assert_close(contextual(evidence(TOKENS, width=2)), torch.tensor([2.0, 2.0]).double())
    torch.testing.assert_close(contextual(evidence(TOKENS, width=4)), torch.tensor([2.0]).double())


def test_linear_is_the_smaller_of_the_branches() -> None:
    """Either branch near zero silences a gated unit, so the smaller mean absolute output counts."""
    gate, up = torch.tensor([3.0, 30.0, 6.0, 0.0]).double(), torch.tensor([9.0, 3.0, 6.0, 9.0]).double()
    item = evidence(TOKENS, linear_abs=[gate, up])
    torch.testing.assert_close(contextual(item, at="linear"), torch.tensor([1.0, 1.0, 2.0, 0.0]).double())


def test_linear_of_a_plain_layer_is_its_own_output() -> None:
    """Without a gate there is one branch."""
    item = evidence(TOKENS, linear_abs=[torch.tensor([3.0, 6.0, 9.0, 0.0]).double()])
    torch.testing.assert_close(contextual(item, at="linear"), torch.tensor([1.0, 2.0, 3.0, 0.0]).double())


def test_linear_of_attention_groups_is_refused() -> None:
    """Groups have no dense layer before an activation function; the message says what to use."""
    with pytest.raises(ConfigError, match=r"at: linear is defined for ffn_channel and shared_channel only; got gqa_"):
        contextual(evidence(TOKENS, width=2), at="linear")
