"""How large models are: what shapes come to, in whole numbers."""

from __future__ import annotations

import pytest

from secateur.errors import FamilyError
from secateur.estimate.size import measure, narrowed, size_of_config
from secateur.families.schema import Family
from tests.conftest import geometry_of, pico_model
from tests.unit.estimate.papers import ATTENTION, CONFIG, FFN, LAYER, TOTAL


def test_a_model_on_paper_has_the_parameters_that_multiplying_its_sizes_gives() -> None:
    """No weight is made for it, and tied weights count once."""
    size = size_of_config(CONFIG)
    assert size.parameters == TOTAL
    assert size.in_layers == 4 * (LAYER + 200)
    assert [layer.active for layer in size.layers] == [LAYER] * 4
    assert (size.widest.ffn, size.heads, size.kv, size.vocab, size.hidden) == (300, 100, 50, 1000, 100)


def test_every_family_counts_what_its_model_holds(family: Family) -> None:
    """Parameters are those of the real model, and sites are as wide as the projections that read them."""
    model = pico_model(family)
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    size = measure(geometry_of(model, family), model.config.to_dict(), shapes, 4)
    assert size.parameters == sum(value.numel() for value in model.parameters())
    assert [site.width for site in size.sites(["ffn_channel"])] == [64, 64]
    assert len(size.sites(["gqa_group", "query_head"])) == 2, "both read the same projection"


def test_a_token_uses_only_the_experts_it_is_sent_to(moe_family: Family) -> None:
    """Of the routed experts' weights the share per token / experts is active; all are held."""
    model = pico_model(moe_family)
    geometry = geometry_of(model, moe_family)
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    size = measure(geometry, model.config.to_dict(), shapes, 4)
    layer = max(geometry.expert_layers)
    experts = geometry.experts[layer]
    assert experts is not None
    held = sum(value.numel() for name, value in model.named_parameters() if name.startswith(experts.module + "."))
    small = sum(
        value.numel()
        for name, value in model.named_parameters()
        if geometry.layer_of(name) == layer and (value.dim() < 2) and not name.startswith(experts.module + ".")
    )
    expected = size.layers[layer].parameters - held - small + held * experts.per_token / experts.num_experts
    assert size.layers[layer].active == round(expected)
    assert size.layers[layer].parameters > size.layers[layer].active


def test_what_stays_is_counted_by_part() -> None:
    """Half of the FFN gone leaves attention and embedding; half of the layers halves both."""
    size = size_of_config(CONFIG)
    assert narrowed(size, {"ffn": 0.5}).parameters == TOTAL - 4 * FFN // 2
    assert narrowed(size, {"ffn": 0.5}).widest.ffn == 150
    assert narrowed(size, {"layers": 0.5}).parameters == TOTAL - 4 * LAYER // 2
    assert narrowed(size, {"attention": 0.5}).parameters == TOTAL - 4 * ATTENTION // 2
    assert narrowed(size, {}).parameters == TOTAL


def test_an_unknown_model_type_is_refused() -> None:
    """The message lists what is supported."""
    with pytest.raises(FamilyError, match="model type"):
        size_of_config({**CONFIG, "model_type": "no_such"})
