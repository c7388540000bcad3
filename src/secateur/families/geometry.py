"""A family met by one configuration: which rows and columns of which weights belong to which unit, in plain integers.

Everything downstream (costs, taps, slicing) reads a ``Geometry`` and never a family file or a configuration key.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from secateur.errors import FamilyError
from secateur.families.schema import Axis, Family, evaluate
from secateur.records.units import PARTS


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows or columns ``offset .. offset + units * width`` of the linear layer ``module``, ``width`` per unit."""

    module: str
    side: str
    offset: int
    width: int


@dataclass(frozen=True, slots=True)
class LinearOutput:
    """Channels ``offset .. offset + units`` of the output of ``module``."""

    module: str
    offset: int


@dataclass(frozen=True, slots=True)
class UnitAxis:
    """One kind of unit in one layer, with full module names.

    Attributes:
        kind: unit kind.
        layer: layer index.
        num_units: units there are.
        reader: module whose input holds the units, ``reader_width`` channels each.
        linear: pre-activation outputs, one channel per unit.
        segments: every weight slice cut with the units (empty where ``fixed``).
        fixed: why these units cannot be cut, or None.
    """

    kind: str
    layer: int
    num_units: int
    reader: str
    reader_width: int
    linear: tuple[LinearOutput, ...]
    segments: tuple[Segment, ...]
    fixed: str | None


