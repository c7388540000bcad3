"""Geometry: the integers that a configuration gives, worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from secateur.errors import FamilyError
from secateur.families.geometry import (
    Geometry,
    LinearOutput,
    Segment,
    build_geometry,
    is_inside,
    parameters_by_part,
    resolve_dimensions,
)
from secateur.families.loader import families, family_of

LLAMA = {
    "num_hidden_layers": 3,
    "hidden_size": 64,
    "vocab_size": 100,
    "intermediate_size": 160,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


def llama(**changes: Any) -> Geometry:
    """Return the geometry of a small grouped-query llama with some configuration keys changed."""
    return build_geometry(families()["llama"], {**LLAMA, **changes})


def test_grouped_query_attention_in_numbers() -> None:
    """Two groups of four query heads of 16: 64 query rows, 16 key and value rows, 64 output columns per group."""
    axis = llama().axes["gqa_group"][1]
    assert (axis.kind, axis.layer, axis.num_units, axis.fixed) == ("gqa_group", 1, 2, None)
    assert (axis.reader, axis.reader_width) == ("model.layers.1.self_attn.o_proj", 64)
    assert axis.segments == (
        Segment("model.layers.1.self_attn.q_proj", "out", 0, 64),
        Segment("model.layers.1.self_attn.k_proj", "out", 0, 16),
        Segment("model.layers.1.self_attn.v_proj", "out", 0, 16),
        Segment("model.layers.1.self_attn.o_proj", "in", 0, 64),
    )
    assert axis.linear == ()


def test_ffn_channels_in_numbers() -> None:
    """One row of gate and up and one column of down per channel."""
    axis = llama().axes["ffn_channel"][2]
    assert (axis.num_units, axis.reader, axis.reader_width) == (160, "model.layers.2.mlp.down_proj", 1)
    assert axis.linear == (
        LinearOutput("model.layers.2.mlp.gate_proj", 0),
        LinearOutput("model.layers.2.mlp.up_proj", 0),
    )
    assert [(s.module.rpartition(".")[2], s.side, s.offset, s.width) for s in axis.segments] == [
        ("gate_proj", "out", 0, 1),
        ("up_proj", "out", 0, 1),
        ("down_proj", "in", 0, 1),
    ]


@pytest.mark.parametrize("absent", [{}, {"head_dim": None}], ids=["missing", "null"])
def test_a_missing_head_dim_is_hidden_size_over_heads(absent: dict[str, Any]) -> None:
    """64 / 8 = 8, whether the key is missing or null."""
    config = {key: value for key, value in LLAMA.items() if key != "head_dim"}
    geometry = build_geometry(families()["llama"], {**config, **absent})
    assert geometry.dimensions["head_dim"] == 8
    assert geometry.axes["gqa_group"][0].reader_width == 32


def test_missing_key_value_heads_mean_one_per_query_head() -> None:
    """Plain multi-head attention is grouped attention with groups of one."""
    geometry = llama(num_key_value_heads=None)
    assert geometry.dimensions["num_key_value_heads"] == 8
    assert geometry.axes["gqa_group"][0].num_units == 8
    assert geometry.axes["gqa_group"][0].reader_width == 16


def test_fused_projections_have_offsets() -> None:
    """Phi-3 keeps keys after the queries, values after the keys, and up after gate."""
    geometry = build_geometry(families()["phi3"], LLAMA)
    groups, channels = geometry.axes["gqa_group"][0], geometry.axes["ffn_channel"][0]
    assert [(s.offset, s.width) for s in groups.segments] == [(0, 64), (128, 16), (160, 16), (0, 64)]
    assert [(s.side, s.offset) for s in channels.segments] == [("out", 0), ("out", 160), ("in", 0)]
    assert [output.offset for output in channels.linear] == [0, 160]


def test_a_dimension_may_be_derived() -> None:
    """GPT-2 without n_inner has four times n_embd channels, and its heads are fixed but still found."""
    config = {"n_layer": 2, "n_embd": 12, "n_head": 3, "vocab_size": 50, "n_inner": None}
    geometry = build_geometry(families()["gpt2"], config)
    assert geometry.axes["ffn_channel"][0].num_units == 48
    heads = geometry.axes["gqa_group"][1]
    assert (heads.num_units, heads.reader, heads.reader_width) == (3, "transformer.h.1.attn.c_proj", 4)
    assert heads.segments == ()
    assert heads.fixed and "n_embd / n_head" in heads.fixed


def test_config_updates_are_the_keys_to_write() -> None:
    """Removing a group removes its query heads; head_dim is said because it can no longer be derived."""
    assert llama().config_updates("gqa_group", 1) == {
        "num_key_value_heads": 1,
        "num_attention_heads": 4,
        "head_dim": 16,
    }
    assert llama().config_updates("ffn_channel", 96) == {"intermediate_size": 96}


def test_only_divisible_head_counts_are_allowed() -> None:
    """The llama configuration wants hidden_size divisible by the head count; mistral does not care."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8}
    geometry = llama(**heads)
    assert geometry.allowed_counts("gqa_group") == [8, 4, 2, 1]
    assert not geometry.is_allowed("gqa_group", 5)
    assert geometry.is_allowed("ffn_channel", 5)
    mistral = build_geometry(families()["mistral"], {**LLAMA, **heads})
    assert mistral.allowed_counts("gqa_group") == [8, 7, 6, 5, 4, 3, 2, 1]


