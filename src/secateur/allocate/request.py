"""What is asked of the allocator: a budget and its constraints, and how many parameters that is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from secateur.allocate.budget import Shapes
from secateur.errors import PlanError
from secateur.families.geometry import Geometry, parameters_by_part
from secateur.recipe import Allocation, PruneSpec

RULES = ("log_increase", "block_influence")
"""Allocations that set each layer's share by a rule."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of the allocator.

    Attributes:
        budget: shares of units removed (``channels``, ``groups``, ``heads``, ``experts``, ``expert_channels``,
            ``shared_channels``, ``layers``, ``attention``, ``ffn``, one or more; each of the units in what coarser
            units leave); or one of ``parameters``: share removed; ``bytes``: target size of the weights; ``threshold``:
            absolute score at or below which units go.
        shape: ``uniform`` or ``uneven``.
        allocation: ``uniform`` (same share everywhere); in uneven shape also ``global`` (rank the whole model),
            ``log_increase``, ``block_influence`` (shares by a rule); ``knapsack`` and ``search`` are measured, which is
            not the allocator's business.
        min_keep_ratio: share of a layer's units that global ranking and thresholds never go below.
        multiple_of: kept widths of FFNs and experts are multiples of this; ``auto`` is 32 from a width of 512 on, else
            1, or 8 inside routed experts, whose product takes no other widths.
        normalize: ``layer``: before layers compete, scores are standardised within each (mean 0, deviation 1), because
            raw scores of different layers have different scales; ``none``: they compete as they are.
        bytes_per_parameter: of the saved weights, for ``bytes``.
        influence: per layer, 1 - mean cosine of its input and output, for ``block_influence``.
    """

    budget: Mapping[str, int | float]
    shape: Literal["uniform", "uneven"] = "uniform"
    allocation: Allocation = "auto"
    min_keep_ratio: float = 0.1
    multiple_of: int | Literal["auto"] = "auto"
    normalize: Literal["layer", "none"] = "layer"
    bytes_per_parameter: float = 4.0
    influence: Sequence[float] = ()

    @classmethod
    def of(cls, spec: PruneSpec, *, bytes_per_parameter: float, influence: Sequence[float] = ()) -> Request:
        """Return the request that a recipe's ``prune`` section makes; ``influence`` as below."""
        return cls(
            budget=spec.budget.model_dump(exclude_none=True) if spec.budget else {},
            shape=spec.shape,
            allocation=spec.allocation,
            min_keep_ratio=spec.min_keep_ratio,
            multiple_of=spec.multiple_of,
            normalize=spec.normalize,
            bytes_per_parameter=bytes_per_parameter,
            influence=influence,
        )

    @property
    def is_global(self) -> bool:
        """Whether layers compete with each other for units."""
        return self.allocation == "global" or (self.allocation == "auto" and self.shape == "uneven")


def parameters_to_remove(request: Request, shapes: Shapes, geometry: Geometry) -> float:
    """Return how many parameters a budget of ``parameters`` or ``bytes`` wants gone.

    Raises:
        PlanError: the model is no larger than the target already.
    """
    total = sum(parameters_by_part(shapes, geometry).values())
    if "parameters" in request.budget:
        return request.budget["parameters"] * total
    target = request.budget["bytes"] / request.bytes_per_parameter
    if target >= total:
        raise PlanError(
            f"the model already takes {total * request.bytes_per_parameter:,.0f} bytes, which is not more "
            f"than the target of {request.budget['bytes']:,.0f}. Ask for a smaller target."
        )
    return total - target
