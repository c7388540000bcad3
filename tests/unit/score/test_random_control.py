"""The random control is random in its units and in nothing else."""

from __future__ import annotations

import torch

from secateur.score.random_control import random
from tests.unit.score.evidence import evidence

NOTHING = torch.zeros(1, 1000)


def test_the_seed_decides_everything() -> None:
    """The same seed gives the same numbers, whatever else was drawn; another seed gives others."""
    first = random(evidence(NOTHING, seed=3))
    torch.rand(5)
    assert torch.equal(first, random(evidence(NOTHING, seed=3)))
    assert not torch.equal(first, random(evidence(NOTHING, seed=4)))


def test_layers_and_kinds_draw_apart() -> None:
    """Two layers do not lose the same units by construction."""
    first = random(evidence(NOTHING))
    assert not torch.equal(first, random(evidence(NOTHING, layer=1)))
    assert not torch.equal(first, random(evidence(NOTHING, kind="gqa_group")))


def test_the_global_random_state_is_left_alone() -> None:
    """Drawing scores does not disturb anybody else's random numbers."""
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    random(evidence(NOTHING))
    assert torch.equal(torch.rand(3), expected)


def test_numbers_are_uniform_between_0_and_1() -> None:
    """Mean and spread of a thousand draws are those of U(0, 1), and none repeats."""
    scores = random(evidence(NOTHING))
    assert 0 <= float(scores.min()) and float(scores.max()) < 1
    assert abs(float(scores.mean()) - 0.5) < 4 * (1 / 12 / 1000) ** 0.5
    assert abs(float(scores.var()) - 1 / 12) < 0.01
    assert len(scores.unique()) == 1000


def test_the_numbers_never_change() -> None:
    """Seed 0, layer 0: the first three numbers of every release and machine."""
    expected = torch.tensor([0.7710906729995334, 0.5431507604256001, 0.7693174306996521], dtype=torch.float64)
    assert torch.equal(random(evidence(NOTHING))[:3], expected)
