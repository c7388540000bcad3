"""Applies a plan to a model's parameters and configuration: tensors and plain data in, tensors and plain data out."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from secateur.errors import PlanError
from secateur.families.geometry import SKIP_WORDS, Geometry, Segment, TensorSlice, UnitAxis, is_inside
from secateur.families.loader import UNEVEN_PREFIX, dense_model_type
from secateur.records.plan import LayerPlan, Plan
from secateur.records.units import (
    ATTENTION,
    AXES_OF,
    AXIS_OF,
    EXPERT,
    EXPERT_CHANNEL,
    FFN,
    GQA_GROUP,
    LAYER,
    LAYER_UNIT_KINDS,
    QUERY_HEAD,
    SHARED_CHANNEL,
    SUBLAYER_OF,
    WHOLE_KINDS,
)
from secateur.shrink.merging import check_merged, merge_experts
from secateur.shrink.slicing import fold_constants, kept_entries, kept_rows
from secateur.vocabulary import renumber

_Cuts = dict[tuple[str, str], list[tuple[Segment, int, Sequence[int]]]]
_TensorCuts = dict[str, list[tuple[TensorSlice, int, int, Sequence[int]]]]
_PARTS = ((GQA_GROUP, QUERY_HEAD), (EXPERT, EXPERT_CHANNEL))
"""Kinds of which the second are parts of the first."""


def check_plan(plan: Plan, geometry: Geometry) -> None:
    """Refuse a plan that was made for another model, or edited into one that cannot be applied.

    Raises:
        PlanError: family, layers, unit counts or vocabulary differ (both sides are named), the stock configuration
            refuses the counts of a uniform plan, a layer that must have attention loses it, a router cannot work with
            the experts that stay, groups would keep different numbers of units, a constant belongs to a channel that
            stays, or experts are merged into none that stays.
        FamilyError: the family cannot cut units, or take out sub-layers or layers, that the plan removes.
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
        if kind not in geometry.axes:
            geometry.require_cuttable([kind])
        have = [axis.num_units for axis in geometry.axes[kind]]
        want = [layer.num_units for layer in layers]
        if have != want:
            raise PlanError(
                f"the plan expects {kind} counts {want[:4]}... in {len(want)} layers; the model has {have[:4]}... in "
                f"{len(have)}. Plan again for this model."
            )
        if any(layer.is_narrowed for layer in layers):
            geometry.require_cuttable([kind])
    _check_blocks(plan, geometry)
    _check_groups(plan, geometry)
    check_merged(plan, geometry)
    gone = set(plan.removed_layers)
    for kind, layers in plan.layers.items():
        stay = [entry for index, entry in enumerate(layers) if index not in gone and entry.keep]
        _check_possible(kind, layers, geometry)
        if plan.shape == "uniform" and stay and not geometry.is_allowed(kind, len(stay[0].keep)):
            raise PlanError(
                f"the plan keeps {len(stay[0].keep)} {kind}s per layer, which this family's configuration refuses. "
                f"Keep one of {geometry.allowed_counts(kind)}, or set shape to uneven."
            )
        for axis, layer in zip(geometry.axes[kind], layers, strict=True):
            _check_constants(axis, layer)


def _check_possible(kind: str, layers: Sequence[LayerPlan], geometry: Geometry) -> None:
    """Refuse a number of units that no model can have."""
    for index, layer in enumerate(layers):
        reason = geometry.why_impossible(kind, len(layer.keep), index) if layer.is_narrowed else None
        if reason:
            axis = geometry.axes[kind][index]
            works = [n for n in range(1, axis.num_units + 1) if not geometry.why_impossible(kind, n, index)]
            shown = ", ".join(map(str, works if len(works) <= 16 else [*works[:15], "..."]))
            raise PlanError(
                f"the plan keeps {len(layer.keep)} of {axis.num_units} {kind}s in layer {index}, but {reason}. Keep "
                f"one of {shown}."
            )