def test_per_layer_overrides_are_honoured() -> None:
    """Layers that are not named keep the model's own sizes; keys may be strings, as JSON has them."""
    geometry = llama(
        per_layer_config={"0": {"intermediate_size": 40}, 2: {"num_key_value_heads": 1, "num_attention_heads": 4}}
    )
    assert [axis.num_units for axis in geometry.axes["ffn_channel"]] == [40, 160, 160]
    assert [axis.num_units for axis in geometry.axes["gqa_group"]] == [2, 2, 1]
    assert geometry.dimensions["intermediate_size"] == 160
    assert [axis.reader_width for axis in geometry.axes["gqa_group"]] == [64, 64, 64]


def test_a_size_that_only_layers_have_is_taken_from_the_first_of_them() -> None:
    """A configuration may leave a size out when every layer says its own."""
    geometry = llama(intermediate_size=None, per_layer_config={str(i): {"intermediate_size": 40 + i} for i in range(3)})
    assert [axis.num_units for axis in geometry.axes["ffn_channel"]] == [40, 41, 42]


@pytest.mark.parametrize("value", ["64", 64.0, 0, -1, True, [64]])
def test_a_size_that_is_no_positive_whole_number_is_refused(value: object) -> None:
    """Key and value are shown."""
    with pytest.raises(FamilyError, match=r"the configuration has hidden_size = .*; it must be a"):
        llama(hidden_size=value)


def test_a_missing_size_without_a_default_is_refused() -> None:
    """The key and the family are named."""
    config = {key: value for key, value in LLAMA.items() if key != "intermediate_size"}
    with pytest.raises(FamilyError, match=r"no 'intermediate_size', which a llama model needs; .*config\.json"):
        resolve_dimensions(families()["llama"], config)


def test_head_counts_that_do_not_fit_are_refused() -> None:
    """Eight query heads cannot share three key/value heads."""
    with pytest.raises(FamilyError, match="num_attention_heads / num_key_value_heads: 8 / 3 is not a whole number"):
        llama(num_key_value_heads=3)


def test_units_that_cannot_be_cut_are_refused_with_the_reason() -> None:
    """The message says why, and which units can be cut."""
    geometry = build_geometry(families()["gpt2"], {"n_layer": 1, "n_embd": 12, "n_head": 3, "vocab_size": 50})
    geometry.require_cuttable(["ffn_channel"])
    with pytest.raises(FamilyError) as caught:
        geometry.require_cuttable(["ffn_channel", "gqa_group"])
    message = str(caught.value)
    assert message.startswith("gqa_groups of a gpt2 model cannot be cut: GPT-2 derives")
    assert message.endswith("Use units: [ffn_channel].")


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model.embed_tokens.weight", "embedding"),
        ("model.layers.11.self_attn.q_proj.weight", "attention"),
        ("model.layers.0.mlp.up_proj.bias", "ffn"),
        ("model.layers.0.input_layernorm.weight", "other"),
        ("model.layers.0.mlp_norm.weight", "other"),
        ("model.norm.weight", "other"),
        ("lm_head.weight", "head"),
    ],
)
def test_parameters_belong_to_parts(name: str, part: str) -> None:
    """A part is found by whole names of modules, inside a layer or outside."""
    assert llama().part_of(name) == part


def test_parameters_are_added_up_by_part() -> None:
    """Every part is in the table, also an empty one."""
    shapes = {
        "model.embed_tokens.weight": (100, 64),
        "model.layers.0.mlp.up_proj.weight": (160, 64),
        "model.norm": (64,),
    }
    assert parameters_by_part(shapes, llama()) == {
        "embedding": 6400,
        "attention": 0,
        "ffn": 10240,
        "head": 0,
        "other": 64,
    }


def test_layers_have_names() -> None:
    """The module name of a decoder layer."""
    assert llama().layer_name(2) == "model.layers.2"


def test_blocks_longer_than_learned_positions_are_refused() -> None:
    """GPT-2 and OPT have a table of positions; families with rotary positions take any block."""
    config = {"n_layer": 1, "n_embd": 8, "vocab_size": 9, "n_head": 2, "n_positions": 64}
    geometry = build_geometry(family_of("gpt2"), config)
    geometry.require_positions(64)
    with pytest.raises(FamilyError, match=r"block_size is 65.*gpt2 model knows 64 positions"):
        geometry.require_positions(65)


