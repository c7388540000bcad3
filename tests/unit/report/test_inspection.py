"""Where a model's parameters are: exact sums by part and by layer."""

from __future__ import annotations

import json

from secateur.evaluate.footprint import model_shapes
from secateur.families.loader import families
from secateur.families.schema import Family
from secateur.report.inspection import inspect_parameters, layers_table, overview_table
from tests.conftest import geometry_of, pico_model


def test_the_parts_are_the_whole(family: Family) -> None:
    """In every family parts add up to the model, and layers to what lies in layers; nothing is counted twice."""
    model = pico_model(family)
    geometry = geometry_of(model, family)
    found = inspect_parameters(model_shapes(model), geometry)
    assert sum(found.parameters.values()) == model.num_parameters()
    inside = sum(parameter.numel() for parameter in model.get_submodule(family.layers).parameters())
    assert sum(sum(layer.values()) for layer in found.layers) == inside
    for part in ("attention", "ffn"):
        assert sum(layer[part] for layer in found.layers) == found.parameters[part] > 0
    assert found.units == {kind: [axis.num_units for axis in axes] for kind, axes in geometry.axes.items()}
    assert set(found.fixed) == {axis.name for axis in family.axes if axis.fixed}


def test_eleven_layers_are_not_confused() -> None:
    """Layer 1 does not take the parameters of layers 10 and 11."""
    family = families()["llama"]
    model = pico_model(family, num_hidden_layers=12)
    found = inspect_parameters(model_shapes(model), geometry_of(model, family))
    assert len(found.layers) == 12
    assert all(layer == found.layers[0] for layer in found.layers)


def test_the_tables_show_counts_shares_and_bytes() -> None:
    """The last row is the total; one row per layer."""
    family = families()["llama"]
    model = pico_model(family)
    found = inspect_parameters(model_shapes(model), geometry_of(model, family))
    rows = overview_table(found, 2).rows
    total = model.num_parameters()
    assert rows[-1] == ["total", f"{total:,}", "100.0%", f"{2 * total / 1000:.1f} kB"]
    assert sum(int(row[1].replace(",", "")) for row in rows[:-1]) == total
    table = layers_table(found)
    assert table.columns == ["layer", "ffn_channels", "gqa_groups", "query_heads", "attention", "ffn", "other"]
    assert [row[:4] for row in table.rows] == [["0", "64", "3", "6"], ["1", "64", "3", "6"]]
    assert json.loads(json.dumps(found.to_dict())) == found.to_dict()
