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
}
"""Three GQA groups of two query heads where the family has groups, else six heads; 6, 4 and 2 heads divide 48."""


def pico_config(family: Family, **extra: Any) -> Any:
    """Return a tiny configuration of a family, from the sizes its file declares."""
    from transformers import AutoConfig

    sizes = {d.config: PICO_SIZES[name] for name, d in family.dimensions.items() if d.config}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return AutoConfig.for_model(family.model_types[0], **{**ids, **sizes, **extra})


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


@pytest.fixture(params=list(families()))
def family(request: pytest.FixtureRequest) -> Family:
    """Every registered family in turn."""
    return families()[request.param]
