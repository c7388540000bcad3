"""Experts in geometries: which layers have them, what their routers can do, and what configurations say afterwards."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from secateur.errors import FamilyError
from secateur.families.geometry import Geometry, RoutedExperts, TensorSlice, build_geometry
from secateur.families.loader import families
from secateur.families.older_keys import older_keys
from secateur.families.schema import Experts, Family
from secateur.records.units import EXPERT, EXPERT_CHANNEL, FFN, FFN_CHANNEL, GQA_GROUP, LAYER_UNIT_KINDS, SHARED_CHANNEL

QWEN: dict[str, Any] = {
    "num_hidden_layers": 6,
    "hidden_size": 64,
    "vocab_size": 100,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "num_experts": 10,
    "num_local_experts": 10,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
}
DEEPSEEK: dict[str, Any] = {
    "num_hidden_layers": 6,
    "hidden_size": 64,
    "vocab_size": 100,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "v_head_dim": 8,
    "n_routed_experts": 16,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "first_k_dense_replace": 2,
}


def qwen(**changes: Any) -> Geometry:
    """Return the geometry of a qwen2_moe with six layers."""
    return build_geometry(families()["qwen2_moe"], {**QWEN, **changes})


def deepseek(**changes: Any) -> Geometry:
    """Return the geometry of a deepseek_v3 with six layers."""
    return build_geometry(families()["deepseek_v3"], {**DEEPSEEK, **changes})


def with_experts(geometry: Geometry) -> list[int]:
    """Return the layers that have experts."""
    return [layer for layer, experts in enumerate(geometry.experts) if experts is not None]


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"mlp_only_layers": [], "decoder_sparse_step": 1}, [0, 1, 2, 3, 4, 5]),
        ({"mlp_only_layers": [0, 3]}, [1, 2, 4, 5]),
        ({"decoder_sparse_step": 2}, [1, 3, 5]),
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, [1, 5]),
    ],
)
def test_the_configuration_says_which_layers_have_experts(changes: dict[str, Any], layers: list[int]) -> None:
    """A layer has experts or channels, and an FFN sub-layer in both cases."""
    geometry = qwen(**changes)
    assert with_experts(geometry) == layers
    assert geometry.num_units(EXPERT) == [10 * (layer in layers) for layer in range(6)]
    assert geometry.num_units(EXPERT_CHANNEL) == [320 * (layer in layers) for layer in range(6)]
    assert geometry.num_units(SHARED_CHANNEL) == [48 * (layer in layers) for layer in range(6)]
    assert geometry.num_units(FFN_CHANNEL) == [96 * (layer not in layers) for layer in range(6)]
    assert all(geometry.has_sublayer(FFN, layer) for layer in range(6))
    assert [geometry.sublayer_axis(FFN, layer).kind for layer in range(6)] == [
        EXPERT if layer in layers else FFN_CHANNEL for layer in range(6)
    ]


def test_layers_of_different_numbers_of_experts_keep_their_widths() -> None:
    """Their channels have no common step; those of layers with equal numbers have one."""
    key = families()["qwen2_moe"].dimensions["num_experts"].config
    cut = qwen(per_layer_config={str(layer): {key: 5 + layer % 2} for layer in range(6)})
    with pytest.raises(FamilyError, match="different numbers of experts; cut channels first"):
        cut.require_cuttable([EXPERT_CHANNEL])
    cut.require_cuttable([EXPERT, SHARED_CHANNEL])
    qwen(mlp_only_layers=[0, 3]).require_cuttable([EXPERT_CHANNEL])


def test_what_is_known_of_the_experts_of_a_layer() -> None:
    """Full names, sizes, groups and gates are read from the configuration."""
    assert deepseek(norm_topk_prob=False).experts[2] == RoutedExperts(
        layer=2,
        module="model.layers.2.mlp.experts",
        router="model.layers.2.mlp.gate",
        num_experts=16,
        per_token=3,
        width=32,
        num_groups=4,
        renormalised=False,
        groups_per_token=2,
        min_per_group=2,
    )
    found = deepseek(n_group=None, topk_group=None).experts[2]
    assert found is not None
    assert (found.num_groups, found.groups_per_token, found.renormalised) == (1, 1, True)


def test_the_slices_of_an_expert_and_of_its_channels() -> None:
    """Experts are entries of dimension 0; channels lie along another one, one set per expert."""
    axis = deepseek().axes[EXPERT][2]
    assert (axis.num_units, axis.per_group, axis.num_groups, axis.reader) == (16, 4, 4, "model.layers.2.mlp.experts")
    assert [segment.module for segment in axis.segments] == ["model.layers.2.mlp.gate"]
    assert axis.tensors == (
        TensorSlice("model.layers.2.mlp.experts.gate_up_proj", 0, 0, 1),
        TensorSlice("model.layers.2.mlp.experts.down_proj", 0, 0, 1),
        TensorSlice("model.layers.2.mlp.gate.e_score_correction_bias", 0, 0, 1, is_buffer=True),
    )
    channels = qwen().axes[EXPERT_CHANNEL][1]
    assert (channels.num_units, channels.per_group, channels.num_groups, channels.segments) == (320, 32, 10, ())
    assert channels.tensors == (
        TensorSlice("model.layers.1.mlp.experts.gate_up_proj", 1, 0, 1, stacked=True),
        TensorSlice("model.layers.1.mlp.experts.gate_up_proj", 1, 32, 1, stacked=True),
        TensorSlice("model.layers.1.mlp.experts.down_proj", 2, 0, 1, stacked=True),
    )
    dense = qwen(mlp_only_layers=[1]).axes
    assert all(dense[kind][1].tensors == () for kind in (EXPERT, EXPERT_CHANNEL))


def test_counts_that_a_router_can_work_with() -> None:
    """Whole groups of at least two, reachable by enough experts per token."""
    geometry = deepseek()
    assert geometry.allowed_counts(EXPERT) == [16, 12, 8]
    assert (geometry.step(EXPERT), geometry.fewest(EXPERT)) == (4, 8)
    assert qwen().allowed_counts(EXPERT) == [10, 9, 8, 7, 6, 5, 4]
    assert (qwen().step(EXPERT), qwen().fewest(EXPERT)) == (1, 4)
    assert deepseek(topk_group=1).allowed_counts(EXPERT) == [16, 12]
    assert deepseek(n_group=1, topk_group=1).allowed_counts(EXPERT) == list(range(16, 2, -1))


def test_widths_that_the_product_of_all_experts_takes() -> None:
    """Every expert keeps a multiple of eight channels; DeepSeek's shared ones are a whole number of them wide."""
    assert qwen().allowed_counts(EXPERT_CHANNEL) == [320, 240, 160, 80]
    assert deepseek().allowed_counts(EXPERT_CHANNEL) == [16 * 32, 16 * 16, 16 * 8]
    assert deepseek().config_updates(EXPERT_CHANNEL, 16 * 8) == {"moe_intermediate_size": 8, "n_shared_experts": 8}
    reason = qwen().why_impossible(EXPERT_CHANNEL, 10 * 12, 0)
    assert reason is not None
    assert "a width per expert that is a multiple of 8" in reason


