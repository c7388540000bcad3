"""The layout of a GGUF file: what stands in for what the loaders cannot do without, from shapes alone."""

from __future__ import annotations

import math
from typing import Any

import pytest

from secateur.errors import ExportError
from secateur.export.gguf_architectures import Layout, TensorSource, architectures, llama3_factors, plan_layout
from secateur.families.loader import families

CONFIG = {
    "model_type": "pruned_llama",
    "hidden_size": 64,
    "vocab_size": 40,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
}


def shapes(no_attention: tuple[int, ...] = (), no_ffn: tuple[int, ...] = ()) -> dict[str, tuple[int, ...]]:
    """Return the parameters of a llama of three layers without some sub-layers."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (40, 64), "model.norm.weight": (64,)}
    for layer in range(3):
        parts: dict[str, tuple[int, ...]] = {}
        if layer not in no_attention:
            parts |= {"input_layernorm": (64,), "self_attn.q_proj": (64, 64), "self_attn.k_proj": (32, 64)}
            parts |= {"self_attn.v_proj": (32, 64), "self_attn.o_proj": (64, 64)}
        if layer not in no_ffn:
            parts |= {"post_attention_layernorm": (64,), "mlp.gate_proj": (96, 64), "mlp.up_proj": (96, 64)}
            parts |= {"mlp.down_proj": (64, 96)}
        found |= {f"model.layers.{layer}.{part}.weight": shape for part, shape in parts.items()}
    return found


def plan(**gone: tuple[int, ...]) -> tuple[Layout, dict[str, TensorSource]]:
    """Return the layout and its tensors by name."""
    layout = plan_layout(CONFIG, shapes(**gone))
    return layout, {tensor.name: tensor for tensor in layout.tensors}


def test_a_first_layer_without_attention_gets_a_head_of_zeros() -> None:
    """The deci loader takes the head's size from layer 0; other layers need none."""
    layout, tensors = plan(no_attention=(0, 1))
    assert layout.architecture == "deci"
    assert layout.metadata["deci.attention.head_count"] == [1, 0, 4]
    assert layout.metadata["deci.attention.head_count_kv"] == [1, 0, 2]
    for part, shape in {"q": (16, 64), "k": (16, 64), "v": (16, 64), "output": (64, 16)}.items():
        assert tensors[f"blk.0.attn_{part}.weight"] == TensorSource(f"blk.0.attn_{part}.weight", shape, values=(0.0,))
    assert tensors["blk.0.attn_norm.weight"].values == (1.0,)
    assert not any(name.startswith("blk.1.attn") for name in tensors)


def test_attention_without_a_feed_forward_gets_one_of_zeros() -> None:
    """Without it the deci loader drops the attention's output too, without a word; the last layer ends it."""
    layout, tensors = plan(no_ffn=(1, 2))
    assert layout.metadata["deci.feed_forward_length"] == [96, 32, 32]
    for layer in (1, 2):
        assert tensors[f"blk.{layer}.ffn_down.weight"].shape == (64, 32)
        assert tensors[f"blk.{layer}.ffn_down.weight"].values == (0.0,)
        assert tensors[f"blk.{layer}.ffn_norm.weight"].values == (1.0,)


def test_a_layer_that_lost_both_is_left_out() -> None:
    """Later layers move up; what remains is even, so the plain architecture fits."""
    layout, tensors = plan(no_attention=(0,), no_ffn=(0,))
    assert layout.architecture == "llama"
    assert layout.metadata["llama.block_count"] == 2
    assert tensors["blk.0.attn_q.weight"].parameters == ("model.layers.1.self_attn.q_proj.weight",)
    assert tensors["blk.0.attn_q.weight"].heads == 4 and tensors["blk.0.attn_k.weight"].heads == 2
    with pytest.raises(ExportError, match="every layer of this model was removed"):
        plan(no_attention=(0, 1, 2), no_ffn=(0, 1, 2))


def test_nothing_is_left_behind_and_nothing_made_up() -> None:
    """A parameter without a place, and a place without a parameter, are errors; an old buffer is not."""
    base = shapes()
    plan_layout(CONFIG, {**base, "model.layers.0.self_attn.rotary_emb.inv_freq": (8,), "lm_head.weight": (40, 64)})
    with pytest.raises(ExportError, match=r"has no place for model.layers.1.self_attn.q_norm.weight; leaving"):
        plan_layout(CONFIG, {**base, "model.layers.1.self_attn.q_norm.weight": (16,)})
    del base["model.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(ExportError, match=r"has no parameter model.layers.1.self_attn.k_proj.weight"):
        plan_layout(CONFIG, base)
    with pytest.raises(ExportError, match=r"has no parameter lm_head.weight"):
        plan_layout({**CONFIG, "tie_word_embeddings": False}, shapes())


def test_every_architecture_belongs_to_a_family_and_names_its_modules() -> None:
    """The table uses the names of the family files, and everything it permits a bias is a module it names."""
    for name, table in architectures().items():
        assert name in families()
        assert set(table.biases) <= set(table.layer)
        assert {"attn_norm", "attn_output", "ffn_down"} <= set(table.layer.values())
        assert {"token_embd", "output_norm", "output"} <= set(table.model.values())


def test_short_waves_keep_their_frequency_and_long_ones_are_divided() -> None:
    """Between the two the divisor grows steadily."""
    rope: dict[str, Any] = {
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    }
    factors = llama3_factors(64, rope)
    assert len(factors) == 32
    assert factors[0] == 1.0 and math.isclose(factors[-1], 8.0)
    assert list(factors) == sorted(factors) and any(1.0 < factor < 8.0 for factor in factors)
