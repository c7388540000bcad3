"""How large a model is: parameters by part and bytes; exact, nothing estimated."""

from __future__ import annotations

from torch import nn

from secateur.families.geometry import Geometry, parameters_by_part


def model_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the parameters of a model by name, tied ones once."""
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def model_parameters(model: nn.Module, geometry: Geometry) -> dict[str, int]:
    """Return how many parameters each part of a model holds."""
    return parameters_by_part(model_shapes(model), geometry)


def memory_bytes(model: nn.Module) -> int:
    """Return the bytes its parameters take in memory, tied ones once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
