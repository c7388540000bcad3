"""Fisher and Taylor scores are means of the sums of the gradient pass, and say what the loss does without a unit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.calibrate import collect_gradients
from secateur.families.loader import families
from secateur.records.gradients import UnitGradients
from secateur.score.fisher import fisher
from secateur.score.taylor import taylor
from secateur.stream.forward import run_logits
from tests.blocks import hand_made_blocks
from tests.conftest import geometry_of, pico_model
from tests.unit.score.evidence import evidence


def doubles(*values: float) -> Tensor:
    """Return a float64 vector."""
    return torch.tensor(values, dtype=torch.float64)


STEP = 0.02
"""Large enough for losses whose norms are taken in float32."""
SUMS = UnitGradients(4, doubles(4, 8), doubles(12, 16), doubles(20, 24), doubles(28, 32), doubles(36, 40))
ITEM = evidence(torch.ones(1, 2), load_gradients=lambda: SUMS)


def test_fisher_is_the_mean_squared_mask_gradient() -> None:
    """Over sequences."""
    assert fisher(ITEM).tolist() == [1.0, 2.0]


@pytest.mark.parametrize(("options", "expected"), [({}, 3), ({"order": "first"}, 3), ({"order": "second"}, 5)])
def test_taylor_is_the_mean_of_the_order_asked_for(options: Any, expected: float) -> None:
    """First order where none is named."""
    assert taylor(ITEM, **options).tolist() == [expected, expected + 1]
    assert taylor(ITEM, order="mixed").tolist() == [7.0, 8.0]


def test_the_mask_gradient_is_how_the_loss_begins_to_move() -> None:
    """On a single block, fisher's root is the slope of the loss as a unit is turned down a little, for every unit."""
    family = families()["llama"]
    model = pico_model(family)
    geometry = geometry_of(model, family)
    blocks = hand_made_blocks()
    blocks.rows = blocks.rows[:1]
    found = collect_gradients(model, blocks, geometry, ["ffn_channel"]).units[1, "ffn_channel"]
    scores = fisher(evidence(torch.ones(1, 64), load_gradients=lambda: found))
    (batch,) = blocks.batches(1)
    down = model.model.layers[1].mlp.down_proj.weight
    positions = batch.predicted[0].nonzero()[:, 0]

    def loss() -> float:
        logits = run_logits(model, batch, family)[0, positions - 1]
        return float(nn.functional.cross_entropy(logits, batch.input_ids[0, positions]))

    with torch.no_grad():
        for unit in (0, 17, 63):
            column = down[:, unit].clone()
            losses = []
            for step in (STEP, -STEP):
                down[:, unit] = column * (1 - step)
                losses.append(loss())
            down[:, unit] = column
            slope = (losses[0] - losses[1]) / (2 * STEP)
            assert float(scores[unit].sqrt()) == pytest.approx(abs(slope), rel=1e-2)