@dataclass(frozen=True, slots=True)
class Geometry:
    """A family met by one configuration.

    Attributes:
        family: the family.
        num_layers: decoder layers.
        axes: per unit kind, one entry per layer.
        dimensions: the model-wide sizes by the field's words.
    """

    family: Family
    num_layers: int
    axes: Mapping[str, tuple[UnitAxis, ...]]
    dimensions: Mapping[str, int]

    def layer_name(self, layer: int) -> str:
        """Return the module name of a decoder layer."""
        return f"{self.family.layers}.{layer}"

    def config_updates(self, kind: str, units: int) -> dict[str, int]:
        """Return the configuration keys to write when every layer (or one layer) keeps ``units`` of a kind."""
        names = {**self.dimensions, "units": units}
        return {key: evaluate(value, names) for key, value in family_axis(self.family, kind).config.items()}

    def is_allowed(self, kind: str, units: int) -> bool:
        """Return whether the stock configuration class accepts ``units`` of a kind in every layer."""
        divisor = family_axis(self.family, kind).divisor
        if divisor is None:
            return True
        names = {**self.dimensions, "units": units}
        return evaluate(divisor.of, names) % evaluate(divisor.number, names) == 0

    def allowed_counts(self, kind: str) -> list[int]:
        """Return the unit counts that a uniform model of this family may have, descending."""
        return [n for n in range(self.axes[kind][0].num_units, 0, -1) if self.is_allowed(kind, n)]

    def vocabulary_costs(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
        """Return how many numbers one token id has in each parameter that holds one row (or bias) per id.

        Args:
            shapes: the model's parameters by name, tied ones once or twice.
        """
        names = (f"{module}.{leaf}" for module in self.family.vocabulary for leaf in ("weight", "bias"))
        return {name: math.prod(shapes[name][1:]) for name in names if name in shapes}

    def vocabulary_updates(self, num_tokens: int) -> dict[str, int]:
        """Return the configuration keys to write when ``num_tokens`` token ids stay."""
        key = self.family.dimensions["vocab_size"].config
        assert key is not None, "the schema demands it"
        return {key: num_tokens}

    def require_cuttable(self, kinds: Iterable[str]) -> None:
        """Raise FamilyError if this family cannot cut one of the unit kinds; the reason is said."""
        for kind in kinds:
            reason = family_axis(self.family, kind).fixed
            if reason:
                others = [axis.name for axis in self.family.axes if not axis.fixed]
                raise FamilyError(
                    f"{kind}s of a {self.family.name} model cannot be cut: {reason}. Use units: [{', '.join(others)}]."
                )

    def require_positions(self, block_size: int) -> None:
        """Raise FamilyError if the model has learned positions and a block is longer than they reach."""
        limit = self.dimensions.get("num_positions", block_size)
        if block_size > limit:
            raise FamilyError(
                f"calibrate.block_size is {block_size}, but this {self.family.name} model knows {limit} positions. "
                f"Set it to {limit} or less."
            )

    def part_of(self, parameter: str) -> str:
        """Return which part of the model (embedding, attention, ffn, head, other) a parameter belongs to."""
        prefix = self.family.layers + "."
        local = parameter.removeprefix(prefix).partition(".")[2] if parameter.startswith(prefix) else parameter
        for part, starts in self.family.parts.items():
            if any(local == start or local.startswith(start + ".") for start in starts):
                return part
        return "other"


def parameters_by_part(shapes: Mapping[str, tuple[int, ...]], geometry: Geometry) -> dict[str, int]:
    """Return how many parameters each part of the model holds.

    Args:
        shapes: the model's parameters by name, tied ones once.
        geometry: of the model.
    """
    totals = dict.fromkeys(PARTS, 0)
    for name, shape in shapes.items():
        totals[geometry.part_of(name)] += math.prod(shape)
    return totals


def family_axis(family: Family, kind: str) -> Axis:
    """Return the family's axis for a unit kind."""
    return next(axis for axis in family.axes if axis.name == kind)


def resolve_dimensions(family: Family, config: Mapping[str, Any]) -> dict[str, int]:
    """Return the sizes of a model by the field's words.

    Args:
        family: its family.
        config: its configuration as a plain mapping.

    Raises:
        FamilyError: a size is missing and has no default, or is not a whole number.
    """
    sizes: dict[str, int] = {}
    for name, dimension in family.dimensions.items():
        raw = config.get(dimension.config) if dimension.config else None
        if raw is None:
            expression = dimension.value or dimension.default
            if expression is None:
                raise FamilyError(
                    f"the configuration has no {dimension.config!r}, which a {family.name} model needs; "
                    "is this config.json complete?"
                )
            sizes[name] = evaluate(expression, sizes)
        elif isinstance(raw, bool) or not isinstance(raw, int) or raw < 1:
            raise FamilyError(f"the configuration has {dimension.config} = {raw!r}; it must be a whole number > 0.")
        else:
            sizes[name] = raw
    return sizes


def build_geometry(family: Family, config: Mapping[str, Any]) -> Geometry:
    """Return the geometry of a model from its configuration as a plain mapping.

    Per-layer overrides under ``per_layer_config`` (our uneven models) are honoured.

    Raises:
        FamilyError: the configuration does not fit the family.
    """
    overrides = {int(layer): dict(values) for layer, values in (config.get("per_layer_config") or {}).items()}
    base = _with_some_layer(config, overrides)
    dimensions = resolve_dimensions(family, base)
    num_layers = dimensions["num_layers"]
    axes: dict[str, list[UnitAxis]] = {axis.name: [] for axis in family.axes}
    for layer in range(num_layers):
        local = resolve_dimensions(family, {**base, **overrides.get(layer, {})}) if overrides else dimensions
        for axis in family.axes:
            axes[axis.name].append(_unit_axis(family, axis, layer, local))
    return Geometry(family, num_layers, {kind: tuple(layers) for kind, layers in axes.items()}, dimensions)


def _with_some_layer(config: Mapping[str, Any], overrides: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    merged = dict(config)
    for layer in sorted(overrides, reverse=True):
        merged.update({key: value for key, value in overrides[layer].items() if config.get(key) is None})
    return merged


def _unit_axis(family: Family, axis: Axis, layer: int, sizes: Mapping[str, int]) -> UnitAxis:
    prefix = f"{family.layers}.{layer}."
    return UnitAxis(
        kind=axis.name,
        layer=layer,
        num_units=sizes[axis.count],
        reader=prefix + axis.reader,
        reader_width=evaluate(axis.reader_width, sizes),
        linear=tuple(LinearOutput(prefix + out.module, evaluate(out.offset, sizes)) for out in axis.linear),
        segments=tuple(
            Segment(prefix + m.module, m.side, evaluate(m.offset, sizes), evaluate(m.width, sizes))
            for m in axis.members
        ),
        fixed=axis.fixed,
    )
