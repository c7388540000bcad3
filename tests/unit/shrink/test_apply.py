"""Applying plans: which tensors change, how, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from secateur.errors import FamilyError, PlanError
from secateur.families.loader import families
from secateur.records.plan import Plan
from secateur.shrink import check_plan, shrink_config, shrink_parameters
from tests.conftest import geometry_of, pico_model
from tests.pruning import choose_units, logits, masked, plan_keeping, prune, relative_difference

FFN, GROUPS = "ffn_channel", "gqa_group"


def dense(name: str = "llama", **extra: Any) -> tuple[Any, Any]:
    """Return a pico model and its geometry."""
    family = families()[name]
    model = pico_model(family, **extra)
    return model, geometry_of(model, family)


def shrunk(model: Any, plan: Plan, geometry: Any) -> dict[str, torch.Tensor]:
    """Return the shrunk parameters of a model."""
    return dict(shrink_parameters(model.state_dict().items(), plan, geometry))


def test_rows_and_columns_of_removed_units_go_and_nothing_else_changes() -> None:
    """Named slices of named tensors, by plain indexing; all other tensors are the dense ones."""
    model, geometry = dense("llama")
    plan = plan_keeping(geometry, {FFN: [[1, 5, 63], [0, 2, 4]], GROUPS: [[0, 2], [1, 2]]}, "uniform")
    before, after = model.state_dict(), shrunk(model, plan, geometry)
    assert list(after) == list(before)
    layer = "model.layers.0."
    expected = {
        layer + "mlp.gate_proj.weight": before[layer + "mlp.gate_proj.weight"][[1, 5, 63]],
        layer + "mlp.down_proj.weight": before[layer + "mlp.down_proj.weight"][:, [1, 5, 63]],
        layer + "self_attn.q_proj.weight": before[layer + "self_attn.q_proj.weight"]
        .view(3, 16, 48)[[0, 2]]
        .flatten(0, 1),
        layer + "self_attn.k_proj.weight": before[layer + "self_attn.k_proj.weight"]
        .view(3, 8, 48)[[0, 2]]
        .flatten(0, 1),
        layer + "self_attn.o_proj.weight": before[layer + "self_attn.o_proj.weight"]
        .view(48, 3, 16)[:, [0, 2]]
        .flatten(1),
    }
    for name, tensor in expected.items():
        assert torch.equal(after[name], tensor), name
        assert after[name].is_contiguous()
    for name in ("model.embed_tokens.weight", "model.norm.weight", layer + "input_layernorm.weight", "lm_head.weight"):
        assert torch.equal(after[name], before[name])


def test_the_dense_model_is_not_changed() -> None:
    """Shrinking reads; afterwards the dense model says what it said."""
    model, geometry = dense("opt")
    token_ids = torch.arange(20).reshape(2, 10)
    before = logits(model, token_ids)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kept = choose_units(geometry, [FFN], "uneven")
    prune(model, plan_keeping(geometry, kept, "uneven", {(0, FFN): {_removed(kept[FFN][0]): 3.0}}), geometry)
    assert torch.equal(logits(model, token_ids), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def _removed(kept: Any) -> int:
    return next(unit for unit in range(64) if unit not in kept)


def test_a_plan_that_keeps_everything_changes_nothing() -> None:
    """All units kept: the same tensors and the same configuration."""
    model, geometry = dense("phi3")
    plan = plan_keeping(geometry, {FFN: [range(64)] * 2, GROUPS: [range(3)] * 2}, "uniform")
    before, after = model.state_dict(), shrunk(model, plan, geometry)
    assert all(torch.equal(after[name], before[name]) for name in before)
    config = model.config.to_dict()
    assert {**shrink_config(config, plan, geometry)} == config


def test_uniform_configurations_stay_stock() -> None:
    """Only the sizes change."""
    model, geometry = dense("llama")
    config = model.config.to_dict()
    plan = plan_keeping(geometry, {FFN: [range(40)] * 2, GROUPS: [[0, 1], [1, 2]]}, "uniform")
    changed = shrink_config(config, plan, geometry)
    assert {key for key in changed if changed[key] != config[key]} == {
        "intermediate_size",
        "num_key_value_heads",
        "num_attention_heads",
    }
    assert (changed["intermediate_size"], changed["num_key_value_heads"], changed["num_attention_heads"]) == (40, 2, 4)


def test_uneven_configurations_name_the_layers_that_differ() -> None:
    """Layers that keep everything are not named; the model's own sizes stay as they were."""
    model, geometry = dense("llama")
    config = {**model.config.to_dict(), "architectures": ["LlamaForCausalLM"]}
    plan = plan_keeping(geometry, {FFN: [range(64), range(40)], GROUPS: [[0, 1, 2], [1]]}, "uneven")
    changed = shrink_config(config, plan, geometry)
    assert changed["model_type"] == "pruned_llama"
    assert changed["per_layer_config"] == {
        "1": {"intermediate_size": 40, "num_key_value_heads": 1, "num_attention_heads": 2, "head_dim": 8}
    }
    assert changed["intermediate_size"] == 64
    assert "architectures" not in changed
    assert config["model_type"] == "llama", "the dense configuration is not changed"


