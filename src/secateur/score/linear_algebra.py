"""Least squares that several scores share: ridges, inverses and what removing channels costs; no options, no budgets.

The setting: a projection y = W x reads ``channels`` inputs, and H = E[x xT] over the calibration tokens. Removing a set
D of channels and letting the others take over as well as they can leaves a mean squared error of the output of
tr(W_D ([H^-1]_DD)^-1 W_DT). Everything is float64; what cannot be factored raises ``torch.linalg.LinAlgError``.

Source: the Schur complement; as a pruning criterion Hassibi and Stork 1992 (Optimal Brain Surgeon), for whole columns
Kurtic et al. 2023 (ZipLM, arXiv 2302.04089).

Dims: ``channels`` inputs, ``out`` outputs, ``units`` of ``width`` consecutive channels each.
"""

from __future__ import annotations

from typing import Annotated

import torch
from jaxtyping import Float64, Int64
from pydantic import Field
from torch import Tensor

Ridge = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
"""A ridge as a share of the mean diagonal element of H; at least 0."""

RIDGE: float = 1e-2
"""The usual ridge: Optimal Brain Surgeon variants for language models agree on a hundredth."""

_SMALLEST_SCALE = 1e-100
"""Stands in for the mean diagonal where every channel is silent, so that scores come out as (almost) 0."""


def ridge_size(gram: Float64[Tensor, "channels channels"], ridge: Ridge) -> Float64[Tensor, ""]:
    """Return lambda = ridge * mean(diag H), in the unit of H: activation squared."""
    return ridge * gram.diagonal().mean().clamp_min(_SMALLEST_SCALE)


def with_ridge(gram: Float64[Tensor, "channels channels"], ridge: Ridge) -> Float64[Tensor, "channels channels"]:
    """Return H + lambda I with lambda = ridge * mean(diag H)."""
    damped = gram.clone()
    damped.diagonal().add_(ridge_size(gram, ridge))
    return damped


def inverse(matrix: Float64[Tensor, "channels channels"]) -> Float64[Tensor, "channels channels"]:
    """Return the inverse of a symmetric positive definite matrix.

    Raises:
        torch.linalg.LinAlgError: the matrix is not positive definite.
    """
    result: Tensor = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
    return result


def removal_errors(
    inverse_gram: Float64[Tensor, "channels channels"], columns: Float64[Tensor, "channels out"], width: int
) -> Float64[Tensor, " units"]:
    """Return per unit g the error of removing it alone: tr(W_g ([H^-1]_gg)^-1 W_gT), in output squared.

    Args:
        inverse_gram: H^-1.
        columns: WT, one row per channel.
        width: channels per unit.

    Raises:
        torch.linalg.LinAlgError: a diagonal block is not positive definite.
    """
    if width == 1:
        return columns.square().sum(1) / inverse_gram.diagonal()
    units = len(columns) // width
    blocks = inverse_gram.reshape(units, width, units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    factors = torch.linalg.cholesky(blocks)
    solved = torch.linalg.solve_triangular(factors, columns.reshape(units, width, -1), upper=False)
    errors: Tensor = solved.square().sum((1, 2))
    return errors


def default_step(num_units: int) -> int:
    """Return how many units greedy removal takes between two scorings: a 48th of them, at least 1, at most 32."""
    return min(max(num_units // 48, 1), 32)


def greedy_removal_errors(
    inverse_gram: Float64[Tensor, "channels channels"], columns: Float64[Tensor, "channels out"], width: int, step: int
) -> Float64[Tensor, " units"]:
    """Return per unit the error of removing it together with all units that were removed before it.

    The units are removed one after another until none is left. Every ``step`` removals the remaining ones are scored
    anew with ``removal_errors``, and the ``step`` lowest go, the lowest first. The Cholesky factor of their block of
    H^-1 gives both the exact error that each of them adds and the update of H^-1 and W to the remaining channels.

    Args:
        inverse_gram: H^-1.
        columns: WT, one row per channel.
        width: channels per unit.
        step: units removed between two scorings.

    Raises:
        torch.linalg.LinAlgError: a diagonal block is not positive definite.
    """
    inverse_gram, columns = inverse_gram.clone(), columns.clone()
    left = torch.arange(len(columns) // width, device=columns.device)
    errors = columns.new_zeros(len(left))
    error = columns.new_zeros(())
    while len(left):
        inner, outer = inverse_gram[: len(left) * width, : len(left) * width], columns[: len(left) * width]
        by_unit = left.argsort()
        order = by_unit[removal_errors(inner, outer, width)[by_unit].argsort(stable=True)]
        gone, rest = order[:step], order[step:]
        channels = _channels(gone, width)
        rows = inner[channels]
        factor = torch.linalg.cholesky(rows[:, channels])
        pulls = torch.linalg.solve_triangular(factor, rows, upper=False)
        changes = torch.linalg.solve_triangular(factor, outer[channels], upper=False)
        reached = error + changes.square().sum(1).reshape(-1, width).sum(1).cumsum(0)
        errors[left[gone]], error = reached, reached[-1]
        inner.addmm_(pulls.T, pulls, alpha=-1)
        outer.addmm_(pulls.T, changes, alpha=-1)
        # The places that fell empty are filled from the end, so that what is left stays one block that need not move.
        holes, moved = gone[gone < len(rest)], rest[rest >= len(rest)]
        to, origin = _channels(holes, width), _channels(moved, width)
        inner[to] = inner[origin]
        inner[:, to] = inner[:, origin]
        outer[to] = outer[origin]
        left[holes] = left[moved]
        left = left[: len(rest)]
    return errors


def _channels(units: Int64[Tensor, " some"], width: int) -> Int64[Tensor, " more"]:
    """Return the channels of units, in the order of the units."""
    return (units[:, None] * width + torch.arange(width, device=units.device)).reshape(-1)