def _check_blocks(plan: Plan, geometry: Geometry) -> None:
    """Refuse the removal of whole sub-layers and layers that the model or its caches cannot do without."""
    kinds = [kind for kind in (ATTENTION, FFN) if plan.removed_sublayers(kind)]
    geometry.require_removable([*kinds, *([LAYER] if plan.removed_layers else [])])
    gone = set(plan.removed_layers)
    whole = [kind for kind in WHOLE_KINDS if kind in geometry.axes and any(geometry.num_units(kind))]
    lacking = sorted(set(whole) - set(plan.layers))
    if gone and lacking:
        raise PlanError(
            f"the plan takes whole layers out of the model, but lacks entries for their {' and '.join(lacking)}s. Plan "
            "again."
        )
    stay = [layer for layer in range(geometry.num_layers) if layer not in gone]
    left = {kind: [layer for layer in stay if _keeps(plan, geometry, kind, layer)] for kind in (ATTENTION, FFN)}
    empty = [layer for layer in stay if layer not in left[ATTENTION] and layer not in left[FFN]]
    if empty:
        raise PlanError(
            f"the plan leaves nothing in layer {empty[0]}, but does not say that the layer goes: it lacks entries for "
            f"{' or '.join(sorted(set(AXIS_OF.values()) - set(plan.layers)))}. Plan again."
        )
    bare = geometry.first_without_attention(stay, left[ATTENTION])
    if bare is not None:
        kind = geometry.layer_types[bare]
        raise PlanError(
            f"the plan leaves layer {bare} without attention, and it would be the first layer"
            f"{f' of type {kind}' if kind else ''}, where caches read the length of the text. Keep its attention, or "
            "remove the whole layer and keep the attention of the next."
        )


def _check_groups(plan: Plan, geometry: Geometry) -> None:
    """Refuse units that do not fit the groups or the sub-layers they are in."""
    for whole, part in _PARTS:
        if part in plan.layers and any(layer.is_narrowed for layer in plan.layers.get(whole, ())):
            raise PlanError(
                f"the plan removes both {whole}s and {part}s, which are parts of each other. Remove one kind, and "
                "prune the result again for the other."
            )
    for kind in (QUERY_HEAD, EXPERT_CHANNEL, SHARED_CHANNEL):
        for axis, layer in zip(geometry.axes.get(kind, ()), plan.layers.get(kind, ()), strict=False):
            _check_part(axis, layer, _keeps(plan, geometry, SUBLAYER_OF[kind], axis.layer))
    for kind, layers in plan.layers.items():
        for axis, layer in zip(geometry.axes[kind], layers, strict=True):
            _check_even(axis, layer)


_CALLED = {QUERY_HEAD: ("attention", GQA_GROUP), EXPERT_CHANNEL: ("FFN", EXPERT), SHARED_CHANNEL: ("FFN", EXPERT)}


def _check_part(axis: UnitAxis, layer: LayerPlan, stays: bool) -> None:
    """Refuse units that stay where their sub-layer goes, or that all go where it stays."""
    sublayer, whole = _CALLED[axis.kind]
    if layer.is_removed and stays:
        raise PlanError(
            f"the plan keeps no {axis.kind} in layer {axis.layer}, but does not say that its {sublayer} goes. Keep "
            f"no {whole} there either, or keep a {axis.kind.replace('_', ' ')} of every group."
        )
    if layer.keep and not stays:
        raise PlanError(
            f"the plan takes the {sublayer} out of layer {axis.layer}, but keeps {axis.kind}s there. Keep none."
        )


_MIXED_UP = {
    QUERY_HEAD: "query heads would read another group's key/value head",
    EXPERT: "the router would take experts for another group's",
    EXPERT_CHANNEL: "the experts of a layer would differ in width",
}


