"""Pico models of every family, made from the family files; and a small tokenizer and corpus. No network, no disk."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from secateur.families.geometry import Geometry, build_geometry
from secateur.families.loader import families
from secateur.families.schema import Family

PICO_SIZES = {
    "num_layers": 2,
    "hidden_size": 48,
    "vocab_size": 97,
    "intermediate_size": 64,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "num_positions": 64,
    "num_experts": 8,
    "experts_per_token": 2,
    "expert_width": 24,
    "num_expert_groups": 2,
    "expert_groups_per_token": 1,
    "num_shared_experts": 2,
    "shared_width": 24,
}
"""Three GQA groups of two query heads where the family has groups, else six heads; 6, 4 and 2 heads divide 48."""
DENSE = [name for name, family in families().items() if family.experts is None]
"""Names of the families without experts."""
WITH_EXPERTS = [name for name, family in families().items() if family.experts is not None]
"""Names of the families with experts."""
LATENT = {"q_lora_rank": 20, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4}
"""Sizes of latent attention, which no family file names."""
EXTRA: dict[str, dict[str, Any]] = {
    "deepseek_v2": {**LATENT, "first_k_dense_replace": 1, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**LATENT, "first_k_dense_replace": 1},
    "qwen2_moe": {"mlp_only_layers": [0]},
    "qwen3_moe": {"mlp_only_layers": [0], "norm_topk_prob": True},
    "gpt_oss": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
}
"""What else the tiny configurations of some families need; where a family can have dense layers, the first one is."""


def pico_config(family: Family, **extra: Any) -> Any:
    """Return a tiny configuration of a family, from the sizes its file declares."""
    from transformers import AutoConfig

    sizes = {d.config: PICO_SIZES[name] for name, d in family.dimensions.items() if d.config}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return AutoConfig.for_model(family.model_types[0], **{**ids, **sizes, **EXTRA.get(family.name, {}), **extra})


def pico_model(family: Family, dtype: torch.dtype = torch.float64, seed: int = 0, **extra: Any) -> Any:
    """Return a tiny random model in evaluation mode; every parameter random, biases and norms too."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(pico_config(family, **extra)).to(dtype).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def geometry_of(model: Any, family: Family) -> Geometry:
    """Return the geometry of a model from its own configuration."""
    return build_geometry(family, model.config.to_dict())


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Pico matrices are too small to share between threads, which would only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(params=DENSE)
def family(request: pytest.FixtureRequest) -> Family:
    """Every registered family without experts in turn."""
    return families()[request.param]


@pytest.fixture(params=WITH_EXPERTS)
def moe_family(request: pytest.FixtureRequest) -> Family:
    """Every registered family with experts in turn."""
    return families()[request.param]
