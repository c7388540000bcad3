"""Random numbers that somebody else's work does not touch."""

from __future__ import annotations

import random

import numpy as np
import torch

from secateur.recover.rng import preserved_rng


def drawn() -> tuple[float, float, float]:
    """Return a random number of each generator."""
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def seed(number: int) -> None:
    """Seed all generators."""
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def test_all_generators_go_on_as_if_nothing_had_happened() -> None:
    """Also when the work fails."""
    seed(3)
    wished = [drawn(), drawn()]
    seed(3)
    with preserved_rng():
        seed(4)
        drawn()
    assert drawn() == wished[0]
    try:
        with preserved_rng():
            drawn()
            raise KeyError
    except KeyError:
        pass
    assert drawn() == wished[1]
