"""A family met by one configuration: which rows and columns of which weights belong to which unit, in plain integers.

Everything downstream (costs, taps, slicing) reads a ``Geometry`` and never a family file or a configuration key.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from secateur.errors import FamilyError
from secateur.families.schema import Axis, Family, SubLayer, evaluate
from secateur.records.units import ATTENTION, AXIS_OF, FFN, LAYER, PARTS, SITE_OF, SUBLAYER_OF, SiteKey

SKIP_WORDS = {ATTENTION: "attention", FFN: "mlp"}
"""What transformers' per-layer configuration calls a sub-layer under ``skip``, the list of those a layer lacks."""


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
        num_units: units there are; 0 where the layer lacks the whole sub-layer, and none of the modules exists.
        reader: module whose input holds the units, ``reader_width`` channels each.
        linear: pre-activation outputs, one channel per unit.
        segments: every weight slice cut with the units (empty where ``fixed``).
        fixed: why these units cannot be cut, or None.
        per_group: units in each of the consecutive groups that must keep the same number of them; None: no groups.
    """

    kind: str
    layer: int
    num_units: int
    reader: str
    reader_width: int
    linear: tuple[LinearOutput, ...]
    segments: tuple[Segment, ...]
    fixed: str | None
    per_group: int | None = None

    @property
    def site(self) -> SiteKey:
        """Where statistics of the reader's input are kept."""
        return self.layer, SITE_OF[self.kind]

    @property
    def num_groups(self) -> int:
        """Groups that must keep the same number of units each; 1 where the units are free."""
        return 1 if self.per_group is None else self.num_units // self.per_group


@dataclass(frozen=True, slots=True)
class Geometry:
    """A family met by one configuration.

    Attributes:
        family: the family.
        num_layers: decoder layers.
        axes: per unit kind, one entry per layer.
        dimensions: the model-wide sizes by the field's words.
        layer_types: per layer, its type of attention; layers that are all alike have the empty name.
        fixed_blocks: per block kind that cannot be taken out of this model, why.
        layer_dimensions: per layer, its own sizes by the field's words; empty where all layers have ``dimensions``.
    """

    family: Family
    num_layers: int
    axes: Mapping[str, tuple[UnitAxis, ...]]
    dimensions: Mapping[str, int]
    layer_types: tuple[str, ...] = ()
    fixed_blocks: Mapping[str, str] = field(default_factory=dict)
    layer_dimensions: tuple[Mapping[str, int], ...] = ()

    def layer_name(self, layer: int) -> str:
        """Return the module name of a decoder layer."""
        return f"{self.family.layers}.{layer}"

    def has_sublayer(self, kind: str, layer: int) -> bool:
        """Return whether a layer has its ``attention`` or ``ffn`` sub-layer (still)."""
        return self.axes[AXIS_OF[kind]][layer].num_units > 0

    def has_block(self, kind: str, layer: int) -> bool:
        """Return whether there is a unit of a block kind in a layer; a layer itself always is."""
        return kind == LAYER or self.has_sublayer(kind, layer)

    def num_units(self, kind: str) -> list[int]:
        """Return how many units of a kind each layer has."""
        if kind in self.axes:
            return [axis.num_units for axis in self.axes[kind]]
        return [int(self.has_block(kind, layer)) for layer in range(self.num_layers)]

    def block_modules(self, kind: str, layer: int) -> tuple[str, ...]:
        """Return the modules whose parameters go with a block: the layer, or a sub-layer's modules and own norms."""
        name = self.layer_name(layer)
        if kind == LAYER:
            return (name,)
        sublayer = family_sublayer(self.family, kind)
        return tuple(f"{name}.{module}" for module in (*sublayer.modules, *sublayer.norms))

    def layer_of(self, parameter: str) -> int | None:
        """Return the decoder layer that a parameter belongs to, or None for one outside the layers."""
        prefix = self.family.layers + "."
        index = parameter.removeprefix(prefix).partition(".")[0]
        return int(index) if parameter.startswith(prefix) and index.isdecimal() else None

    def first_without_attention(self, layers: Iterable[int], attention: Collection[int]) -> int | None:
        """Return the first layer that must have attention and has none, or None where all is well.

        Caches read the length of the text so far in the first layer of each type of attention.

        Args:
            layers: indices of the layers that stay, ascending.
            attention: those of them that have attention.
        """
        seen: set[str] = set()
        for layer in layers:
            if self.layer_types[layer] not in seen and layer not in attention:
                return layer
            seen.add(self.layer_types[layer])
        return None

    def require_removable(self, kinds: Iterable[str]) -> None:
        """Raise FamilyError if this model cannot lose whole blocks of one of the kinds; the reason is said."""
        for kind in kinds:
            if kind in self.fixed_blocks:
                raise FamilyError(
                    f"units of kind {kind} cannot be taken out of this {self.family.name} model: "
                    f"{self.fixed_blocks[kind]}. Use other units."
                )

    def config_updates(self, kind: str, units: int, layer: int | None = None) -> dict[str, int]:
        """Return the configuration keys to write when every layer (or the given one) keeps ``units`` of a kind."""
        sizes = self.dimensions if layer is None or not self.layer_dimensions else self.layer_dimensions[layer]
        names = {**sizes, "units": units}
        return {key: evaluate(value, names) for key, value in family_axis(self.family, kind).config.items()}

    def is_allowed(self, kind: str, units: int) -> bool:
        """Return whether a stock model can have ``units`` of a kind in every layer."""
        if units % self.step(kind):
            return False
        divisor = family_axis(self.family, kind).divisor
        if divisor is None:
            return True
        names = {**self.dimensions, "units": units}
        return evaluate(divisor.of, names) % evaluate(divisor.number, names) == 0

    def step(self, kind: str) -> int:
        """Return what the number of units that stay must be a multiple of, so that groups keep the same number each."""
        return math.lcm(*(axis.num_groups for axis in self.axes[kind] if axis.num_units))

    def why_fixed(self, kind: str) -> str | None:
        """Return why no unit of a kind can be cut from this model; None where some can."""
        sizes = {axis.per_group for axis in self.axes[kind] if axis.num_units}
        if sizes == {1}:
            return "every key/value head of this model has one query head, which goes with it as a gqa_group"
        return family_axis(self.family, kind).fixed

    def allowed_counts(self, kind: str) -> list[int]:
        """Return the unit counts that a uniform model of this family may have, descending."""
        most = max(axis.num_units for axis in self.axes[kind])
        return [n for n in range(most, 0, -1) if self.is_allowed(kind, n)]

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

    def num_layers_updates(self, num_layers: int) -> dict[str, int]:
        """Return the configuration keys to write when ``num_layers`` decoder layers stay."""
        key = self.family.dimensions["num_layers"].config
        assert key is not None, "the schema demands it"
        return {key: num_layers}

    def require_cuttable(self, kinds: Iterable[str]) -> None:
        """Raise FamilyError if this model cannot lose units of one of the kinds; the reason is said."""
        for kind in kinds:
            reason = self.why_fixed(kind)
            if reason:
                others = [other for other in self.axes if not self.why_fixed(other)]
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