def test_a_layer_that_lacks_a_sub_layer_has_no_units_of_it() -> None:
    """``skip`` in the per-layer configuration: no units and no slices there, and the other layers as ever."""
    geometry = llama(per_layer_config={"1": {"skip": ["attention"]}, 2: {"skip": ["mlp"], "num_key_value_heads": 4}})
    assert geometry.num_units("gqa_group") == [2, 0, 4]
    assert geometry.num_units("ffn_channel") == [160, 160, 0]
    assert (geometry.num_units("attention"), geometry.num_units("layer")) == ([1, 0, 1], [1, 1, 1])
    gone = geometry.axes["ffn_channel"][2]
    assert (gone.segments, gone.linear, gone.reader_width) == ((), (), 1)
    assert geometry.allowed_counts("gqa_group") == [4, 2, 1]


def test_modules_of_blocks_are_named_in_full() -> None:
    """A sub-layer with the norms of its own, or the layer; parameters are found by whole names."""
    geometry = llama(num_hidden_layers=12)
    assert geometry.block_modules("layer", 1) == ("model.layers.1",)
    attention = ("model.layers.1.self_attn", "model.layers.1.input_layernorm")
    assert geometry.block_modules("attention", 1) == attention
    assert is_inside("model.layers.1.self_attn.q_proj.weight", set(attention))
    assert not is_inside("model.layers.11.self_attn.q_proj.weight", {"model.layers.1"})
    assert not is_inside("model.layers.1", {"model.layers.1"}), "a parameter, not a module"
    assert geometry.layer_of("model.layers.11.mlp.up_proj.weight") == 11
    assert geometry.layer_of("model.embed_tokens.weight") is None


def test_the_first_layer_of_every_type_needs_attention() -> None:
    """Among the layers that stay; types come from the list that the family names, else all layers are of one type."""
    types = ["sliding_attention", "full_attention"] * 2
    mixed = build_geometry(families()["qwen2"], {**LLAMA, "num_hidden_layers": 4, "layer_types": types})
    assert mixed.first_without_attention([0, 1, 2, 3], {0, 1}) is None
    assert mixed.first_without_attention([0, 1, 2, 3], {0, 2, 3}) == 1
    assert mixed.first_without_attention([0, 2, 3], {0, 3}) is None
    assert mixed.first_without_attention([2, 3], {3}) == 2
    assert llama().first_without_attention([0, 1, 2], {0}) is None
    assert llama().first_without_attention([1, 2], {2}) == 1


def test_blocks_are_fixed_only_where_the_configuration_says_so() -> None:
    """A reason applies under its condition alone, and stands in the refusal."""
    sizes = {"n_layer": 2, "n_embd": 48, "n_head": 6, "vocab_size": 97}
    free = build_geometry(families()["gpt2"], {**sizes, "scale_attn_by_inverse_layer_idx": False})
    free.require_removable(["layer", "attention", "ffn"])
    fixed = build_geometry(families()["gpt2"], {**sizes, "scale_attn_by_inverse_layer_idx": True})
    fixed.require_removable(["attention", "ffn"])
    with pytest.raises(
        FamilyError, match=r"kind layer cannot be taken out of this gpt2 model: .* cannot move up\. Use"
    ):
        fixed.require_removable(["ffn", "layer"])


def test_query_heads_in_numbers() -> None:
    """Eight heads in two groups of four: 16 query rows and output columns each, counted where their groups are."""
    geometry = llama()
    axis = geometry.axes["query_head"][1]
    assert (axis.num_units, axis.per_group, axis.num_groups, axis.reader_width) == (8, 4, 2, 16)
    assert axis.site == geometry.axes["gqa_group"][1].site == (1, "gqa_group")
    assert axis.reader == geometry.axes["gqa_group"][1].reader
    assert axis.segments == (
        Segment("model.layers.1.self_attn.q_proj", "out", 0, 16),
        Segment("model.layers.1.self_attn.o_proj", "in", 0, 16),
    )
    assert geometry.config_updates("query_head", 4) == {"num_attention_heads": 4, "head_dim": 16}


def test_as_many_query_heads_of_every_group_can_stay() -> None:
    """Counts are multiples of the number of groups; with one head per group there is nothing to choose."""
    geometry = llama()
    assert (geometry.step("query_head"), geometry.step("gqa_group")) == (2, 1)
    assert geometry.allowed_counts("query_head") == [8, 4, 2], "6 heads do not divide 64"
    assert geometry.why_fixed("query_head") is None
    alone = llama(num_key_value_heads=8)
    assert "one query head" in str(alone.why_fixed("query_head"))
    assert alone.why_fixed("gqa_group") is None


def test_a_layer_that_lost_query_heads_has_groups_of_its_own_size() -> None:
    """What a group costs, and how many heads go with it, is read per layer."""
    geometry = llama(per_layer_config={"1": {"num_attention_heads": 4, "head_dim": 16}})
    assert [axis.reader_width for axis in geometry.axes["gqa_group"]] == [64, 32, 64]
    assert geometry.config_updates("gqa_group", 1, 0)["num_attention_heads"] == 4
    assert geometry.config_updates("gqa_group", 1, 1)["num_attention_heads"] == 2
