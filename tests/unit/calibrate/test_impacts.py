"""What single documents say of the units equals removing every unit by itself and looking at each document."""

from __future__ import annotations

from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from secateur.calibrate import ImpactListener, collect, collect_impacts
from secateur.errors import CheckpointError, ConfigError, FamilyError
from secateur.families.geometry import Geometry, UnitAxis, family_sublayer
from secateur.families.loader import families
from secateur.records.impacts import TENSORS, ImpactStatistics, UnitImpacts, judged, merge_impacts
from secateur.records.units import FFN_CHANNEL, SUBLAYER_OF
from secateur.stream.forward import run_backbone
from tests.blocks import HandMadeBlocks, hand_made_blocks, random_documents
from tests.conftest import DENSE, geometry_of, pico_model

NORMED = ("gemma2", "gemma3_text")
"""Families with a norm between a sub-layer and the stream."""


class ExactNorm(nn.Module):
    """Gemma's norm in the dtype of its input; the library's own rounds to float32."""

    def __init__(self, like: Any) -> None:
        super().__init__()
        self.weight, self.eps = like.weight, like.eps

    def forward(self, values: Tensor) -> Tensor:
        """Return the normed values."""
        return values * (values.square().mean(-1, keepdim=True) + self.eps).rsqrt() * (1 + self.weight)


@cache
def small(name: str) -> tuple[Any, Geometry, list[str]]:
    """Return a pico model with norms as exact as its dtype, its geometry, and the kinds it can lose."""
    family = families()[name]
    model = pico_model(family)
    geometry = geometry_of(model, family)
    for layer in range(geometry.num_layers if name in NORMED else 0):
        block = model.get_submodule(geometry.layer_name(layer))
        for sublayer in ("attention", "ffn"):
            norm = family_sublayer(family, sublayer).norms[-1]
            setattr(block, norm, ExactNorm(getattr(block, norm)))
    return model, geometry, [kind for kind in geometry.axes if not geometry.why_fixed(kind)]


def output_place(geometry: Geometry, axis: UnitAxis) -> str:
    """Return the module whose output a unit changes: the layer for an FFN, else what attention hands to the stream."""
    if axis.kind == FFN_CHANNEL:
        return geometry.layer_name(axis.layer)
    norms = family_sublayer(geometry.family, SUBLAYER_OF[axis.kind]).norms
    return f"{geometry.layer_name(axis.layer)}.{norms[-1]}" if len(norms) > 1 else axis.reader


def outputs(model: Any, geometry: Geometry, place: str, blocks: HandMadeBlocks) -> Tensor:
    """Return what a module gives for every token of the blocks."""
    found: list[Tensor] = []

    def keep(_module: nn.Module, _args: Any, output: Any) -> None:
        found.append((output[0] if isinstance(output, tuple) else output).flatten(0, -2))

    (batch,) = blocks.batches(blocks.num_blocks)
    handle = model.get_submodule(place).register_forward_hook(keep)
    try:
        with torch.inference_mode():
            run_backbone(model, batch, geometry.family)
    finally:
        handle.remove()
    return found[0]


