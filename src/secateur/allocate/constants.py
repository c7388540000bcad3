"""Finds removed channels that were constant rather than zero, so that shrinking can fold them into the next bias.

A channel whose value never changed on the calibration text carries no information, but removing it shifts the output
of the projection that reads it by (its column) x (its constant). Where that projection has a bias, the shift is
folded in exactly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from secateur.allocate.budget import Shapes
from secateur.families.geometry import Geometry
from secateur.records.plan import LayerPlan, Plan
from secateur.records.statistics import Moments, SiteKey

CONSTANT_TOLERANCE = 1e-3
"""A channel is constant when its standard deviation is at most this share of its absolute mean."""


def constant_channels(moments: Moments, channels: list[int]) -> list[tuple[int, float]]:
    """Return (channel, value) for those of ``channels`` that are constant and not zero."""
    mean = moments.sum / moments.count
    variance = (moments.sum_sq / moments.count - mean**2).clamp_min(0.0)
    constant = (variance.sqrt() <= CONSTANT_TOLERANCE * mean.abs()) & (mean != 0)
    return [(channel, float(mean[channel])) for channel in channels if bool(constant[channel])]


def with_constants(plan: Plan, geometry: Geometry, moments: Mapping[SiteKey, Moments], shapes: Shapes) -> Plan:
    """Return ``plan`` with the constants of its removed channels filled in, where a bias can take them."""
    layers: dict[str, tuple[LayerPlan, ...]] = {}
    for kind, per_layer in plan.layers.items():
        filled = []
        for axis, layer in zip(geometry.axes[kind], per_layer, strict=True):
            gone = sorted(set(range(axis.num_units)) - set(layer.keep)) if layer.is_narrowed else []
            channels = [u * axis.reader_width + c for u in gone for c in range(axis.reader_width)]
            has_bias = f"{axis.reader}.bias" in shapes
            found = constant_channels(moments[axis.layer, kind], channels) if has_bias and channels else []
            filled.append(replace(layer, constants=tuple(found)))
        layers[kind] = tuple(filled)
    return replace(plan, layers=layers)
