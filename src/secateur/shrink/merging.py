"""Merges routed experts: those of a group become one, in the place of the one that stays.

A channel of an expert means nothing by its number, so before experts are averaged the channels of each are put in the
order of the one that stays: the order in which all weights of a channel together, into it and out of it, are most like
(largest sum of inner products, one exact assignment problem per expert). An expert whose channels are put in another
order computes the same.

Source: aligned, usage-weighted merging as in MC-SMoE (Li et al. 2024, arXiv 2310.01334) and UNCURL (Sarkar et al. 2024,
arXiv 2409.01483).

Dims: ``width`` channels of an expert, ``others`` those of another one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Int64
from torch import Tensor

from secateur.errors import PlanError
from secateur.families.geometry import Geometry, RoutedExperts, TensorSlice
from secateur.records.plan import LayerPlan, Plan
from secateur.records.units import EXPERT, EXPERT_CHANNEL


def check_merged(plan: Plan, geometry: Geometry) -> None:
    """Refuse groups of experts that do not fit the experts that stay.

    Raises:
        PlanError: a group is not that of an expert that stays, shares members with another, reaches into another
            routing group, or has weights that cannot be.
    """
    for kind, layers in plan.layers.items():
        for index, layer in enumerate(layers):
            problem = _problem(kind, layer, geometry.axes[kind][index].per_group) if layer.merged else None
            if problem:
                raise PlanError(
                    f"the plan merges {kind}s of layer {index}, but {problem}. Plan again, or take `merged` out of "
                    "this layer."
                )


def _problem(kind: str, layer: LayerPlan, per_group: int | None) -> str | None:
    if kind != EXPERT:
        return "only experts can be merged"
    if len(layer.merged) != len(layer.keep):
        return f"{len(layer.merged)} groups are not one for each of the {len(layer.keep)} experts that stay"
    members = [member for group in layer.merged for member, _ in group]
    if len(set(members)) < len(members) or not all(0 <= member < layer.num_units for member in members):
        return "some expert is in two groups, or there is none of that number"
    for stays, group in zip(layer.keep, layer.merged, strict=True):
        if stays not in [member for member, _ in group]:
            return f"expert {stays} stays and is not in the group of its place"
        if per_group is not None and any(member // per_group != stays // per_group for member, _ in group):
            return f"the group of expert {stays} reaches into another of the router's groups"
        if not (all(weight >= 0 for _, weight in group) and 0 < sum(weight for _, weight in group) < float("inf")):
            return f"the weights in the group of expert {stays} are not numbers from 0 with a sum above 0"
    return None


def merge_experts(
    parameters: Iterable[tuple[str, Tensor]], plan: Plan, geometry: Geometry
) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters with every group of experts merged into the one that stays; the others are still there.

    All tensors of a layer's experts are held at once, and once more where some change. Routers stay as they are.

    Args:
        parameters: (name, tensor) pairs of the dense model; those of a layer's experts in one run.
        plan: checked.
        geometry: of the model.
    """
    merged = {
        experts.module: (experts, layer)
        for experts, layer in zip(geometry.experts, plan.layers.get(EXPERT, ()), strict=False)
        if experts is not None and any(len(group) > 1 for group in layer.merged)
    }
    held: dict[str, Tensor] = {}
    current: str | None = None
    for name, tensor in parameters:
        module = name.rpartition(".")[0]
        if current is not None and module != current:
            yield from _merged(held, *merged[current], geometry).items()
            held, current = {}, None
        if module in merged:
            held[name], current = tensor, module
        else:
            yield name, tensor
    if current is not None:
        yield from _merged(held, *merged[current], geometry).items()


def _merged(
    tensors: Mapping[str, Tensor], experts: RoutedExperts, layer: LayerPlan, geometry: Geometry
) -> dict[str, Tensor]:
    """Return the tensors of a layer's experts after merging."""
    slices = [part for part in geometry.axes[EXPERT_CHANNEL][experts.layer].tensors if part.name in tensors]
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    for stays, group in zip(layer.keep, layer.merged, strict=True):
        if len(group) < 2:
            continue
        total = sum(weight for _, weight in group)
        sums = {name: torch.zeros_like(tensor[stays], dtype=torch.float64) for name, tensor in tensors.items()}
        for member, weight in group:
            if weight == 0:
                continue
            order = None if member == stays else align(tensors, slices, stays, member, experts.width)
            for name, tensor in tensors.items():
                own = tensor[member]
                if order is not None:
                    own = reorder(own, [part for part in slices if part.name == name], order)
                sums[name] += own.double() * (weight / total)
        for name, value in sums.items():
            changed[name][stays] = value.to(changed[name].dtype)
    return changed


def align(
    tensors: Mapping[str, Tensor], slices: Sequence[TensorSlice], stays: int, other: int, width: int
) -> Int64[Tensor, " width"]:
    """Return for each channel of one expert the channel of another that is most like it, each once.

    Args:
        tensors: of the layer's experts, by name.
        slices: where the channels are in them; those of tensors without channels are left out.
        stays: expert whose order is wanted.
        other: expert that is put in that order.
        width: channels of an expert.
    """
    from scipy.optimize import linear_sum_assignment

    likeness: Tensor | None = None
    for part in slices:
        mine, theirs = (_channels(tensors[part.name][expert], part, width) for expert in (stays, other))
        product = mine @ theirs.T
        likeness = product if likeness is None else likeness + product
    assert likeness is not None, "experts have channels"
    _, columns = linear_sum_assignment(likeness.double().cpu().numpy(), maximize=True)
    return torch.from_numpy(columns).to(likeness.device)


def reorder(tensor: Tensor, slices: Sequence[TensorSlice], order: Int64[Tensor, " width"]) -> Tensor:
    """Return a tensor of one expert with its channels in another order; one without channels as it is.

    Args:
        tensor: of one expert, so without the dimension that counts experts.
        slices: where the channels are in it.
        order: for each place the channel that comes there.
    """
    for dim in sorted({part.dim for part in slices}):
        index = torch.arange(tensor.shape[dim - 1], device=tensor.device)
        for part in (part for part in slices if part.dim == dim):
            entries = order[:, None] * part.width + torch.arange(part.width, device=order.device) + part.offset
            index[part.offset : part.offset + len(order) * part.width] = entries.flatten()
        tensor = tensor.index_select(dim - 1, index)
    return tensor


def _channels(tensor: Tensor, part: TensorSlice, width: int) -> Tensor:
    """Return what a tensor of one expert holds of each channel, float32 at least, of shape (width, elements)."""
    entries = tensor.movedim(part.dim - 1, 0)[part.offset : part.offset + width * part.width]
    rows = entries.reshape(width, -1)
    return rows if rows.dtype == torch.float64 else rows.float()
