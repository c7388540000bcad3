"""Numbers relative to those of the layer, so that terms of different kinds can be mixed."""

from __future__ import annotations

from jaxtyping import Float64
from torch import Tensor


def over_mean_size(values: Float64[Tensor, " units"]) -> Float64[Tensor, " units"]:
    """Return values divided by the mean of their sizes; zeros stay zeros."""
    mean = values.abs().mean()
    return values / mean if float(mean) > 0.0 else values