def _check_even(axis: UnitAxis, layer: LayerPlan) -> None:
    """Refuse different numbers of units in the groups of a layer."""
    if axis.per_group is None or not layer.keep:
        return
    counts = Counter(unit // axis.per_group for unit in layer.keep)
    kept = [counts[group] for group in range(axis.num_groups)]
    if len(set(kept)) > 1:
        shown = ", ".join(map(str, kept if len(kept) <= 16 else [*kept[:15], "..."]))
        raise PlanError(
            f"the plan keeps {shown} {axis.kind}s in the {axis.num_groups} groups of layer {axis.layer}. Every group "
            f"must keep as many as the others, or {_MIXED_UP[axis.kind]}."
        )


def _keeps(plan: Plan, geometry: Geometry, kind: str, layer: int) -> bool:
    """Return whether a layer still has a sub-layer afterwards."""
    entries = [plan.layers[axis][layer] for axis in AXES_OF[kind] if axis in plan.layers]
    if any(entry.num_units for entry in entries):
        return any(entry.keep for entry in entries)
    return geometry.has_sublayer(kind, layer)


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
    refitted: Mapping[str, Tensor] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter that stays, with the rows and columns of removed units and token ids gone.

    Names are the dense ones, except that later layers move up where whole layers go.

    Experts that the plan merges are merged first (``merge_experts``), so those of a layer must come in one run.
    Removed channels that were constant on the calibration text are folded into the bias of the projection that read
    them. Parameters are taken one at a time, so they may be read lazily; a bias must not come before its weight.

    Args:
        parameters: (name, tensor) pairs of the dense model.
        plan: made for this model.
        geometry: of this model.
        reconstruct: gives the weight of a projection that reads removed channels, out of the dense one; None keeps the
            columns of the kept channels as they are.
        refitted: weights of projections that lose nothing but change all the same, by module, as out x channels.

    Raises:
        PlanError: the plan does not fit the model; see also ``check_plan``.
    """
    check_plan(plan, geometry)
    cuts, constants = _cuts(plan, geometry)
    tensor_cuts = _tensor_cuts(plan, geometry)
    readers = _readers(plan, geometry) if reconstruct is not None else {}
    shifts: dict[str, tuple[Tensor, list[float]]] = {}
    rows_first = geometry.family.weight_layout == "out_in"
    gone, names = removed_modules(plan, geometry), _NewNames(plan, geometry)
    tokens = None if plan.vocabulary is None else torch.tensor(plan.vocabulary.keep)
    for name, tensor in merge_experts(parameters, plan, geometry):
        module, _, leaf = name.rpartition(".")
        if is_inside(name, gone):
            continue
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
            yield names[name], (matrix if rows_first else matrix.T).contiguous()
        elif refitted and leaf == "weight" and module in refitted:
            matrix = refitted[module].to(tensor)
            yield names[name], (matrix if rows_first else matrix.T).contiguous()
        else:
            if name in tensor_cuts:
                yield names[name], _slice_tensor(tensor, tensor_cuts[name])
            else:
                yield names[name], _slice(tensor, leaf, module, cuts, rows_first)
    if shifts:
        raise PlanError(f"{min(shifts)} has no bias that could take its removed constants over. Plan again.")


def _readers(plan: Plan, geometry: Geometry) -> dict[str, tuple[UnitAxis, list[int]]]:
    """Return the projections that read removed channels, by module, with the channels that stay."""
    return {
        axis.reader: (axis, kept_channels(axis, layer.keep))
        for kind, layers in plan.layers.items()
        for axis, layer in zip(geometry.axes[kind], layers, strict=True)
        if layer.is_narrowed and axis.segments and axis.kind != EXPERT
    }


def removed_modules(plan: Plan, geometry: Geometry) -> frozenset[str]:
    """Return the modules that go whole: layers, and sub-layers with the norms of their own in layers that stay."""
    blocks = [(LAYER, layer) for layer in plan.removed_layers]
    blocks += [(kind, layer) for kind in (ATTENTION, FFN) for layer in plan.removed_sublayers(kind)]
    return frozenset(module for block in blocks for module in geometry.block_modules(*block))


class _NewNames:
    """Dense parameter names to pruned ones: layers are numbered anew where some go."""

    def __init__(self, plan: Plan, geometry: Geometry) -> None:
        self._geometry = geometry
        self._index = new_layer_indices(plan, geometry)

    def __getitem__(self, name: str) -> str:
        layer = self._geometry.layer_of(name)
        if layer is None:
            return name
        rest = name.removeprefix(self._geometry.layer_name(layer))
        return self._geometry.layer_name(self._index[layer]) + rest


def new_layer_indices(plan: Plan, geometry: Geometry) -> dict[int, int]:
    """Return the new index of every layer that stays, by its dense one."""
    gone = set(plan.removed_layers)
    stay = (layer for layer in range(geometry.num_layers) if layer not in gone)
    return {layer: index for index, layer in enumerate(stay)}


def _cuts(plan: Plan, geometry: Geometry) -> tuple[_Cuts, dict[str, list[tuple[int, float]]]]:
    cuts: _Cuts = defaultdict(list)
    constants: dict[str, list[tuple[int, float]]] = {}
    for kind, layers in plan.layers.items():
        for axis, layer in zip(geometry.axes[kind], layers, strict=True):
            if not layer.is_narrowed:
                continue
            for segment in axis.segments:
                cuts[segment.module, segment.side].append((segment, axis.num_units, layer.keep))
            if layer.constants:
                constants[axis.reader] = list(layer.constants)
    return cuts, constants


def _tensor_cuts(plan: Plan, geometry: Geometry) -> _TensorCuts:
    """Return what is cut of parameters and buffers that are no linear layer's, by name."""
    cuts: _TensorCuts = defaultdict(list)
    for kind, layers in plan.layers.items():
        for axis, layer in zip(geometry.axes[kind], layers, strict=True):
            if layer.is_narrowed:
                for part in axis.tensors:
                    cuts[part.name].append((part, axis.num_units, axis.num_groups, layer.keep))
    return cuts


def _slice_tensor(tensor: Tensor, cuts: Sequence[tuple[TensorSlice, int, int, Sequence[int]]]) -> Tensor:
    """Return the tensor without the entries of removed units."""
    for dim in sorted({part.dim for part, *_ in cuts}):
        along = [cut for cut in cuts if cut[0].dim == dim]
        keep = kept_entries(along, tensor.shape[0], tensor.shape[dim]).to(tensor.device)
        if keep.dim() == 1:
            tensor = tensor.index_select(dim, keep)
        else:
            shape = [1] * tensor.dim()
            shape[0], shape[dim] = keep.shape
            size = list(tensor.shape)
            size[dim] = keep.shape[1]
            tensor = tensor.gather(dim, keep.reshape(shape).expand(size))
    return tensor.contiguous()


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

    Uniform plans keep the stock model type, with fewer layers where some go. Uneven plans, and any plan for a model
    that is uneven already, get our own model type and ``per_layer_config`` in transformers' vocabulary, holding every
    layer that differs from the configuration's own values; a sub-layer that a layer lacks is named under ``skip``.
    Where token ids go, every id that the configuration names is renumbered.

    Raises:
        PlanError: the plan does not fit the model; see ``check_plan``.
        TokenizerError: the configuration names a token id that does not stay.
    """
    check_plan(plan, geometry)
    pruned = dict(config)
    if plan.vocabulary is not None:
        pruned = renumber(config, plan.vocabulary.keep) | geometry.vocabulary_updates(len(plan.vocabulary.keep))
    indices = new_layer_indices(plan, geometry)
    if plan.removed_layers:
        pruned |= _fewer_layers(config, geometry, list(indices))
    if plan.shape == "uniform" and not config.get("per_layer_config"):
        for kind in LAYER_UNIT_KINDS:  # query heads after their groups, which may be listed whole
            entries = [plan.layers[kind][layer] for layer in indices] if kind in plan.layers else []
            kept = [len(entry.keep) for entry in entries if entry.keep]
            if kept:
                pruned.update(geometry.config_updates(kind, kept[0]))
        return pruned
    overrides = _overrides(config, plan, geometry)
    pruned["per_layer_config"] = {str(new): overrides[old] for old, new in indices.items() if old in overrides}
    pruned["model_type"] = UNEVEN_PREFIX + dense_model_type(str(config["model_type"]))
    pruned.pop("architectures", None)
    return pruned


def _fewer_layers(config: Mapping[str, Any], geometry: Geometry, stay: Sequence[int]) -> dict[str, Any]:
    """Return the keys of a configuration that count layers or have one entry per layer, for the layers that stay."""
    lists = {key: config.get(key) for key in geometry.family.blocks.per_layer}
    updates: dict[str, Any] = {key: [value[layer] for layer in stay] for key, value in lists.items() if value}
    return updates | geometry.layers_updates(stay)


def _overrides(config: Mapping[str, Any], plan: Plan, geometry: Geometry) -> dict[int, dict[str, Any]]:
    """Return what differs from the configuration's own values, by the dense index of a layer."""
    overrides: dict[int, dict[str, Any]] = {
        int(layer): dict(values) for layer, values in (config.get("per_layer_config") or {}).items()
    }
    for kind, layers in plan.layers.items():
        for index, layer in enumerate(layers):
            if layer.is_narrowed:
                overrides.setdefault(index, {}).update(geometry.config_updates(kind, len(layer.keep), index))
            elif layer.is_removed:
                own = overrides.setdefault(index, {})
                for key in geometry.config_updates(kind, layer.num_units, index):
                    own.pop(key, None)
                own["skip"] = sorted({*own.get("skip", ()), SKIP_WORDS[SUBLAYER_OF[kind]]})
    return overrides


def shrink_generation_config(config: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """Return the generation configuration of the pruned model as plain data: token ids renumbered, the rest as it was.

    Raises:
        TokenizerError: it names a token id that does not stay.
    """
    return dict(config) if plan.vocabulary is None else renumber(config, plan.vocabulary.keep)
