"""Tiny random mixtures of experts, stored buffers random too."""

from __future__ import annotations

from typing import Any

import torch

from secateur.families.loader import families
from tests.conftest import pico_model


def moe_model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **extra: Any) -> Any:
    """Return a tiny random model of a family with twelve experts, whose order by name is not that by number."""
    family = families()[name]
    experts = {family.dimensions["num_experts"].config: 12}
    model = pico_model(family, dtype, seed, **{**experts, **extra})
    stored = model.state_dict()
    for module in model.modules():
        for leaf, buffer in module.named_buffers(recurse=False):
            if any(buffer.data_ptr() == value.data_ptr() for value in stored.values()):
                module.register_buffer(leaf, torch.randn(buffer.shape) / 5)  # in float32, as they are kept
    return model
