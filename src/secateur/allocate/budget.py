"""What units cost in parameters, and what a model holds: ratio <-> units <-> parameters <-> bytes. Pure arithmetic.

``shapes`` is a model's parameters by name, tied ones once.
"""

from __future__ import annotations

from collections.abc import Mapping

from secateur.families.geometry import Geometry, UnitAxis, parameters_by_part

Shapes = Mapping[str, tuple[int, ...]]


def unit_cost(axis: UnitAxis, shapes: Shapes, weight_layout: str) -> dict[str, int]:
    """Return the parameters that one unit owns, by parameter name."""
    cost: dict[str, int] = {}
    for segment in axis.segments:
        name = f"{segment.module}.weight"
        rows, columns = shapes[name]
        other = columns if (segment.side == "out") == (weight_layout == "out_in") else rows
        cost[name] = cost.get(name, 0) + segment.width * other
        bias = f"{segment.module}.bias"
        if segment.side == "out" and bias in shapes:
            cost[bias] = cost.get(bias, 0) + segment.width
    return cost


def cost_per_unit(geometry: Geometry, kind: str, shapes: Shapes) -> list[int]:
    """Return the parameters that one unit of a kind owns, per layer."""
    layout = geometry.family.weight_layout
    return [sum(unit_cost(axis, shapes, layout).values()) for axis in geometry.axes[kind]]


def token_cost(geometry: Geometry, shapes: Shapes) -> int:
    """Return the parameters that one token id owns: its row of the embedding, and of the head unless that is tied."""
    return sum(geometry.vocabulary_costs(shapes).values())


def parameters_after(
    shapes: Shapes, geometry: Geometry, removed: Mapping[str, list[int]], *, tokens_removed: int = 0
) -> dict[str, int]:
    """Return parameters by part after removing ``removed[kind][layer]`` units and ``tokens_removed`` token ids."""
    totals = parameters_by_part(shapes, geometry)
    for kind, counts in removed.items():
        for axis, count in zip(geometry.axes[kind], counts, strict=True):
            for name, cost in unit_cost(axis, shapes, geometry.family.weight_layout).items():
                totals[geometry.part_of(name)] -= count * cost
    for name, cost in geometry.vocabulary_costs(shapes).items():
        totals[geometry.part_of(name)] -= tokens_removed * cost
    return totals