def without(unit: int, width: int, _module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Silence the channels of a unit where the reading projection receives them."""
    values = args[0].clone()
    values[..., unit * width : (unit + 1) * width] = 0.0
    return (values, *args[1:])


def brute_force(model: Any, geometry: Geometry, axis: UnitAxis, blocks: HandMadeBlocks) -> Tensor:
    """Return the impact of each unit on each document (documents x units), one pass per unit."""
    place = output_place(geometry, axis)
    (batch,) = blocks.batches(blocks.num_blocks)
    owner, dense = batch.document.flatten(), outputs(model, geometry, place, blocks)
    columns = []
    for unit in range(axis.num_units):
        hook = partial(without, unit, axis.reader_width)
        handle = model.get_submodule(axis.reader).register_forward_pre_hook(hook)
        change = (outputs(model, geometry, place, blocks) - dense).square().sum(1)
        handle.remove()
        columns.append(torch.stack([change[owner == document].sum() for document in range(int(owner.max()) + 1)]))
    return torch.stack(columns, 1).sqrt()


@pytest.mark.parametrize("name", DENSE)
def test_impacts_equal_removing_each_unit(name: str) -> None:
    """Of the layer's output for FFN channels, of the attention block's for groups and heads, norms after them too."""
    model, geometry, kinds = small(name)
    blocks = hand_made_blocks()
    found = collect_impacts(model, blocks, geometry, kinds)
    assert found.num_documents == 7
    for kind in kinds:
        expected = judged(brute_force(model, geometry, geometry.axes[kind][1], blocks))
        assert_same(found.units[1, kind], expected, rtol=1e-10)


def test_leaving_the_norm_out_would_be_wrong() -> None:
    """Behind a norm the plain product of energy and weight is off by more than a tenth."""
    model, geometry, _ = small("gemma2")
    blocks, axis = hand_made_blocks(), geometry.axes[FFN_CHANNEL][1]
    exact = brute_force(model, geometry, axis, blocks).square().sum(0).sqrt()
    sums = collect(model, blocks, geometry).moments[1, FFN_CHANNEL].sum_sq
    plain = (sums * model.get_submodule(axis.reader).weight.detach().square().sum(0)).sqrt()
    scaled = plain * (exact / plain).median()
    assert float(((scaled - exact).abs() / exact).max()) > 0.1


def assert_same(first: UnitImpacts, second: UnitImpacts, rtol: float = 1e-12) -> None:
    """Assert that two records say the same."""
    assert first.count == second.count
    for name in TENSORS:
        torch.testing.assert_close(getattr(first, name), getattr(second, name), rtol=rtol, atol=0)


def assert_alike(first: ImpactStatistics, second: ImpactStatistics) -> None:
    """Assert that two records of texts say the same."""
    assert first.num_documents == second.num_documents
    assert first.units.keys() == second.units.keys()
    for site, units in first.units.items():
        assert_same(units, second.units[site])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_and_blocks_do_not_matter(batch_size: int) -> None:
    """Nor does padding, nor where documents are laid; the calibration pass hears the same."""
    model, geometry, kinds = small("llama")
    expected = collect_impacts(model, hand_made_blocks(), geometry, kinds)
    blocks = hand_made_blocks()
    blocks.rows = [[6, 1], [3, 4, 5], [2], [0]]
    assert_alike(collect_impacts(model, blocks, geometry, kinds, batch_size=batch_size), expected)
    listener = ImpactListener(model, blocks, geometry, kinds)
    collect(model, blocks, geometry, batch_size=batch_size, also=[listener])
    assert_alike(listener.result(), expected)


def test_the_pieces_of_a_document_count_together() -> None:
    """A document in two blocks, met in different batches, has the energy of both: here twice that of one."""
    model, geometry, kinds = small("llama")
    texts = random_documents([6, 5])
    twice = collect_impacts(model, HandMadeBlocks(texts, [[0], [1], [0]], 8), geometry, kinds, batch_size=1)
    once = collect_impacts(model, HandMadeBlocks(texts, [[0], [1]], 8), geometry, kinds)
    assert twice.num_documents == 2
    alone = collect_impacts(model, HandMadeBlocks(texts, [[0]], 8), geometry, kinds)
    for site, units in twice.units.items():
        torch.testing.assert_close(units.impact_sq, once.units[site].impact_sq + alone.units[site].impact_sq)
        assert torch.equal(units.rank_sum, once.units[site].rank_sum)


def test_shards_add_up() -> None:
    """Two texts together say what their records say merged."""
    model, geometry, kinds = small("llama")
    whole = hand_made_blocks()
    shards = []
    for rows in (whole.rows[:2], whole.rows[2:]):
        shard = hand_made_blocks()
        shard.rows = rows
        shards.append(collect_impacts(model, shard, geometry, kinds))
    assert_alike(merge_impacts(shards), collect_impacts(model, whole, geometry, kinds))
    with pytest.raises(ValueError, match="sites"):
        merge_impacts([shards[0], ImpactStatistics(1, {})])


def test_what_cannot_be_judged_is_refused() -> None:
    """Weights that are not plain numbers, norms of another form, activations that are not finite."""
    family = families()["gemma2"]
    model = pico_model(family)
    geometry = geometry_of(model, family)
    block = model.model.layers[0]
    block.post_feedforward_layernorm = nn.LayerNorm(48, dtype=torch.float64)
    with pytest.raises(FamilyError, match="post_feedforward_layernorm is not an RMS norm"):
        collect_impacts(model, hand_made_blocks(), geometry, [FFN_CHANNEL])
    llama = pico_model(families()["llama"])
    geometry = geometry_of(llama, families()["llama"])
    llama.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="down_proj"):
        collect_impacts(llama, hand_made_blocks(), geometry, [FFN_CHANNEL])
    llama.model.layers[1].mlp.down_proj.weight = nn.Parameter(torch.zeros(48, 64, dtype=torch.int8), False)
    with pytest.raises(ConfigError, match=r"cus_prun needs weights; .*down_proj has no plain weight"):
        collect_impacts(llama, hand_made_blocks(), geometry, [FFN_CHANNEL], who="cus_prun")


def test_half_precision_is_close() -> None:
    """In bfloat16 the sums are float32: impacts differ by the activations' own rounding."""
    model, geometry, kinds = small("llama")
    exact = collect_impacts(model, hand_made_blocks(), geometry, kinds)
    half = pico_model(families()["llama"]).to(torch.bfloat16)
    found = collect_impacts(half, hand_made_blocks(), geometry, kinds)
    for site, units in found.units.items():
        assert float(((units.impact_max - exact.units[site].impact_max).abs() / units.impact_max).median()) < 0.05
