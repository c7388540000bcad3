"""A calibration pass layer by layer gives what a pass through the whole model gives, bit for bit."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.calibrate.collect import collect, collect_grams, collect_with_grams
from secateur.errors import CheckpointError
from secateur.families.geometry import Geometry
from secateur.families.loader import families
from secateur.families.schema import Family
from secateur.records.units import FFN_CHANNEL, GQA_GROUP
from secateur.stream.sources import LoadedLayers
from secateur.stream.streamed import StreamedModel
from tests.blocks import hand_made_blocks
from tests.conftest import DENSE, WITH_EXPERTS, geometry_of, pico_model


def prepared(family: Family, folder: Path | None = None) -> tuple[Any, StreamedModel, Geometry]:
    """Return a pico model, the same run layer by layer, and its geometry."""
    model = pico_model(family, torch.float32)
    geometry = geometry_of(model, family)
    return model, StreamedModel(LoadedLayers(model, geometry), folder), geometry


def require_equal(found: Any, expected: Any) -> None:
    """Compare records, mappings and tensors all the way down."""
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            require_equal(found[key], value)
    elif hasattr(expected, "__dataclass_fields__"):
        for field in fields(expected):
            if field.name != "tokens_per_s":
                require_equal(getattr(found, field.name), getattr(expected, field.name))
    else:
        assert found == expected


@pytest.mark.parametrize("name", [*DENSE, *WITH_EXPERTS])
def test_statistics_of_every_family_are_the_same(name: str, tmp_path: Path) -> None:
    """Moments, sequences, cosines of layers and sub-layers, token counts, and what experts do."""
    model, streamed, geometry = prepared(families()[name], tmp_path)
    expected = collect(model, hand_made_blocks(), geometry, batch_size=2)
    require_equal(collect(streamed, hand_made_blocks(), geometry, batch_size=2), expected)
    assert list(tmp_path.iterdir()) == [], "hidden states go when the pass is over"


@pytest.mark.parametrize("on_disk", [True, False], ids=["on disk", "in memory"])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_gram_matrices_are_the_same_and_leave_no_file(name: str, on_disk: bool, tmp_path: Path) -> None:
    """Those of finished layers lie on disk until the result is let go."""
    model, streamed, geometry = prepared(families()[name], tmp_path if on_disk else None)
    kinds = [FFN_CHANNEL, GQA_GROUP]
    statistics, expected = collect_with_grams(model, hand_made_blocks(), geometry, kinds, batch_size=2)
    both, grams = collect_with_grams(streamed, hand_made_blocks(), geometry, kinds, batch_size=2)
    alone = collect_grams(streamed, hand_made_blocks(), geometry, kinds, batch_size=2)
    require_equal(both, statistics)
    for found in (grams, alone):
        assert (found.count, sorted(found.sums)) == (expected.count, sorted(expected.sums))
        assert all(torch.equal(found.load(site), expected.load(site)) for site in expected.sums)
    assert bool(list(tmp_path.iterdir())) == on_disk
    del both, grams, alone, found
    assert list(tmp_path.iterdir()) == []


def test_activations_that_are_not_finite_are_named(tmp_path: Path) -> None:
    """By the first layer that has them, as in a whole pass."""
    _, streamed, geometry = prepared(families()["llama"], tmp_path)
    with torch.no_grad():
        streamed.source.model.model.layers[1].mlp.up_proj.weight[3] = float("inf")
    with pytest.raises(CheckpointError, match=r"input of model.layers.1.mlp.down_proj are not finite"):
        collect(streamed, hand_made_blocks(), geometry)
