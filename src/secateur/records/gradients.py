"""What one backward pass over a text leaves behind: sums per unit of how strongly the loss depends on it.

Plain sums over sequences, like all statistics; a sequence is one calibration block, and its loss the mean over its
predicted tokens. Removing a unit is setting its weights to zero, or the mask it is multiplied with from 1 to 0; the
products of values and gradients say how the loss would follow.

Dims: ``units`` of one kind in one layer, ``out`` outputs of the projection that reads them, ``directions`` random ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from secateur.records.units import SiteKey


@dataclass(frozen=True, slots=True)
class UnitGradients:
    """Sums over ``count`` sequences; w are a unit's coupled weights, g_n the gradient of sequence n's loss.

    Attributes:
        count: sequences.
        mask_sq: of (dL_n/dm)^2 for a mask m of the unit at the input of the projection that reads it, so that
            dL_n/dm = sum over tokens and the unit's channels of x dL_n/dx.
        weight_abs: of the sum over the unit's weights of |w g_n|.
        weight_sq: of the sum over the unit's weights of (w g_n)^2.
        weight_mixed: of the sum over the unit's weights of |w g_n - (w g_n)^2 / 2|.
        mask_abs: of |dL_n/dm|.
        output: of g gT over the sequences' tokens, g the gradient at the output of the projection that reads the units;
            None where it was not asked for, because it is large.
        sketch: of random projections of g_n, the gradient of all of the unit's weights as one vector; the same
            projections for every text, so that the cosine of two texts' sums estimates that of their mean gradients, to
            about 1 / sqrt(directions). None where it was not asked for.
    """

    count: int
    mask_sq: Float64[Tensor, " units"]
    weight_abs: Float64[Tensor, " units"]
    weight_sq: Float64[Tensor, " units"]
    weight_mixed: Float64[Tensor, " units"]
    mask_abs: Float64[Tensor, " units"]
    output: Float[Tensor, "out out"] | None = None
    sketch: Float[Tensor, "units directions"] | None = None


OPTIONAL: tuple[str, ...] = ("output", "sketch")
"""The sums that are only there where they were asked for, by name."""
SUMS: tuple[str, ...] = tuple(entry.name for entry in fields(UnitGradients) if entry.name not in ("count", *OPTIONAL))
"""The sums per unit that ``UnitGradients`` holds, by name."""


@dataclass(frozen=True, slots=True)
class GradientStatistics:
    """The gradients of one text.

    Attributes:
        num_tokens: real tokens that were run.
        units: by site (layer, unit kind).
    """

    num_tokens: int
    units: Mapping[SiteKey, UnitGradients]


def merge_gradients(texts: Sequence[GradientStatistics], shares: Sequence[float] | None = None) -> GradientStatistics:
    """Return the gradients of several texts as those of one; they must come from the same model and sites.

    Args:
        texts: one or more.
        shares: weight of each text's mean over sequences, adding up to 1; None counts every sequence the same.

    Raises:
        ValueError: the texts have different sites.
    """
    if any(text.units.keys() != texts[0].units.keys() for text in texts):
        raise ValueError("gradients at different sites cannot be merged")
    units = {site: _merged([text.units[site] for text in texts], shares) for site in texts[0].units}
    return GradientStatistics(sum(text.num_tokens for text in texts), units)


def _merged(parts: Sequence[UnitGradients], shares: Sequence[float] | None) -> UnitGradients:
    count = sum(part.count for part in parts)
    scales = [1.0] * len(parts)
    if shares is not None:
        scales = [share * count / part.count for part, share in zip(parts, shares, strict=True)]
    sums = {
        name: torch.stack([getattr(part, name) * scale for part, scale in zip(parts, scales, strict=True)]).sum(0)
        for name in SUMS
    }
    asked = {name: [getattr(part, name) for part in parts] for name in OPTIONAL}
    optional = {
        name: torch.stack([found * scale for found, scale in zip(values, scales, strict=True)]).sum(0)
        for name, values in asked.items()
        if all(found is not None for found in values)
    }
    return UnitGradients(count, **sums, **optional)
