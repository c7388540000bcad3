"""Applies a plan to a model's parameters and configuration: tensors and plain data in, tensors and plain data out."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from secateur.errors import PlanError
from secateur.families.geometry import Geometry, Segment, UnitAxis
from secateur.families.loader import UNEVEN_PREFIX, dense_model_type
from secateur.records.plan import LayerPlan, Plan
from secateur.shrink.slicing import fold_constants, kept_rows
from secateur.vocabulary import renumber

_Cuts = dict[tuple[str, str], list[tuple[Segment, int, Sequence[int]]]]


def check_plan(plan: Plan, geometry: Geometry) -> None:
    """Refuse a plan that was made for another model, or edited into one that cannot be applied.

    Raises:
        PlanError: family, layers, unit counts or vocabulary differ (both sides are named), the stock configuration
            refuses the counts of a uniform plan, or a constant belongs to a channel that stays.
        FamilyError: the family cannot cut units that the plan removes.
    """
    if plan.family != geometry.family.name:
        raise PlanError(f"the plan is for a {plan.family} model; this is a {geometry.family.name} model. Plan again.")
    rows = geometry.dimensions["vocab_size"]
    if plan.vocabulary is not None and plan.vocabulary.num_tokens != rows:
        raise PlanError(
            f"the plan expects a vocabulary of {plan.vocabulary.num_tokens:,} token ids; the model has {rows:,}. Plan "
            "again for this model."
        )
    for kind, layers in plan.layers.items():
        have = [axis.num_units for axis in geometry.axes[kind]]
        want = [layer.num_units for layer in layers]
        if have != want:
            raise PlanError(
                f"the plan expects {kind} counts {want[:4]}... in {len(want)} layers; the model has {have[:4]}... in "
                f"{len(have)}. Plan again for this model."
            )
        if any(layer.num_removed for layer in layers):
            geometry.require_cuttable([kind])
        if plan.shape == "uniform" and not geometry.is_allowed(kind, len(layers[0].keep)):
            raise PlanError(
                f"the plan keeps {len(layers[0].keep)} {kind}s per layer, which this family's configuration refuses. "
                f"Keep one of {geometry.allowed_counts(kind)}, or set shape to uneven."
            )
        for axis, layer in zip(geometry.axes[kind], layers, strict=True):
            _check_constants(axis, layer)


def _check_constants(axis: UnitAxis, layer: LayerPlan) -> None:
    kept = set(layer.keep)
    for channel, _ in layer.constants:
        unit = channel // axis.reader_width
        if unit in kept or not 0 <= unit < axis.num_units:
            raise PlanError(
                f"the plan has a constant for channel {channel} of layer {axis.layer} ({axis.kind}), which is not "
                "removed. Take the constant out of the plan, or plan again."
            )


Reconstruct = Callable[[UnitAxis, Sequence[int], Tensor], Tensor]
"""(axis, kept input channels, dense weight as out x channels) -> weight of the kept channels, out x kept."""


def kept_channels(axis: UnitAxis, units: Sequence[int]) -> list[int]:
    """Return the input channels of an axis's reader that belong to the given units."""
    width = axis.reader_width
    return [unit * width + channel for unit in units for channel in range(width)]


