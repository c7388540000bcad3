"""Block influence is one minus the mean cosine."""

from __future__ import annotations

import pytest
import torch

from secateur.calibrate import collect
from secateur.families.loader import families
from secateur.records.units import BLOCK_KINDS
from secateur.score import METHODS, score_units
from secateur.score.block_influence import block_influence
from tests.blocks import hand_made_blocks
from tests.conftest import geometry_of, pico_model
from tests.unit.score.evidence import evidence


@pytest.mark.parametrize(("cosine", "score"), [(1.0, 0.0), (0.25, 0.75), (-1.0, 2.0)])
def test_it_is_one_minus_the_mean_cosine(cosine: float, score: float) -> None:
    """A block that changes no direction scores nothing."""
    assert block_influence(evidence(torch.ones(1, 1), cosine=cosine)).tolist() == [score]


def test_it_scores_whole_blocks_only() -> None:
    """Layers and both sub-layers, and nothing inside them."""
    assert METHODS["block_influence"].kinds == BLOCK_KINDS


def test_a_layer_that_adds_little_scores_least() -> None:
    """Shrinking what a layer's projections write lowers its own score and those of its sub-layers."""
    model = pico_model(families()["llama"], num_hidden_layers=4)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight *= 1e-3
        model.model.layers[2].self_attn.o_proj.weight *= 1e-3
    geometry = geometry_of(model, families()["llama"])
    statistics = collect(model, hand_made_blocks(), geometry)
    scores = score_units(
        "block_influence", statistics, geometry, BLOCK_KINDS, load_tensor=model.state_dict().get
    ).values
    for kind in BLOCK_KINDS:
        values = torch.cat(scores[kind])
        assert int(values.argmin()) == 2
        assert 0 <= float(values[2]) < 1e-3
