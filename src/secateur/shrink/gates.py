"""Scales of the routed experts that stay, so that their sum is near that of all of them: pure tensor maths, no models.

Where a router does not make the weights of a token's experts add up to 1, removing experts makes the weights of the
others larger. And where it does, others answer in place of those that went. With y the sum that all routed experts of a
layer give a token, z_e what the kept expert e gives it once the router knows no other (its weight times its output; 0
where the token is sent elsewhere), the scales s minimise E||y - sum_e s_e z_e||^2. One scale per layer is <y, z> / <z,
z>, z the sum of z_e. One scale per expert is a system of as many equations as experts stay, with a ridge towards the
scale of the layer.

Scales go into the last projection of each expert and its bias, so they cost nothing in a model.

Dims: ``kept`` experts of a layer that stay, ``others`` the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from secateur.errors import PlanError
from secateur.shrink.reconstruct import RIDGES

LEAST_SCALE = 0.01
"""Scales are at least this much: an expert keeps its sign, and is not taken out in disguise."""


@dataclass(frozen=True, slots=True)
class GateSums:
    """Sums over the tokens of one text, with y and z as above.

    Attributes:
        products: sum of <z_e, z_f>.
        wanted: sum of <y, z_e>.
        power: sum of <y, y>.
    """

    products: Float64[Tensor, "kept others"]
    wanted: Float64[Tensor, " kept"]
    power: float

    @classmethod
    def empty(cls, kept: int) -> GateSums:
        """Return the sums of no text."""
        return cls(torch.zeros(kept, kept).double(), torch.zeros(kept).double(), 0.0)

    def __add__(self, other: GateSums) -> GateSums:
        return GateSums(self.products + other.products, self.wanted + other.wanted, self.power + other.power)

    def scaled(self, factor: float) -> GateSums:
        """Return the sums of a text that counts ``factor`` times."""
        return GateSums(self.products * factor, self.wanted * factor, self.power * factor)

    def error(self, scales: Float64[Tensor, " kept"]) -> float:
        """Return E||y - sum_e s_e z_e||^2 / E||y||^2; rounding below 0 counts as 0."""
        error = self.power + float(scales @ (self.products @ scales - 2 * self.wanted))
        if self.power > 0:
            return max(error, 0.0) / self.power
        return 0.0 if error <= 0 else math.inf


@dataclass(frozen=True, slots=True)
class GateFit:
    """The scales chosen for a layer.

    Attributes:
        scales: of the experts that stay, in their order.
        ridge: relative ridge of one scale per expert; infinite for one scale per layer; None where 1 stayed because
            nothing was better on held-out text.
        error_before: held-out relative squared error of scales of 1; ``error_after`` that of ``scales``.
    """

    scales: Float64[Tensor, " kept"]
    ridge: float | None
    error_before: float
    error_after: float


def fit_scales(sums: GateSums, ridge: float) -> Float64[Tensor, " kept"]:
    """Return the scales that fit some text best; an infinite ridge gives one scale for all.

    The ridge is towards that one scale and relative to the mean of E||z_e||^2, so an expert that was hardly asked has
    the scale of its layer.

    Args:
        sums: of the text.
        ridge: above 0.

    Raises:
        PlanError: the sums are not finite.
    """
    assert ridge > 0, f"ridge {ridge} is not above 0"
    _require_finite(sums)
    total = float(sums.products.sum())
    common = float(sums.wanted.sum()) / total if total > 0 else 1.0
    alike = torch.full_like(sums.wanted, common)
    if not math.isinf(ridge) and total > 0:
        damped = (sums.products + sums.products.T) / 2
        damped.diagonal().add_(ridge * float(sums.products.diagonal().mean()))
        alike = alike + torch.linalg.solve(damped, sums.wanted - sums.products @ alike)
    return alike.clamp_min(LEAST_SCALE)


def choose_scales(
    fitted: GateSums, held_out: GateSums, *, ridges: Sequence[float] = (math.inf, *reversed(RIDGES))
) -> GateFit:
    """Return the scales that fit held-out text best, which may be 1 for all.

    The ridge that judges best is used once more on both texts together, because more text fits better; the errors are
    those of the first fit, on text that it did not see.

    Args:
        fitted: sums of the text that scales are fitted to.
        held_out: sums of the text that judges.
        ridges: to try; the first of equally good ones wins.

    Raises:
        PlanError: sums are not finite.
    """
    _require_finite(held_out)
    ones = torch.ones_like(fitted.wanted)
    before = held_out.error(ones)
    errors = {ridge: held_out.error(fit_scales(fitted, ridge)) for ridge in ridges}
    best = min(errors, key=lambda ridge: errors[ridge])
    if errors[best] >= before:
        return GateFit(ones, None, before, before)
    return GateFit(fit_scales(fitted + held_out, best), best, before, errors[best])


def _require_finite(sums: GateSums) -> None:
    finite = all(bool(torch.isfinite(part).all()) for part in (sums.products, sums.wanted))
    if not (finite and math.isfinite(sums.power)):
        raise PlanError(
            f"what {len(sums.wanted)} experts that stay give on the text is not finite, so no scale can be fitted. Run "
            "in a dtype with a wider range (bfloat16 or float32), and check that the model itself is sound."
        )
