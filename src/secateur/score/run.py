"""Runs one method over every unit of a model; refuses scores that are not finite."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from secateur.errors import CheckpointError, ConfigError
from secateur.families.geometry import Geometry, Segment, UnitAxis
from secateur.records.gram import Grams
from secateur.records.scores import Scores
from secateur.records.statistics import BucketStatistics, Moments
from secateur.score.method import METHODS, Evidence, Method

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
    grams: Grams | None = None,
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
        grams: Gram matrices of the same text, where the calibration took them; read one site at a time.

    Raises:
        ConfigError: unknown method or option, or Gram matrices that the method needs are missing or singular.
        FamilyError: this family cannot cut a kind that was asked for.
        CheckpointError: Gram matrices or scores are not finite; layer named.
    """
    chosen = METHODS[method]
    options = dict(options or {})
    chosen.check_options(options)
    geometry.require_cuttable(kinds)
    values: dict[str, list[Tensor]] = {}
    for kind in kinds:
        values[kind] = []
        for axis in geometry.axes[kind]:
            evidence = _evidence(chosen, axis, statistics, grams, geometry, load_tensor, seed)
            try:
                score = chosen.function(evidence, **options)
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                raise ConfigError(
                    f"method {method} with options {options} cannot invert the Gram matrix of the {kind}s of layer "
                    f"{axis.layer}: {_channels(axis)} channels were seen on too little text, or copy each other. "
                    "Raise option ridge, or calibrate on more text."
                ) from None
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
        chosen.function(_made_up(kind, width=min(axis.reader_width, 2), linear=len(axis.linear)), **options)


def _made_up(kind: str, *, width: int, linear: int) -> Evidence:
    """Return evidence of two units that are all alike: enough for a method to refuse, and nothing to wait for."""
    units = 2
    ones, channels = torch.ones(units).double(), torch.ones(units * width).double()
    return Evidence(
        kind=kind,
        layer=0,
        num_units=units,
        width=width,
        moments=Moments(1, channels, channels, channels),
        linear_abs=[ones] * linear,
        load_weights=lambda: [ones[:, None]],
        load_reader=lambda: channels[None],
        load_gram=lambda: torch.diag(channels),
        seed=0,
    )


def _channels(axis: UnitAxis) -> int:
    return axis.num_units * axis.reader_width


def _reader_weight(axis: UnitAxis, load: LoadTensor, weight_layout: str) -> Tensor:
    weight = load(f"{axis.reader}.weight")
    assert weight is not None, f"{axis.reader} has no weight"
    return weight if weight_layout == "out_in" else weight.T


def _mean_gram(method: Method, axis: UnitAxis, grams: Grams | None) -> Tensor:
    """Return the mean of x xT at the reader of an axis, float64 and symmetric to the last bit.

    Raises:
        ConfigError: there are no Gram matrices.
        CheckpointError: the matrix holds NaN or infinity.
    """
    if grams is None:
        others = ", ".join(name for name, other in METHODS.items() if not (other.gram or other.control))
        raise ConfigError(
            f"method {method.name} needs Gram matrices, and the calibration took none; calibrate with them, or use a "
            f"method that does without: {others}."
        )
    mean = grams.load((axis.layer, axis.kind)).double() / grams.count
    if not bool(torch.isfinite(mean).all()):
        raise CheckpointError(
            f"the Gram matrix of the {axis.kind}s of layer {axis.layer} holds NaN or infinity. Calibrate again, with "
            "dtype: float32 if the model overflows in half precision."
        )
    return (mean + mean.T) / 2


def _evidence(
    method: Method,
    axis: UnitAxis,
    statistics: BucketStatistics,
    grams: Grams | None,
    geometry: Geometry,
    load: LoadTensor,
    seed: int,
) -> Evidence:
    linear = [statistics.linear_abs[axis.layer, f"{axis.kind}.linear{i}"] for i in range(len(axis.linear))]
    moments, layout = statistics.moments[axis.layer, axis.kind], geometry.family.weight_layout
    return Evidence(
        kind=axis.kind,
        layer=axis.layer,
        num_units=axis.num_units,
        width=axis.reader_width,
        moments=moments,
        linear_abs=linear,
        load_weights=lambda: unit_weights(axis, load, layout),
        load_reader=lambda: _reader_weight(axis, load, layout).to(moments.sum.device),
        load_gram=lambda: _mean_gram(method, axis, grams).to(moments.sum.device),
        seed=seed,
    )