def test_layers_of_an_uneven_configuration_keep_what_they_had() -> None:
    """A second cut updates the layers it touches, whatever its shape, and our model type is not prefixed twice."""
    model, geometry = dense("llama")
    first = plan_keeping(geometry, {FFN: [range(64), range(40)]}, "uneven")
    config = shrink_config(model.config.to_dict(), first, geometry)
    once = prune(model, first, geometry)
    uneven = geometry_of(once, families()["llama"])
    second = plan_keeping(uneven, {GROUPS: [[0, 1], [1, 2]]}, "uniform")
    changed = shrink_config(config, second, uneven)
    assert changed["model_type"] == "pruned_llama"
    groups = {"num_key_value_heads": 2, "num_attention_heads": 4, "head_dim": 8}
    assert changed["per_layer_config"] == {"0": groups, "1": {"intermediate_size": 40, **groups}}
    assert config["per_layer_config"] == {"1": {"intermediate_size": 40}}, "the input is not changed"


def test_biases_take_over_constants_where_the_reader_has_one() -> None:
    """A llama with biases everywhere, which no other test has: masked with constants equals folded."""
    model, geometry = dense("llama", attention_bias=True, mlp_bias=True)
    kept = choose_units(geometry, [FFN, GROUPS], "uneven")
    gone = next(unit for unit in range(3) if unit not in kept[GROUPS][0])
    constants = {(0, FFN): {_removed(kept[FFN][0]): 0.75}, (0, GROUPS): {16 * gone + 3: -1.5, 16 * gone + 15: 0.5}}
    pruned = prune(model, plan_keeping(geometry, kept, "uneven", constants), geometry)
    token_ids = torch.arange(20).reshape(2, 10)
    with masked(model, geometry, kept, constants):
        expected = logits(model, token_ids)
    assert relative_difference(logits(pruned, token_ids), expected) <= 1e-12


def test_parameters_may_come_one_at_a_time() -> None:
    """Shrinking is lazy: nothing is read before it is asked for."""
    model, geometry = dense("llama")
    read = []

    def parameters() -> Any:
        for name, tensor in model.state_dict().items():
            read.append(name)
            yield name, tensor

    stream = shrink_parameters(parameters(), plan_keeping(geometry, {FFN: [range(9)] * 2}, "uniform"), geometry)
    assert read == []
    next(stream)
    assert len(read) == 1


def test_a_bias_before_its_weight_is_refused() -> None:
    """A constant cannot be folded before the weight is known; the parameter is named."""
    model, geometry = dense("opt")
    plan = plan_keeping(geometry, {FFN: [range(1, 64)] * 2}, "uniform", {(0, FFN): {0: 1.0}})
    backwards = list(model.state_dict().items())[::-1]
    with pytest.raises(PlanError, match=r"layers\.0\.fc2\.bias came before its weight"):
        list(shrink_parameters(backwards, plan, geometry))


def test_a_constant_without_a_bias_is_refused() -> None:
    """A shift that no bias can take is not dropped in silence."""
    model, geometry = dense("llama")
    plan = plan_keeping(geometry, {FFN: [range(1, 64)] * 2}, "uniform", {(1, FFN): {0: 1.0}})
    with pytest.raises(PlanError, match=r"model\.layers\.1\.mlp\.down_proj has no bias"):
        shrunk(model, plan, geometry)


@pytest.mark.parametrize("channel", [5, 64, -1], ids=["of a kept unit", "beyond the end", "negative"])
def test_a_constant_of_a_channel_that_stays_is_refused(channel: int) -> None:
    """After an edit by hand a kept channel must not be counted twice."""
    model, geometry = dense("opt")
    plan = plan_keeping(geometry, {FFN: [range(1, 64)] * 2}, "uniform", {(1, FFN): {channel: 1.0}})
    with pytest.raises(PlanError, match=rf"constant for channel {channel} of layer 1.*not removed"):
        shrunk(model, plan, geometry)


def test_a_plan_for_another_model_is_refused() -> None:
    """Family, number of layers and unit counts are compared, and both sides are named."""
    _, geometry = dense("llama")
    plan = plan_keeping(geometry, {FFN: [range(9)] * 2}, "uniform")
    check_plan(plan, geometry)
    with pytest.raises(PlanError, match=r"the plan is for a llama model; this is a mistral model. Plan again"):
        check_plan(plan, dense("mistral")[1])
    with pytest.raises(
        PlanError, match=r"expects ffn_channel counts \[64, 64\].* in 2 layers; the model has \[32, 32\]"
    ):
        check_plan(plan, dense("llama", intermediate_size=32)[1])
    with pytest.raises(PlanError, match=r"in 2 layers; the model has .* in 3\."):
        check_plan(plan, dense("llama", num_hidden_layers=3)[1])
    fewer = replace(plan, layers={FFN: plan.layers[FFN][:1]})
    with pytest.raises(PlanError, match="in 1 layers; the model has"):
        next(shrink_parameters([], fewer, geometry), None)


