"""Reconstruction in terms of two streams: the target is what the dense projection makes of the dense stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from secateur.shrink import reconstruct as room


def dense_output(weight: Tensor, cross: Tensor | None) -> Tensor | None:
    """Return E[W x x~T] from E[x~ xT]."""
    return None if cross is None else weight.double() @ cross.double().T


def dense_power(weight: Tensor, dense: Tensor | None) -> float | None:
    """Return E||W x||^2 from E[x xT]."""
    return None if dense is None else float(((weight.double() @ dense.double()) * weight.double()).sum())


def reconstruct(weight: Tensor, gram: Tensor, keep: Tensor, *, ridge: float, cross: Tensor | None = None) -> Tensor:
    """Return ``shrink.reconstruct`` with the dense output as the target."""
    return room.reconstruct(weight, gram, keep, ridge=ridge, target=dense_output(weight, cross))


def output_error(
    weight: Tensor,
    kept_weight: Tensor,
    gram: Tensor,
    keep: Tensor,
    *,
    cross: Tensor | None = None,
    dense: Tensor | None = None,
) -> float:
    """Return ``shrink.output_error`` with the dense output as the target."""
    target, power = dense_output(weight, cross), dense_power(weight, dense)
    return room.output_error(weight, kept_weight, gram, keep, target=target, power=power)


def choose_reconstruction(
    weight: Tensor,
    gram: Tensor,
    held_out: Tensor,
    keep: Tensor,
    *,
    ridges: Sequence[float] = room.RIDGES,
    cross: Tensor | None = None,
    held_out_cross: Tensor | None = None,
    held_out_dense: Tensor | None = None,
) -> Any:
    """Return ``shrink.choose_reconstruction`` with the dense output as the target."""
    return room.choose_reconstruction(
        weight,
        gram,
        held_out,
        keep,
        ridges=ridges,
        target=dense_output(weight, cross),
        held_out_target=dense_output(weight, held_out_cross),
        held_out_power=dense_power(weight, held_out_dense),
    )
