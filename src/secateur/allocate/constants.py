"""What a bias can take over of removed channels: their constant, or on request their mean.

A channel whose value never changed on the calibration text carries no information, but removing it shifts the output
of the projection that reads it by (its column) x (its constant). Where that projection has a bias, the shift is
folded in exactly.

Bias compensation does so for every removed channel with its mean, which keeps the mean of the output where it was.
Source: An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models" (FLAP), 2024, arXiv
2312.11983, section 3.4. Where we differ: no bias is added to a model that has none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from secateur.allocate.budget import Shapes
from secateur.errors import PlanError
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


def channel_means(moments: Moments, channels: list[int]) -> list[tuple[int, float]]:
    """Return (channel, mean) for those of ``channels`` whose mean is not zero."""
    mean = moments.sum / moments.count
    return [(channel, float(mean[channel])) for channel in channels if float(mean[channel]) != 0.0]


def require_biases(geometry: Geometry, kinds: Iterable[str], shapes: Shapes) -> None:
    """Raise PlanError where a projection that loses channels has no bias to take their means."""
    for kind in kinds:
        for axis in geometry.axes[kind]:
            if axis.num_units and f"{axis.reader}.bias" not in shapes:
                raise PlanError(
                    f"bias_compensation needs a bias in every projection that loses channels, and {axis.reader} of "
                    f"this {geometry.family.name} model has none. Use reconstruct: dense instead, which needs no bias."
                )


def with_constants(
    plan: Plan, geometry: Geometry, moments: Mapping[SiteKey, Moments], shapes: Shapes, *, means: bool = False
) -> Plan:
    """Return ``plan`` with the constants of its removed channels filled in, where a bias can take them.

    Args:
        plan: what stays.
        geometry: of the model.
        moments: means and variances of the channels on the calibration text.
        shapes: of the model's parameters, which say where there is a bias.
        means: takes the mean of every removed channel, constant or not.
    """
    layers: dict[str, tuple[LayerPlan, ...]] = {}
    for kind, per_layer in plan.layers.items():
        filled = []
        for axis, layer in zip(geometry.axes[kind], per_layer, strict=True):
            gone = sorted(set(range(axis.num_units)) - set(layer.keep)) if layer.is_narrowed else []
            channels = [u * axis.reader_width + c for u in gone for c in range(axis.reader_width)]
            has_bias = f"{axis.reader}.bias" in shapes
            taken = channel_means if means else constant_channels
            found = taken(moments[axis.layer, kind], channels) if has_bias and channels else []
            filled.append(replace(layer, constants=tuple(found)))
        layers[kind] = tuple(filled)
    return replace(plan, layers=layers)