def test_configurations_of_fewer_layers_say_which_have_experts() -> None:
    """Lists are numbered anew, a step is written out, and the first dense layers are counted."""
    assert qwen(mlp_only_layers=[0, 3]).layers_updates([0, 1, 3, 5]) == {
        "num_hidden_layers": 4,
        "mlp_only_layers": [0, 2],
        "decoder_sparse_step": 1,
    }
    stepped = qwen(decoder_sparse_step=2)
    updates = stepped.layers_updates([1, 2, 3])
    assert with_experts(qwen(**updates)) == [0, 2]
    assert deepseek().layers_updates([1, 3, 4]) == {"num_hidden_layers": 3, "first_k_dense_replace": 1}
    llama = build_geometry(families()["llama"], {**QWEN, "num_hidden_layers": 3})
    assert llama.layers_updates([0, 2]) == {"num_hidden_layers": 2}


def test_a_layer_without_its_experts_is_still_one_of_those_with_experts() -> None:
    """Where the sub-layer is skipped nothing of it is there, but the configuration builds it before it goes."""
    geometry = qwen(mlp_only_layers=[0], per_layer_config={"2": {"skip": ["mlp"]}, "3": {"num_experts": 6}})
    assert with_experts(geometry) == [1, 3, 4, 5]
    assert geometry.expert_layers == {1, 2, 3, 4, 5}
    assert geometry.num_units(EXPERT) == [0, 10, 0, 6, 10, 10]
    assert not geometry.has_sublayer(FFN, 2)
    assert geometry.layers_updates([0, 1, 2])["mlp_only_layers"] == [0]


