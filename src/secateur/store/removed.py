"""What stands in a decoder layer for a sub-layer that was removed: modules without parameters that add nothing.

The layer's own forward stays the stock one: it still adds what its sub-layers return to the residual stream, and a
removed one returns zeros.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from secateur.families.geometry import family_sublayer
from secateur.families.schema import Family
from secateur.records.units import ATTENTION


class NoSubLayer(nn.Module):
    """Returns zeros in the shape of its first input, whatever else it is given."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return zeros like ``hidden_states``."""
        return torch.zeros_like(hidden_states)


class NoAttention(nn.Module):
    """Returns zeros and no attention weights, and leaves the cache alone."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Return zeros like ``hidden_states``, and None for the attention weights."""
        return torch.zeros_like(hidden_states), None


def remove_sublayers(layer: nn.Module, family: Family, kinds: Collection[str]) -> None:
    """Change a decoder layer: the given sub-layers (``attention``, ``ffn``) and the norms of their own are gone."""
    for kind in kinds:
        sublayer = family_sublayer(family, kind)
        for module in sublayer.modules:
            layer.set_submodule(module, NoAttention() if kind == ATTENTION else NoSubLayer())
        for norm in sublayer.norms:
            layer.set_submodule(norm, nn.Identity())
