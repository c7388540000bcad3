"""Index arithmetic for cutting units out of weights: pure, no models.

Dims: ``rows`` the dimension that is cut.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from secateur.errors import PlanError
from secateur.families.geometry import Geometry, Segment, TensorSlice


def kept_rows(segments: Sequence[tuple[Segment, int, Sequence[int]]], num_rows: int) -> Int64[Tensor, " rows"]:
    """Return the indices that stay along a dimension of ``num_rows``.

    Args:
        segments: (segment, units it holds, kept units) for every run of rows that is cut.
        num_rows: size of the dimension.

    Raises:
        ValueError: the segments overlap or leave the dimension: a family file contradicts the weights.
    """
    keep = torch.ones(num_rows, dtype=torch.bool)
    claimed = torch.zeros(num_rows, dtype=torch.bool)
    for segment, num_units, kept in segments:
        start, stop = segment.offset, segment.offset + num_units * segment.width
        if stop > num_rows or bool(claimed[start:stop].any()):
            raise ValueError(f"{segment.module}: rows {start}..{stop} overlap others or exceed {num_rows}")
        claimed[start:stop] = True
        units = torch.zeros(num_units, dtype=torch.bool)
        units[list(kept)] = True
        keep[start:stop] = units.repeat_interleave(segment.width)
    return keep.nonzero()[:, 0]


def kept_entries(
    slices: Sequence[tuple[TensorSlice, int, int, Sequence[int]]], num_groups: int, size: int
) -> Int64[Tensor, " entries"] | Int64[Tensor, "groups entries"]:
    """Return the indices that stay along a dimension of ``size``; of stacked slices one row per group.

    Args:
        slices: (slice, units it holds, groups they are in, kept units), all along one dimension; all stacked or none.
        num_groups: size of dimension 0, which counts the groups of stacked slices.
        size: size of the dimension that is cut.

    Raises:
        ValueError: the slices overlap or leave the dimension, groups are not as many as dimension 0 says, or they would
            keep different numbers of entries: a family file contradicts the weights.
    """
    keep = torch.ones(num_groups, size, dtype=torch.bool)
    claimed = torch.zeros(size, dtype=torch.bool)
    for part, num_units, groups, kept in slices:
        rows = groups if part.stacked else 1
        start, stop = part.offset, part.offset + num_units // rows * part.width
        if (part.stacked and groups != num_groups) or stop > size or bool(claimed[start:stop].any()):
            raise ValueError(f"{part.name}: entries {start}..{stop} of {rows} groups overlap others or exceed {size}")
        claimed[start:stop] = True
        units = torch.zeros(num_units, dtype=torch.bool)
        units[list(kept)] = True
        keep[:, start:stop] = units.reshape(rows, -1).repeat_interleave(part.width, dim=1)
    if not any(part.stacked for part, *_ in slices):
        return keep[0].nonzero()[:, 0]
    counts = keep.sum(1)
    if bool((counts != counts[0]).any()):
        raise ValueError(f"{slices[0][0].name}: groups would keep different numbers of entries")
    return keep.nonzero()[:, 1].reshape(num_groups, -1)


def scale_experts(
    parameters: Iterable[tuple[str, Tensor]], geometry: Geometry, factors: Mapping[int, float | Sequence[float]]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters with the output of routed experts multiplied by a number, one for a layer or one for each.

    Where a router does not make the weights of the chosen experts add up to 1, those of the experts that stay grow as
    others go; a factor below 1 takes that back. It goes into the last projection of every expert and its bias.

    Args:
        parameters: (name, tensor) pairs of a model with that geometry.
        geometry: of the model.
        factors: per layer index, the factor of all experts or one for each; layers that are not named stay as they are.

    Raises:
        PlanError: a factor is for a layer without routed experts, or not a finite number above 0.
    """
    scaled: dict[str, Tensor] = {}
    for layer, factor in factors.items():
        experts = geometry.experts[layer] if 0 <= layer < len(geometry.experts) else None
        each = list(factor) if isinstance(factor, Sequence) else [factor]
        if (
            experts is None
            or len(each) not in (1, experts.num_experts)
            or not all(math.isfinite(one) and one > 0 for one in each)
        ):
            raise PlanError(
                f"layer {layer} is to have the output of its experts multiplied by {factor}. Give a number above 0 for "
                "a layer that has experts, or one for each of them."
            )
        values = torch.tensor(each, dtype=torch.float64)
        scaled |= {f"{experts.module}.{leaf}": values for leaf in ("down_proj", "down_proj_bias")}
    for name, tensor in parameters:
        if name in scaled:
            shape = [-1] + [1] * (tensor.dim() - 1)
            yield name, (tensor.double() * scaled[name].to(tensor.device).reshape(shape)).to(tensor.dtype)
        else:
            yield name, tensor


def fold_constants(
    bias: Float[Tensor, " out_ch"], columns: Float[Tensor, "out_ch removed"], values: Sequence[float]
) -> Float[Tensor, " out_ch"]:
    """Return ``bias`` plus the contribution of removed input channels that were constant.

    Accumulated in float64; exact where the channels are exactly constant.
    """
    shift = columns.double() @ torch.tensor(values, dtype=torch.float64, device=columns.device)
    return (bias.double() + shift).to(bias.dtype)
