"""Runs one method over every unit of a model; refuses scores that are not finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from secateur.errors import CheckpointError
from secateur.families.geometry import Geometry, Segment, UnitAxis
from secateur.records.scores import Scores
from secateur.records.statistics import BucketStatistics, Moments
from secateur.score.method import METHODS, Evidence

LoadTensor = Callable[[str], Tensor | None]
"""Returns a parameter by name, or None where the model has no such parameter (an absent bias)."""


def unit_weights(axis: UnitAxis, load: LoadTensor, weight_layout: str) -> list[Tensor]:
    """Return the weight slices of an axis, one (units, elements) matrix per segment, biases as their own matrices."""
    slices: list[Tensor] = []
    for segment in axis.segments:
        weight = load(f"{segment.module}.weight")
        assert weight is not None, f"{segment.module} has no weight"
        rows_first = (segment.side == "out") == (weight_layout == "out_in")
        slices.append(_cut(weight if rows_first else weight.T, segment, axis.num_units))
        bias = load(f"{segment.module}.bias") if segment.side == "out" else None
        if bias is not None:
            slices.append(_cut(bias[:, None], segment, axis.num_units))
    return slices


def _cut(matrix: Tensor, segment: Segment, num_units: int) -> Tensor:
    return matrix[segment.offset : segment.offset + num_units * segment.width].reshape(num_units, -1)


def score_units(
    method: str,
    statistics: BucketStatistics,
    geometry: Geometry,
    kinds: Sequence[str],
    *,
    load_tensor: LoadTensor,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    buckets: Sequence[str] = (),
    inputs_fingerprint: str = "",
) -> Scores:
    """Return the importance of every unit of the given kinds.

    Args:
        method: registered method name.
        statistics: the (merged) calibration sums to judge by.
        geometry: of the model the statistics were taken on.
        kinds: unit kinds to score.
        load_tensor: parameter by name; called only by methods that need weights.
        options: the method's options.
        seed: for methods that draw.
        buckets: names of the buckets behind ``statistics``, for the record.
        inputs_fingerprint: identifies statistics and weights, for the record.

    Raises:
        ConfigError: unknown method or option.
        FamilyError: this family cannot cut a kind that was asked for.
        CheckpointError: scores are not finite; layer named.
    """
    chosen = METHODS[method]
    options = dict(options or {})
    chosen.check_options(options)
    geometry.require_cuttable(kinds)
    values: dict[str, list[Tensor]] = {}
    for kind in kinds:
        values[kind] = []
        for axis in geometry.axes[kind]:
            score = chosen.function(_evidence(axis, statistics, geometry, load_tensor, seed), **options)
            if not bool(torch.isfinite(score).all()):
                raise CheckpointError(
                    f"method {method} gave scores that are not finite for the {kind}s of layer {axis.layer}; "
                    "weights or statistics hold NaN or infinity there. Check the checkpoint."
                )
            values[kind].append(score)
    return Scores(method, options, tuple(buckets), values, inputs_fingerprint)


def rehearse(method: str, geometry: Geometry, kinds: Sequence[str], options: Mapping[str, Any]) -> None:
    """Run a method on made-up evidence, so that what it refuses is refused before any text is run.

    Raises:
        ConfigError: unknown method or option, or one that does not fit a unit kind.
        FamilyError: this family cannot cut a kind that was asked for.
    """
    chosen = METHODS[method]
    chosen.check_options(options)
    geometry.require_cuttable(kinds)
    for kind in kinds:
        axis = geometry.axes[kind][0]
        ones, channels = torch.ones(axis.num_units).double(), torch.ones(axis.num_units * axis.reader_width).double()
        evidence = Evidence(
            kind=kind,
            layer=0,
            num_units=axis.num_units,
            width=axis.reader_width,
            moments=Moments(1, channels, channels, channels),
            linear_abs=[ones for _ in axis.linear],
            load_weights=lambda ones=ones: [ones[:, None]],  # type: ignore[misc]
            seed=0,
        )
        chosen.function(evidence, **options)


def _evidence(
    axis: UnitAxis, statistics: BucketStatistics, geometry: Geometry, load: LoadTensor, seed: int
) -> Evidence:
    linear = [statistics.linear_abs[axis.layer, f"{axis.kind}.linear{i}"] for i in range(len(axis.linear))]
    return Evidence(
        kind=axis.kind,
        layer=axis.layer,
        num_units=axis.num_units,
        width=axis.reader_width,
        moments=statistics.moments[axis.layer, axis.kind],
        linear_abs=linear,
        load_weights=lambda: unit_weights(axis, load, geometry.family.weight_layout),
        seed=seed,
    )
