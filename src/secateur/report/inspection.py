"""Where a model's parameters are: by part, and by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from secateur.families.geometry import Geometry, parameters_by_part
from secateur.records.units import PARTS
from secateur.report.tables import Table, format_bytes


@dataclass(frozen=True, slots=True)
class Inspection:
    """Parameters by part, also per layer; units per layer of kinds that are there, and those that cannot be cut."""

    parameters: Mapping[str, int]
    layers: Sequence[Mapping[str, int]]
    units: Mapping[str, Sequence[int]]
    fixed: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


def inspect_parameters(shapes: Mapping[str, tuple[int, ...]], geometry: Geometry) -> Inspection:
    """Return where the parameters are.

    Args:
        shapes: the model's parameters by name, tied ones once.
        geometry: of the model.
    """
    layers = [dict.fromkeys(PARTS, 0) for _ in range(geometry.num_layers)]
    for name, shape in shapes.items():
        for index in range(geometry.num_layers):
            if name.startswith(geometry.layer_name(index) + "."):
                layers[index][geometry.part_of(name)] += math.prod(shape)
    units = {kind: [axis.num_units for axis in axes] for kind, axes in geometry.axes.items()}
    there = {kind: counts for kind, counts in units.items() if any(counts)}
    return Inspection(
        parameters=parameters_by_part(shapes, geometry),
        layers=layers,
        units=there,
        fixed={kind: reason for kind in there if (reason := geometry.why_fixed(kind))},
    )


def overview_table(inspection: Inspection, bytes_per_parameter: int) -> Table:
    """Return parameters, their share and their bytes by part."""
    total = sum(inspection.parameters.values())
    rows = [
        [part, f"{count:,}", f"{count / total:.1%}", format_bytes(count * bytes_per_parameter)]
        for part, count in [*inspection.parameters.items(), ("total", total)]
    ]
    return Table("where the parameters are", ["part", "parameters", "share", "weights"], rows)


def layers_table(inspection: Inspection) -> Table:
    """Return one row per layer: units of every kind and parameters of the layer's parts."""
    kinds = list(inspection.units)
    rows = [
        [str(index), *(f"{inspection.units[kind][index]:,}" for kind in kinds)]
        + [f"{layer[part]:,}" for part in ("attention", "ffn", "other")]
        for index, layer in enumerate(inspection.layers)
    ]
    return Table("layers", ["layer", *(f"{kind}s" for kind in kinds), "attention", "ffn", "other"], rows)
