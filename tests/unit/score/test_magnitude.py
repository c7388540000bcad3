"""Magnitude is the Euclidean norm of everything that serves a unit."""

from __future__ import annotations

import math

import pytest
import torch

from secateur.families.loader import families
from secateur.score.magnitude import magnitude
from secateur.score.run import unit_weights
from tests.conftest import geometry_of, pico_model
from tests.unit.score.evidence import evidence


def test_norm_over_slices_equals_a_loop() -> None:
    """Squares add up over rows, columns and biases, in float64."""
    generator = torch.Generator().manual_seed(0)
    slices = [torch.randn(4, size, generator=generator) for size in (5, 5, 1, 7)]
    expected = [math.sqrt(sum(float(weight) ** 2 for matrix in slices for weight in matrix[unit])) for unit in range(4)]
    scores = magnitude(evidence(torch.zeros(1, 4), load_weights=lambda: slices))
    assert scores.dtype == torch.float64
    assert scores.tolist() == pytest.approx(expected, rel=1e-12)


def test_half_precision_weights_do_not_overflow() -> None:
    """Weights are widened before they are squared."""
    scores = magnitude(evidence(torch.zeros(1, 2), load_weights=lambda: [torch.full((2, 3), 300.0).half()]))
    assert scores.tolist() == pytest.approx([300.0 * math.sqrt(3)] * 2)


def test_on_a_real_model_it_is_the_norm_of_the_named_rows_and_columns() -> None:
    """Channel 7 of a pico OPT: row 7 of fc1 with its bias, and column 7 of fc2."""
    family = families()["opt"]
    model = pico_model(family)
    axis = geometry_of(model, family).axes["ffn_channel"][1]
    layer = model.model.decoder.layers[1]
    parts = [layer.fc1.weight[7], layer.fc1.bias[7:8], layer.fc2.weight[:, 7]]
    state = model.state_dict()
    scores = magnitude(
        evidence(torch.zeros(1, 64), load_weights=lambda: unit_weights(axis, state.get, family.weight_layout))
    )
    assert float(scores[7]) == pytest.approx(float(torch.cat(parts).detach().norm()), rel=1e-12)
