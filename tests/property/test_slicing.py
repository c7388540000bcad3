"""Cutting composes: two plans after each other are their product."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.families.geometry import Geometry, Segment, build_geometry
from secateur.families.loader import families
from secateur.records.units import FFN_CHANNEL, GQA_GROUP
from secateur.shrink import shrink_config, shrink_parameters
from secateur.shrink.slicing import kept_rows
from tests.conftest import geometry_of, pico_model
from tests.pruning import plan_keeping

NAMES = ["llama", "phi3", "gpt2", "phi"]


@cache
def dense(name: str) -> tuple[Any, Geometry]:
    """Return a pico model and its geometry."""
    family = families()[name]
    model = pico_model(family)
    return model, geometry_of(model, family)


@st.composite
def two_cuts(draw: st.DrawFn, num_units: int) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Return, for two layers, units to keep first, which of those to keep then, and both in one step."""
    first = [sorted(draw(st.sets(st.integers(0, num_units - 1), min_size=1))) for _ in range(2)]
    second = [sorted(draw(st.sets(st.integers(0, len(once) - 1), min_size=1))) for once in first]
    product = [[once[unit] for unit in then] for once, then in zip(first, second, strict=True)]
    return first, second, product


@settings(max_examples=30)
@given(st.sampled_from(NAMES), two_cuts(64), two_cuts(3))
def test_two_cuts_are_their_product(name: str, channels: Any, groups: Any) -> None:
    """Cutting A and then B gives the tensors and the sizes of cutting both at once."""
    model, geometry = dense(name)
    kinds = {FFN_CHANNEL: channels} if geometry.axes[GQA_GROUP][0].fixed else {FFN_CHANNEL: channels, GQA_GROUP: groups}
    first, second, product = ({kind: cuts[step] for kind, cuts in kinds.items()} for step in range(3))
    config = model.config.to_dict()
    plan = plan_keeping(geometry, first, "uneven")
    once = dict(shrink_parameters(model.state_dict().items(), plan, geometry))
    once_config = shrink_config(config, plan, geometry)
    middle = build_geometry(families()[name], once_config)
    plan = plan_keeping(middle, second, "uneven")
    twice = dict(shrink_parameters(once.items(), plan, middle))
    twice_config = shrink_config(once_config, plan, middle)

    plan = plan_keeping(geometry, product, "uneven")
    direct = dict(shrink_parameters(model.state_dict().items(), plan, geometry))
    direct_config = shrink_config(config, plan, geometry)
    assert twice.keys() == direct.keys()
    assert all(torch.equal(twice[key], direct[key]) for key in direct)
    sizes = [
        [[axis.num_units for axis in axes] for axes in build_geometry(families()[name], c).axes.values()]
        for c in (twice_config, direct_config)
    ]
    assert sizes[0] == sizes[1]


@given(st.integers(0, 5), st.integers(1, 4), st.integers(1, 6), st.integers(0, 5), st.data())
def test_kept_rows_equal_a_loop(offset: int, width: int, units: int, tail: int, data: st.DataObject) -> None:
    """A row stays unless it belongs to a removed unit."""
    kept = sorted(data.draw(st.sets(st.integers(0, units - 1))))
    num_rows = offset + width * units + tail
    expected = [
        row for row in range(num_rows) if not offset <= row < offset + width * units or (row - offset) // width in kept
    ]
    assert kept_rows([(Segment("m", "out", offset, width), units, kept)], num_rows).tolist() == expected