def shrink_parameters(
    parameters: Iterable[tuple[str, Tensor]],
    plan: Plan,
    geometry: Geometry,
    reconstruct: Reconstruct | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter under its own name, with the rows and columns of removed units and token ids gone.

    Removed channels that were constant on the calibration text are folded into the bias of the projection that read
    them. Parameters are taken one at a time, so they may be read lazily; a bias must not come before its weight.

    Args:
        parameters: (name, tensor) pairs of the dense model.
        plan: made for this model.
        geometry: of this model.
        reconstruct: gives the weight of a projection that reads removed channels, out of the dense one; None keeps the
            columns of the kept channels as they are.

    Raises:
        PlanError: the plan does not fit the model; see also ``check_plan``.
    """
    check_plan(plan, geometry)
    cuts, constants = _cuts(plan, geometry)
    readers = _readers(plan, geometry) if reconstruct is not None else {}
    shifts: dict[str, tuple[Tensor, list[float]]] = {}
    rows_first = geometry.family.weight_layout == "out_in"
    tokens = None if plan.vocabulary is None else torch.tensor(plan.vocabulary.keep)
    for name, tensor in parameters:
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and module in constants:
            matrix = tensor if rows_first else tensor.T
            channels = [channel for channel, _ in constants[module]]
            shifts[module] = (matrix[:, channels], [value for _, value in constants[module]])
        if leaf == "bias" and module in constants:
            if module not in shifts:
                raise PlanError(f"{name} came before its weight, so removed constants cannot be folded into it.")
            tensor = fold_constants(tensor, *shifts.pop(module))
        if tokens is not None and module in geometry.family.vocabulary:
            tensor = tensor.index_select(0, tokens.to(tensor.device))
        if reconstruct is not None and leaf == "weight" and module in readers:
            axis, keep = readers[module]
            dense = (tensor if rows_first else tensor.T).clone()
            dense[:, [channel for channel, _ in constants.get(module, ())]] = 0.0  # their share is in the bias now
            matrix = reconstruct(axis, keep, dense)
            yield name, (matrix if rows_first else matrix.T).contiguous()
        else:
            yield name, _slice(tensor, leaf, module, cuts, rows_first)
    if shifts:
        raise PlanError(f"{min(shifts)} has no bias that could take its removed constants over. Plan again.")


def _readers(plan: Plan, geometry: Geometry) -> dict[str, tuple[UnitAxis, list[int]]]:
    """Return the projections that read removed channels, by module, with the channels that stay."""
    return {
        axis.reader: (axis, kept_channels(axis, layer.keep))
        for kind, layers in plan.layers.items()
        for axis, layer in zip(geometry.axes[kind], layers, strict=True)
        if layer.num_removed
    }


def _cuts(plan: Plan, geometry: Geometry) -> tuple[_Cuts, dict[str, list[tuple[int, float]]]]:
    cuts: _Cuts = defaultdict(list)
    constants: dict[str, list[tuple[int, float]]] = {}
    for kind, layers in plan.layers.items():
        for axis, layer in zip(geometry.axes[kind], layers, strict=True):
            if layer.num_removed == 0:
                continue
            for segment in axis.segments:
                cuts[segment.module, segment.side].append((segment, axis.num_units, layer.keep))
            if layer.constants:
                constants[axis.reader] = list(layer.constants)
    return cuts, constants


def _slice(tensor: Tensor, leaf: str, module: str, cuts: _Cuts, rows_first: bool) -> Tensor:
    for side in ("out", "in"):
        segments = cuts.get((module, side))
        if not segments or (leaf != "weight" and side == "in"):
            continue
        dim = 0 if leaf != "weight" or (side == "out") == rows_first else 1
        keep = kept_rows(segments, tensor.shape[dim])
        tensor = tensor.index_select(dim, keep.to(tensor.device))
    return tensor.contiguous()


def shrink_config(config: Mapping[str, Any], plan: Plan, geometry: Geometry) -> dict[str, Any]:
    """Return the configuration of the pruned model as plain data.

    Uniform plans keep the stock model type. Uneven plans, and any plan for a model that is uneven already, get our own
    model type and ``per_layer_config`` in transformers' vocabulary, holding every layer that differs from the
    configuration's own values. Where token ids go, every id that the configuration names is renumbered.

    Raises:
        TokenizerError: the configuration names a token id that does not stay.
    """
    pruned = dict(config)
    if plan.vocabulary is not None:
        pruned = renumber(config, plan.vocabulary.keep) | geometry.vocabulary_updates(len(plan.vocabulary.keep))
    if plan.shape == "uniform" and not config.get("per_layer_config"):
        for kind, layers in plan.layers.items():
            pruned.update(geometry.config_updates(kind, len(layers[0].keep)))
        return pruned
    overrides: dict[str, dict[str, Any]] = {
        str(layer): dict(values) for layer, values in (config.get("per_layer_config") or {}).items()
    }
    for kind, layers in plan.layers.items():
        for index, layer in enumerate(layers):
            if layer.num_removed:
                overrides.setdefault(str(index), {}).update(geometry.config_updates(kind, len(layer.keep)))
    pruned["per_layer_config"] = {key: overrides[key] for key in sorted(overrides, key=int)}
    pruned["model_type"] = UNEVEN_PREFIX + dense_model_type(str(config["model_type"]))
    pruned.pop("architectures", None)
    return pruned


def shrink_generation_config(config: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """Return the generation configuration of the pruned model as plain data: token ids renumbered, the rest as it was.

    Raises:
        TokenizerError: it names a token id that does not stay.
    """
    return dict(config) if plan.vocabulary is None else renumber(config, plan.vocabulary.keep)
