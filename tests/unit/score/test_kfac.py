"""K-FAC scores are the errors of explicit least squares, weighed by what the loss's gradients say of each direction."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from secateur.errors import ConfigError
from secateur.records.gradients import UnitGradients
from secateur.score import Evidence
from secateur.score.kfac import kfac
from secateur.score.obs import obs
from tests.unit.score.evidence import second_order
from tests.unit.score.test_obs import CHANNELS, READER, TOKENS, channels_of, widths

OUTPUTS = len(READER)
GRADIENTS = torch.randn(40, OUTPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(8)) @ torch.diag(
    torch.tensor([3.0, 1.0, 0.3, 0.01]).double()
)


def _evidence(width: int = 1, output: Tensor | None = None) -> Evidence:
    nothing = torch.zeros(CHANNELS // width, dtype=torch.float64)
    if output is None:
        output = GRADIENTS.T @ GRADIENTS
    found = UnitGradients(1, *[nothing] * 5, output)
    return replace(second_order(TOKENS, READER, width), load_gradients=lambda: found)


def _loss_without(removed: list[int], width: int) -> float:
    """Return the mean squared change of the loss to first order, once the other channels are fitted to the output."""
    gone = set(channels_of(removed, width))
    kept = [channel for channel in range(CHANNELS) if channel not in gone]
    target = TOKENS @ READER.T
    change = target - (TOKENS[:, kept] @ torch.linalg.lstsq(TOKENS[:, kept], target).solution if kept else 0.0)
    return float((change @ GRADIENTS.T).square().sum() / len(TOKENS))


@widths
def test_one_shot_is_the_change_of_the_loss_when_that_unit_alone_goes(width: int) -> None:
    """Errors and gradients taken as independent, as K-FAC takes them: every error meets every gradient."""
    expected = [_loss_without([unit], width) for unit in range(CHANNELS // width)]
    scores = kfac(_evidence(width), ridge=0.0, output_ridge=0.0, greedy=False)
    assert scores.tolist() == pytest.approx(expected, rel=1e-7)


def test_greedy_scores_are_the_changes_after_all_removals_so_far() -> None:
    """In the order in which they go."""
    scores = kfac(_evidence(), ridge=0.0, output_ridge=0.0, step=1)
    order = scores.argsort().tolist()
    expected = [_loss_without(order[: count + 1], 1) for count in range(CHANNELS)]
    assert scores[order].tolist() == pytest.approx(expected, rel=1e-6)


@widths
def test_where_every_direction_counts_the_same_it_is_obs(width: int) -> None:
    """G = I, damping included."""
    alike = _evidence(width, torch.eye(OUTPUTS, dtype=torch.float64))
    expected = obs(second_order(TOKENS, READER, width), greedy=True) * 1.1
    assert kfac(alike).tolist() == pytest.approx(expected.tolist(), rel=1e-9)


def test_a_unit_that_writes_where_the_loss_does_not_look_is_cheap() -> None:
    """Whatever the size of its weights."""
    reader = torch.eye(OUTPUTS, dtype=torch.float64)
    tokens = torch.randn(50, OUTPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    output = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0]).double())
    nothing = torch.zeros(OUTPUTS, dtype=torch.float64)
    found = UnitGradients(1, *[nothing] * 5, output)
    scores = kfac(replace(second_order(tokens, reader), load_gradients=lambda: found), greedy=False)
    assert int(scores.argmin()) == OUTPUTS - 1


def test_what_cannot_be_is_refused() -> None:
    """A step without greedy; gradients without those at the outputs."""
    with pytest.raises(ConfigError, match="got step 2 without greedy: true"):
        kfac(_evidence(), greedy=False, step=2)
    nothing = torch.zeros(CHANNELS, dtype=torch.float64)
    found = UnitGradients(1, *[nothing] * 5)
    with pytest.raises(ConfigError, match="needs the gradients at the outputs"):
        kfac(replace(second_order(TOKENS, READER), load_gradients=lambda: found))
