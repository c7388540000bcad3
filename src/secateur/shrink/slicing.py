"""Index arithmetic for cutting units out of weights: pure, no models.

Dims: ``rows`` the dimension that is cut.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from secateur.families.geometry import Segment


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


def fold_constants(
    bias: Float[Tensor, " out_ch"], columns: Float[Tensor, "out_ch removed"], values: Sequence[float]
) -> Float[Tensor, " out_ch"]:
    """Return ``bias`` plus the contribution of removed input channels that were constant.

    Accumulated in float64; exact where the channels are exactly constant.
    """
    shift = columns.double() @ torch.tensor(values, dtype=torch.float64, device=columns.device)
    return (bias.double() + shift).to(bias.dtype)
