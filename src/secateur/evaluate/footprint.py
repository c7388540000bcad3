"""How large a model is: parameters by part, bytes, and what its cache takes; exact, nothing estimated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from secateur.families.geometry import Geometry, parameters_by_part
from secateur.records.speed import KvCache
from secateur.records.units import GQA_GROUP

_WINDOW = "sliding_window"
_SLIDING = "sliding_attention"
"""What transformers' configurations call the window and the layers that have one, where only some do."""


def model_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the parameters of a model by name, tied ones once."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def model_parameters(model: nn.Module, geometry: Geometry) -> dict[str, int]:
    """Return how many parameters each part of a model holds."""
    return parameters_by_part(model_shapes(model), geometry)


def memory_bytes(model: nn.Module) -> int:
    """Return the bytes its parameters take in memory, tied ones once."""
    return sum(memory_by_dtype(model).values())


def memory_by_dtype(model: nn.Module) -> dict[str, int]:
    """Return the bytes its parameters take in memory, tied ones once, by the name of their dtype."""
    sizes: dict[str, int] = {}
    for parameter in model.parameters():
        name = str(parameter.dtype).removeprefix("torch.")
        sizes[name] = sizes.get(name, 0) + parameter.numel() * parameter.element_size()
    return sizes


def kv_cache(geometry: Geometry, config: Mapping[str, Any], bytes_per_number: int) -> KvCache:
    """Return what the keys and values of one sequence take.

    Every layer keeps one key and one value per key/value head and token; a layer without attention keeps nothing, and a
    layer that looks back over a window keeps no more than that window.

    Args:
        geometry: of the model; its layers may differ.
        config: its configuration as a plain mapping.
        bytes_per_number: of the dtype that keys and values are kept in.
    """
    sizes = geometry.layer_dimensions or (geometry.dimensions,) * geometry.num_layers
    heads = geometry.num_units(GQA_GROUP)
    per_layer = [2 * number * local["head_dim"] * bytes_per_number for number, local in zip(heads, sizes, strict=True)]
    window = config.get(_WINDOW)
    sliding = [] if window is None else [n for n, size in enumerate(per_layer) if size and _slides(geometry, n)]
    return KvCache(
        bytes_per_token=sum(per_layer),
        sliding_bytes_per_token=sum(per_layer[layer] for layer in sliding),
        num_sliding=len(sliding),
        window=window if sliding else None,
    )


def _slides(geometry: Geometry, layer: int) -> bool:
    """Return whether a layer of a model with a window looks back over it; where no types are said, all do."""
    return geometry.layer_types[layer] in ("", _SLIDING)