def is_inside(name: str, modules: Collection[str]) -> bool:
    """Return whether a parameter belongs to one of the modules, or to a module inside one."""
    parts = name.split(".")
    return any(".".join(parts[:length]) in modules for length in range(1, len(parts)))


def family_sublayer(family: Family, kind: str) -> SubLayer:
    """Return the family's description of the ``attention`` or ``ffn`` sub-layer."""
    return family.blocks.attention if kind == ATTENTION else family.blocks.ffn


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
    sizes: list[Mapping[str, int]] = []
    for layer in range(num_layers):
        local = resolve_dimensions(family, {**base, **overrides.get(layer, {})}) if overrides else dimensions
        sizes.append(local)
        skipped = overrides.get(layer, {}).get("skip") or ()
        for axis in family.axes:
            is_there = SKIP_WORDS[SUBLAYER_OF[axis.name]] not in skipped
            axes[axis.name].append(_unit_axis(family, axis, layer, local if is_there else None, dimensions))
    return Geometry(
        family=family,
        num_layers=num_layers,
        axes={kind: tuple(layers) for kind, layers in axes.items()},
        dimensions=dimensions,
        layer_types=_layer_types(family, config, num_layers),
        fixed_blocks=_fixed_blocks(family, config),
        layer_dimensions=tuple(sizes) if overrides else (),
    )


def _layer_types(family: Family, config: Mapping[str, Any], num_layers: int) -> tuple[str, ...]:
    key = family.blocks.layer_types
    types = config.get(key) if key else None
    return tuple(map(str, types)) if types else ("",) * num_layers


def _fixed_blocks(family: Family, config: Mapping[str, Any]) -> dict[str, str]:
    return {
        kind: fixed.reason
        for fixed in family.blocks.fixed
        if all(config.get(key) == value for key, value in fixed.when.items())
        for kind in fixed.units
    }


def _with_some_layer(config: Mapping[str, Any], overrides: Mapping[int, Mapping[str, Any]]) -> dict[str, Any]:
    merged = dict(config)
    for layer in sorted(overrides, reverse=True):
        merged.update({key: value for key, value in overrides[layer].items() if config.get(key) is None})
    return merged


def _unit_axis(
    family: Family, axis: Axis, layer: int, sizes: Mapping[str, int] | None, usual: Mapping[str, int]
) -> UnitAxis:
    """Return an axis of a layer with the given sizes; None where the layer lacks the sub-layer."""
    prefix = f"{family.layers}.{layer}."
    known = usual if sizes is None else sizes
    return UnitAxis(
        kind=axis.name,
        layer=layer,
        num_units=0 if sizes is None else sizes[axis.count],
        reader=prefix + axis.reader,
        reader_width=evaluate(axis.reader_width, known),
        linear=tuple(
            LinearOutput(prefix + out.module, evaluate(out.offset, known)) for out in axis.linear if sizes is not None
        ),
        segments=tuple(
            Segment(prefix + m.module, m.side, evaluate(m.offset, known), evaluate(m.width, known))
            for m in axis.members
            if sizes is not None
        ),
        fixed=axis.fixed,
        per_group=None if axis.per_group is None else evaluate(axis.per_group, known),
    )
