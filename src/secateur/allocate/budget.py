"""What units cost in parameters, and what a model holds: ratio <-> units <-> parameters <-> bytes. Pure arithmetic.

``shapes`` is a model's parameters by name, tied ones once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from secateur.families.geometry import Geometry, UnitAxis, is_inside, parameters_by_part
from secateur.records.units import LAYER, SUBLAYER_OF, WHOLE_KINDS

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
    for part in axis.tensors:
        if part.name in shapes and not part.is_buffer:
            shape = shapes[part.name]
            others = math.prod(shape) // shape[part.dim] // (shape[0] if part.stacked else 1)
            cost[part.name] = cost.get(part.name, 0) + part.width * others
    return cost


def cost_per_unit(geometry: Geometry, kind: str, shapes: Shapes) -> list[int]:
    """Return the parameters that one unit of a kind owns, per layer."""
    layout = geometry.family.weight_layout
    return [sum(unit_cost(axis, shapes, layout).values()) for axis in geometry.axes[kind]]


def token_cost(geometry: Geometry, shapes: Shapes) -> int:
    """Return the parameters that one token id owns: its row of the embedding, and of the head unless that is tied."""
    return sum(geometry.vocabulary_costs(shapes).values())


def block_cost(geometry: Geometry, kind: str, shapes: Shapes) -> list[int]:
    """Return the parameters that go with each layer's ``attention``, ``ffn`` or ``layer``, own norms included.

    0 where the layer lacks the sub-layer. What both sub-layers share (a norm, in some families) goes with the layer.
    """
    modules = [
        frozenset(geometry.block_modules(kind, layer)) if geometry.has_block(kind, layer) else frozenset()
        for layer in range(geometry.num_layers)
    ]
    costs = [0] * geometry.num_layers
    for name, shape in shapes.items():
        layer = geometry.layer_of(name)
        if layer is not None and is_inside(name, modules[layer]):
            costs[layer] += math.prod(shape)
    return costs


def parameters_after(
    shapes: Shapes, geometry: Geometry, removed: Mapping[str, Sequence[int]], *, tokens_removed: int = 0
) -> dict[str, int]:
    """Return parameters by part after removing ``removed[kind][layer]`` units and ``tokens_removed`` token ids.

    Where all units of a kind go, so does the rest of their sub-layer; where nothing is left of both, so does the layer.
    """
    gone = _gone_modules(geometry, removed)
    totals = parameters_by_part({name: s for name, s in shapes.items() if not is_inside(name, gone)}, geometry)
    for kind, counts in removed.items():
        for axis, count in zip(geometry.axes[kind], counts, strict=True):
            if count < axis.num_units:
                for name, cost in unit_cost(axis, shapes, geometry.family.weight_layout).items():
                    totals[geometry.part_of(name)] -= count * cost
    for name, cost in geometry.vocabulary_costs(shapes).items():
        totals[geometry.part_of(name)] -= tokens_removed * cost
    return totals


def _gone_modules(geometry: Geometry, removed: Mapping[str, Sequence[int]]) -> frozenset[str]:
    modules: set[str] = set()
    for layer in range(geometry.num_layers):
        there = [kind for kind in WHOLE_KINDS if kind in geometry.axes and geometry.axes[kind][layer].num_units]
        gone = [
            kind for kind in there if kind in removed and removed[kind][layer] == geometry.axes[kind][layer].num_units
        ]
        kinds = [LAYER] if gone == there else [SUBLAYER_OF[kind] for kind in gone]
        modules.update(module for kind in kinds for module in geometry.block_modules(kind, layer))
    return frozenset(modules)
