"""Costs in parameters, worked out by hand."""

from __future__ import annotations

from secateur.allocate.budget import cost_per_unit, parameters_after, unit_cost
from secateur.families.geometry import build_geometry
from secateur.families.loader import families
from tests.allocation import CHANNEL_COST, GROUP_COST, llama


def test_the_cost_of_a_unit_is_its_rows_and_columns() -> None:
    """One row or column of every coupled weight, per head where a unit has several."""
    geometry, shapes = llama([10, 10], [3, 3])
    assert CHANNEL_COST == 3 * 48
    assert GROUP_COST == 8 * 48 + 4 * 48 + 4 * 48 + 48 * 8
    assert cost_per_unit(geometry, "ffn_channel", shapes) == [CHANNEL_COST] * 2
    assert cost_per_unit(geometry, "gqa_group", shapes) == [GROUP_COST] * 2


def test_fused_weights_and_biases_are_counted_where_they_are() -> None:
    """Two rows of a fused weight belong to one channel; output biases go with their rows, the reader's bias stays."""
    config = {"n_layer": 1, "n_embd": 6, "n_head": 2, "vocab_size": 9, "n_inner": 5}
    gpt2 = build_geometry(families()["gpt2"], config)
    shapes = {
        "transformer.h.0.mlp.c_fc.weight": (6, 5),
        "transformer.h.0.mlp.c_fc.bias": (5,),
        "transformer.h.0.mlp.c_proj.weight": (5, 6),
        "transformer.h.0.mlp.c_proj.bias": (6,),
    }
    assert unit_cost(gpt2.axes["ffn_channel"][0], shapes, "in_out") == {
        "transformer.h.0.mlp.c_fc.weight": 6,
        "transformer.h.0.mlp.c_fc.bias": 1,
        "transformer.h.0.mlp.c_proj.weight": 6,
    }
    sizes = {
        "num_hidden_layers": 1,
        "hidden_size": 6,
        "vocab_size": 9,
        "intermediate_size": 5,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    phi3 = build_geometry(families()["phi3"], sizes)
    shapes = {
        "model.layers.0.mlp.gate_up_proj.weight": (10, 6),
        "model.layers.0.mlp.down_proj.weight": (6, 5),
        "model.layers.0.self_attn.qkv_proj.weight": (12, 6),
        "model.layers.0.self_attn.o_proj.weight": (6, 6),
    }
    assert unit_cost(phi3.axes["ffn_channel"][0], shapes, "out_in") == {
        "model.layers.0.mlp.gate_up_proj.weight": 12,
        "model.layers.0.mlp.down_proj.weight": 6,
    }
    assert unit_cost(phi3.axes["gqa_group"][0], shapes, "out_in") == {
        "model.layers.0.self_attn.qkv_proj.weight": (6 + 3 + 3) * 6,
        "model.layers.0.self_attn.o_proj.weight": 36,
    }


def test_what_is_left_is_counted_by_part() -> None:
    """Removed units leave their own part and no other."""
    geometry, shapes = llama([10, 10], [3, 3])
    before = parameters_after(shapes, geometry, {})
    assert before == {
        "embedding": 4800,
        "attention": 2 * 3 * GROUP_COST,
        "ffn": 2 * 10 * CHANNEL_COST,
        "head": 0,
        "other": 48,
    }
    after = parameters_after(shapes, geometry, {"ffn_channel": [4, 0], "gqa_group": [1, 2]})
    assert after == {**before, "attention": 3 * GROUP_COST, "ffn": 16 * CHANNEL_COST}