def test_kinds_that_a_model_lacks_are_refused_with_the_reason() -> None:
    """Of the family, of the model, or because their weights hang together."""
    with pytest.raises(FamilyError, match=r"no layer of this model has FFN channels\. Use units: "):
        qwen().require_cuttable([FFN_CHANNEL])
    assert qwen(mlp_only_layers=[2]).why_fixed(FFN_CHANNEL) is None
    with pytest.raises(FamilyError, match="experts of a llama model cannot be cut: no model of this family has any"):
        build_geometry(families()["llama"], QWEN).require_cuttable([EXPERT])
    with pytest.raises(FamilyError, match="times as wide as a routed one"):
        deepseek().require_cuttable([SHARED_CHANNEL])
    with pytest.raises(FamilyError, match="one compressed key and value"):
        deepseek().require_cuttable([GQA_GROUP])
    assert set(qwen().axes) == set(LAYER_UNIT_KINDS)


def test_the_name_of_the_hub_is_written_beside_todays() -> None:
    """A key that older readers look for has another name in transformers 5."""
    assert older_keys({"num_local_experts": 5}, families()["qwen3_moe"]) == {"num_experts": 5}
    assert older_keys({}, families()["qwen3_moe"]) == {}


def family_file(**changes: Any) -> dict[str, Any]:
    """Return the plain data of the mixtral family, changed."""
    return {**families()["mixtral"].model_dump(exclude_defaults=True), **changes}


def axes_with(name: str, **changes: Any) -> list[dict[str, Any]]:
    """Return the axes of the mixtral family, one of them changed."""
    return [axis | (changes if axis["name"] == name else {}) for axis in family_file()["axes"]]


def experts_with(**changes: Any) -> dict[str, Any]:
    """Return the [experts] of the mixtral family, changed."""
    return {**family_file()["experts"], **changes}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"experts": None}, "axes ffn_channel, expert, expert_channel are about layers with experts; say under"),
        ({"experts": experts_with(width="size")}, r"\[experts\] names size, which is not under \[dimensions\]"),
        ({"axes": [a for a in axes_with("") if a["name"] != "expert"]}, "describes the axis expert"),
        ({"axes": axes_with("expert", layers="all")}, "have layers = .experts.; see \\['expert'\\]"),
        ({"axes": axes_with("gqa_group", layers="experts")}, "have layers = .experts.; see \\['gqa_group'\\]"),
        ({"axes": axes_with("expert_channel", per_group=None)}, "has stacked tensors, so `per_group` must say"),
        ({"axes": axes_with("expert", tensors=[{"name": "x", "stacked": True}])}, "x is stacked, so dimension 0"),
        ({"axes": axes_with("expert", tensors=[{"name": "x", "axis": 0}])}, "Extra inputs are not permitted"),
        ({"axes": [*axes_with(""), axes_with("")[-1]]}, "at most once; got .*expert_channel, expert_channel"),
        ({"experts": experts_with(num_groups="num_experts")}, "both num_groups and groups_per_token, or neither"),
        ({"experts": experts_with(step="k")}, "a step also need dense_layers"),
        ({"experts": experts_with(expert="x")}, "Extra inputs are not permitted"),
    ],
)
def test_a_family_file_that_contradicts_itself_about_experts_is_refused(changes: dict[str, Any], words: str) -> None:
    """Every contradiction is named."""
    with pytest.raises(ValidationError, match=words):
        Family.model_validate(family_file(**changes))


def test_whether_gates_add_up_is_a_constant_or_a_key() -> None:
    """Families say it for all models, or name the key of the configuration."""
    plain = {"module": "m", "router": "r", "count": "c", "per_token": "p", "width": "w"}
    assert Experts.model_validate({**plain, "renormalised": True}).renormalised.default
    keyed = Experts.model_validate({**plain, "renormalised": {"config": "norm", "default": False}})
    assert (keyed.renormalised.config, keyed.renormalised.default) == ("norm", False)
