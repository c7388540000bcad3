"""Optimal Brain Surgeon scores are the errors of explicit least squares on explicit data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from secateur.errors import ConfigError
from secateur.score.linear_algebra import default_step
from secateur.score.obs import obs
from tests.unit.score.evidence import second_order

GENERATOR = torch.Generator().manual_seed(5)
CHANNELS = 12
MIXING = torch.randn(CHANNELS, CHANNELS, dtype=torch.float64, generator=GENERATOR)
TOKENS = torch.randn(60, CHANNELS, dtype=torch.float64, generator=GENERATOR) @ MIXING
READER = torch.randn(4, CHANNELS, dtype=torch.float64, generator=GENERATOR)
widths = pytest.mark.parametrize("width", [1, 2, 3])
ridges = pytest.mark.parametrize("ridge", [0.0, 0.05])


def channels_of(units: list[int], width: int) -> list[int]:
    """Return the channels of units, in order."""
    return [unit * width + channel for unit in units for channel in range(width)]


def error_without(removed: list[int], width: int, ridge: float, tokens: Tensor = TOKENS) -> float:
    """Return the least mean squared output error that the other channels can reach, fitted to the dense output.

    A ridge is data like any other: one made-up token per channel, as large as lambda says.
    """
    count, channels = tokens.shape
    size = ridge * float(tokens.square().mean(0).mean())
    rows = torch.cat([tokens, torch.eye(channels, dtype=torch.float64) * (size * count) ** 0.5])
    gone = set(channels_of(removed, width))
    kept = [channel for channel in range(channels) if channel not in gone]
    target = rows @ READER[:, :channels].T
    if not kept:
        return float(target.square().sum() / count)
    fitted = torch.linalg.lstsq(rows[:, kept], target).solution
    return float((target - rows[:, kept] @ fitted).square().sum() / count)


@ridges
@widths
def test_one_shot_is_the_exact_error_of_removing_that_unit_alone(width: int, ridge: float) -> None:
    """Fitting the other channels to the dense output on the data leaves just this error."""
    expected = [error_without([unit], width, ridge) for unit in range(CHANNELS // width)]
    scores = obs(second_order(TOKENS, READER, width), ridge=ridge)
    assert scores.tolist() == pytest.approx(expected, rel=1e-8)


def test_one_channel_is_the_textbook_formula() -> None:
    """||w_j||^2 / [H^-1]_jj."""
    inverse = torch.linalg.inv(TOKENS.T @ TOKENS / 60)
    expected = [float(READER[:, j].square().sum() / inverse[j, j]) for j in range(CHANNELS)]
    assert obs(second_order(TOKENS, READER), ridge=0.0).tolist() == pytest.approx(expected, rel=1e-9)


def slow_greedy(width: int, step: int, ridge: float) -> tuple[list[int], list[float]]:
    """Return the order of removal, and the error after each one, by fitting everything anew at every step."""
    order: list[int] = []
    errors: list[float] = []
    while len(order) < CHANNELS // width:
        left = [unit for unit in range(CHANNELS // width) if unit not in order]
        ranked = sorted(left, key=lambda unit: error_without([*order, unit], width, ridge))
        for unit in ranked[:step]:
            order.append(unit)
            errors.append(error_without(order, width, ridge))
    return order, errors


@ridges
@pytest.mark.parametrize(("width", "step"), [(1, 1), (1, 5), (1, 12), (2, 1), (2, 4), (3, 1), (3, 2)])
def test_greedy_equals_a_slow_reference(width: int, step: int, ridge: float) -> None:
    """The order of removal, and the error after each removal, are those of fitting everything anew at every step."""
    order, errors = slow_greedy(width, step, ridge)
    scores = obs(second_order(TOKENS, READER, width), ridge=ridge, greedy=True, step=step)
    assert scores.argsort().tolist() == order
    assert scores[order].tolist() == pytest.approx(errors, rel=1e-8)


@widths
def test_greedy_scores_rise_along_the_removal_up_to_the_whole_output(width: int) -> None:
    """Whoever keeps the best-scored units keeps what greedy removal kept; with nothing left the output is the error."""
    scores = obs(second_order(TOKENS, READER, width), ridge=0.0, greedy=True)
    assert len(scores.unique()) == CHANNELS // width
    assert float(scores.max()) == pytest.approx(float((TOKENS @ READER.T).square().sum(1).mean()))
    assert float(scores.min()) == pytest.approx(float(obs(second_order(TOKENS, READER, width), ridge=0.0).min()))


def test_greedy_keeps_one_of_two_copies() -> None:
    """One-shot calls both copies of a strong channel nearly free; greedy removes one and then knows the other."""
    tokens = TOKENS[:, :4].clone()
    tokens[:, 1] = tokens[:, 0] + 0.01 * tokens[:, 1]
    item = second_order(tokens, READER[:, :4])
    one_shot, greedy = obs(item), obs(item, greedy=True)
    assert sorted(one_shot.argsort()[:2].tolist()) == [0, 1]
    assert int(greedy.argsort()[0]) in (0, 1)
    assert float(greedy[:2].max()) > 10 * float(greedy[:2].min())
    kept = sorted(greedy.argsort(descending=True)[:2].tolist())
    dropped = [unit for unit in range(4) if unit not in kept]
    assert error_without(dropped, 1, 1e-2, tokens) < error_without([0, 1], 1, 1e-2, tokens)


@pytest.mark.parametrize(("units", "step"), [(1, 1), (3, 1), (95, 1), (96, 2), (1535, 31), (1536, 32), (14336, 32)])
def test_the_default_step_is_a_48th_of_the_layer_between_1_and_32(units: int, step: int) -> None:
    """Small layers are scored anew after every unit, large ones often enough."""
    assert default_step(units) == step


def test_the_default_step_is_used() -> None:
    """It is a default, not a different method."""
    tokens = torch.randn(50, 100, dtype=torch.float64, generator=GENERATOR)
    item = second_order(tokens, torch.randn(2, 100, generator=GENERATOR))
    default = obs(item, greedy=True)
    assert torch.equal(default, obs(item, greedy=True, step=2))
    assert not torch.equal(default, obs(item, greedy=True, step=50))


def test_equal_units_go_in_their_order() -> None:
    """Ties break by index, in every step."""
    item = second_order(torch.eye(6, dtype=torch.float64), torch.ones(1, 6))
    assert obs(item, greedy=True, step=2).argsort(stable=True).tolist() == list(range(6))


def test_a_layer_that_is_silent_scores_next_to_nothing() -> None:
    """No division by zero where no token reached a layer."""
    item = second_order(torch.zeros(5, 4), torch.ones(2, 4))
    for greedy in (False, True):
        scores = obs(item, greedy=greedy)
        assert bool(torch.isfinite(scores).all()) and float(scores.max()) < 1e-50


def test_a_step_without_greedy_removal_is_refused() -> None:
    """An option that would do nothing is an error."""
    with pytest.raises(ConfigError, match=r"step of method obs is for greedy removal; got step 4 without greedy: true"):
        obs(second_order(TOKENS, READER), step=4)