def test_units_that_cannot_be_cut_are_refused() -> None:
    """A plan written by hand cannot remove what the family says is fixed."""
    model, geometry = dense("gpt2")
    with pytest.raises(FamilyError, match=r"gqa_group.*GPT-2 derives the width of a head"):
        shrunk(model, plan_keeping(geometry, {GROUPS: [range(5)] * 2}, "uniform"), geometry)
    shrunk(model, plan_keeping(geometry, {GROUPS: [range(6)] * 2}, "uniform"), geometry)


def test_a_uniform_plan_that_the_configuration_refuses_is_refused() -> None:
    """Five heads do not divide 48: said before anything is built, with the counts that do."""
    model, geometry = dense("llama", num_key_value_heads=6)
    assert geometry.allowed_counts(GROUPS) == [6, 4, 3, 2, 1]
    plan = plan_keeping(geometry, {GROUPS: [range(5), range(1, 6)]}, "uniform")
    with pytest.raises(PlanError, match=r"keeps 5 gqa_groups per layer.*one of \[6, 4, 3, 2, 1\], or set shape to un"):
        shrunk(model, plan, geometry)
    shrunk(model, replace(plan, shape="uneven"), geometry)


def test_configurations_of_fewer_layers_stay_stock() -> None:
    """The count and every list with an entry per layer are cut; nothing else changes."""
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    model, geometry = dense("qwen2", num_hidden_layers=3, layer_types=types, use_sliding_window=True)
    config = model.config.to_dict()
    plan = plan_keeping(geometry, {FFN: [[], range(64), range(64)], GROUPS: [[], range(3), range(3)]}, "uniform")
    changed = shrink_config(config, plan, geometry)
    assert {key: changed[key] for key in changed if changed[key] != config[key]} == {
        "num_hidden_layers": 2,
        "layer_types": ["full_attention", "sliding_attention"],
    }
    names = set(shrunk(model, plan, geometry))
    assert {name.split(".")[2] for name in names if ".layers." in name} == {"0", "1"}


def test_uneven_configurations_say_what_a_layer_lacks() -> None:
    """Under the new index, in transformers' words, and without the sizes of what is gone."""
    model, geometry = dense("llama", num_hidden_layers=4)
    narrow = plan_keeping(geometry, {GROUPS: [range(3), range(3), [1], [0, 2]]}, "uneven")
    once = prune(model, narrow, geometry)
    uneven = geometry_of(once, families()["llama"])
    kept = {FFN: [[], range(64), range(64), range(9)], GROUPS: [[], range(3), [], range(2)]}
    config = shrink_config(once.config.to_dict(), plan_keeping(uneven, kept, "uneven"), uneven)
    assert config["num_hidden_layers"] == 3
    groups = {"num_key_value_heads": 2, "num_attention_heads": 4}
    last = config["per_layer_config"]["2"]
    assert config["per_layer_config"]["1"]["skip"] == ["attention"]
    assert not {"num_key_value_heads", "num_attention_heads"} & set(config["per_layer_config"]["1"])
    assert {**last, **groups, "intermediate_size": 9} == last
    again = geometry_of(prune(once, plan_keeping(uneven, kept, "uneven"), uneven), families()["llama"])
    assert (again.num_units(GROUPS), again.num_units(FFN)) == ([3, 0, 2], [64, 64, 9])


def test_a_layer_left_without_anything_must_be_said_to_go() -> None:
    """Where a layer lacks attention already, taking its FFN needs entries for both kinds."""
    model, geometry = dense("llama")
    once = prune(model, plan_keeping(geometry, {GROUPS: [range(3), []]}, "uneven"), geometry)
    uneven = geometry_of(once, families()["llama"])
    with pytest.raises(PlanError, match=r"leaves nothing in layer 1, but does not say .* entries for gqa_group"):
        check_plan(plan_keeping(uneven, {FFN: [range(64), []]}, "uneven"), uneven)
    whole = plan_keeping(uneven, {FFN: [range(64), []], GROUPS: [range(3), []]}, "uneven")
    check_plan(whole, uneven)
    assert whole.removed_layers == (1,)


def test_generation_settings_do_not_depend_on_layers() -> None:
    """They come over as they are."""
    model, geometry = dense("llama")
    plan = plan_keeping(geometry, {FFN: [range(64), []], GROUPS: [range(3), []]}, "uniform")
    assert prune(model, plan, geometry).generation_config.to_dict() == model.generation_config.to_dict()
