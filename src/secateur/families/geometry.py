"""A family met by one configuration: which rows and columns of which weights belong to which unit, in plain integers.

Everything downstream (costs, taps, slicing) reads a ``Geometry`` and never a family file or a configuration key.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from secateur.errors import FamilyError
from secateur.families.schema import Axis, Experts, Family, SubLayer, evaluate
from secateur.records.units import (
    ATTENTION,
    AXES_OF,
    EXPERT,
    EXPERT_CHANNEL,
    FFN,
    LAYER,
    PARTS,
    QUERY_HEAD,
    SITE_OF,
    SUBLAYER_OF,
    UNIT_NAMES,
    SiteKey,
)

WIDTH_MULTIPLE = 8
"""Widths of routed experts are multiples of it: torch's grouped product wants rows of 16 bytes, 8 bfloat16 numbers."""
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
class TensorSlice:
    """Entries ``offset .. offset + units * width`` along ``dim`` of a parameter or buffer, ``width`` per unit.

    Attributes:
        name: full name of the tensor; a model may lack it.
        dim: dimension that is cut.
        offset: first entry.
        width: entries per unit.
        stacked: whether dimension 0 counts groups of units, and ``dim`` holds each group's own.
        is_buffer: whether it counts as no parameter.
    """

    name: str
    dim: int
    offset: int
    width: int
    stacked: bool = False
    is_buffer: bool = False


@dataclass(frozen=True, slots=True)
class RoutedExperts:
    """The routed experts of one layer, with full module names.

    Attributes:
        layer: layer index.
        module: what holds the fused tensors, for example ``model.layers.3.mlp.experts``.
        router: what scores the experts; its ``weight`` is [experts, hidden].
        num_experts: experts.
        per_token: experts that each token is sent to.
        width: hidden channels of one expert.
        num_groups: consecutive groups of experts that the router chooses among first; 1 where there are none.
        renormalised: whether the weights of a token's experts are made to add up to 1 (a softmax over the chosen ones
            counts). Where they are not, removing experts makes the weights of the others larger.
        groups_per_token: groups that a token may be sent to.
        min_per_group: experts that the router's score of a group is made of.
    """

    layer: int
    module: str
    router: str
    num_experts: int
    per_token: int
    width: int
    num_groups: int
    renormalised: bool
    groups_per_token: int = 1
    min_per_group: int = 1

    def why_impossible(self, count: int) -> str | None:
        """Return why the router cannot work with ``count`` experts, or None where it can."""
        if count < self.per_token:
            return f"each token is sent to {self.per_token} experts"
        if count % self.num_groups:
            return f"the router's {self.num_groups} groups must keep as many experts each"
        if count < self.min_per_group * self.num_groups:
            return f"the router scores each of its {self.num_groups} groups by its best {self.min_per_group} experts"
        if self.groups_per_token * (count // self.num_groups) < self.per_token:
            return f"each token is sent to {self.per_token} experts of {self.groups_per_token} of the router's groups"
        return None


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
        num_units: units there are; 0 where the layer lacks the whole sub-layer, or its sub-layer consists of other
            units, and none of the modules exists.
        reader: module whose input holds the units, ``reader_width`` channels each; for the kinds in ``FUSED_KINDS`` it
            is the module that holds the tensors of all experts, and no linear layer.
        linear: pre-activation outputs, one channel per unit.
        segments: every slice of a linear layer cut with the units (empty where ``fixed``).
        fixed: why these units cannot be cut, or None.
        per_group: units in each of the consecutive groups that must keep the same number of them; None: no groups.
        tensors: every slice of another parameter or buffer cut with the units.
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
    tensors: tuple[TensorSlice, ...] = ()

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
        axes: per unit kind that the family describes, one entry per layer.
        dimensions: the model-wide sizes by the field's words.
        layer_types: per layer, its type of attention; layers that are all alike have the empty name.
        fixed_blocks: per block kind that cannot be taken out of this model, why.
        layer_dimensions: per layer, its own sizes by the field's words; empty where all layers have ``dimensions``.
        experts: per layer, its routed experts, or None where it has none; empty for dense families.
        expert_layers: layers whose FFN the configuration makes of experts, whether they still have it or not.
    """

    family: Family
    num_layers: int
    axes: Mapping[str, tuple[UnitAxis, ...]]
    dimensions: Mapping[str, int]
    layer_types: tuple[str, ...] = ()
    fixed_blocks: Mapping[str, str] = field(default_factory=dict)
    layer_dimensions: tuple[Mapping[str, int], ...] = ()
    experts: tuple[RoutedExperts | None, ...] = ()
    expert_layers: frozenset[int] = frozenset()

    def layer_name(self, layer: int) -> str:
        """Return the module name of a decoder layer."""
        return f"{self.family.layers}.{layer}"

    def has_sublayer(self, kind: str, layer: int) -> bool:
        """Return whether a layer has its ``attention`` or ``ffn`` sub-layer (still)."""
        return self.sublayer_axis(kind, layer).num_units > 0

    def sublayer_axis(self, kind: str, layer: int) -> UnitAxis:
        """Return the axis whose units make up a layer's ``attention`` or ``ffn`` sub-layer: channels, or experts."""
        first, *others = (self.axes[axis][layer] for axis in AXES_OF[kind] if axis in self.axes)
        return next((axis for axis in others if axis.num_units), first)

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
        names = {**self._sizes(layer), "units": units}
        return {key: evaluate(value, names) for key, value in family_axis(self.family, kind).config.items()}

    def _sizes(self, layer: int | None) -> Mapping[str, int]:
        """Return the sizes of a layer, or the model-wide ones."""
        return self.dimensions if layer is None or not self.layer_dimensions else self.layer_dimensions[layer]

    def is_allowed(self, kind: str, units: int) -> bool:
        """Return whether a stock model can have ``units`` of a kind in every layer that has such units."""
        if units % self.step(kind) or self.why_impossible(kind, units):
            return False
        return self._divides(kind, units, self.dimensions)

    def _divides(self, kind: str, units: int, sizes: Mapping[str, int]) -> bool:
        divisor = family_axis(self.family, kind).divisor
        names = {**sizes, "units": units}
        return divisor is None or evaluate(divisor.of, names) % evaluate(divisor.number, names) == 0

    def why_impossible(self, kind: str, units: int, layer: int | None = None) -> str | None:
        """Return why no model can have ``units`` of a kind in a layer (the strictest one), or None where one can.

        What a stock configuration refuses besides is the business of ``is_allowed``.
        """
        divisor = family_axis(self.family, kind).divisor
        if divisor is not None and divisor.always:
            step = self.step(kind) if layer is None else self.axes[kind][layer].num_groups
            if units % step or not self._divides(kind, units, self._sizes(layer)):
                return f"{divisor.number} must divide {divisor.of}"
        layers = self.experts if layer is None else self.experts[layer : layer + 1]
        there = [experts for experts in layers if experts is not None]
        if kind == EXPERT:
            return next(filter(None, (experts.why_impossible(units) for experts in there)), None)
        if kind == EXPERT_CHANNEL and any(units // experts.num_experts % WIDTH_MULTIPLE for experts in there):
            return (
                "transformers multiplies by all experts of a layer at once, which takes a width per expert that is a "
                f"multiple of {WIDTH_MULTIPLE}"
            )
        return None

    def fewest(self, kind: str) -> int:
        """Return the fewest units of a kind that a layer can keep of those that it has some of."""
        most = max((axis.num_units for axis in self.axes[kind]), default=0)
        step = self.step(kind)
        return next((n for n in range(step, most + 1, step) if not self.why_impossible(kind, n)), most)

    def step(self, kind: str) -> int:
        """Return what the number of units that stay must be a multiple of, so that groups keep the same number each."""
        return math.lcm(*(axis.num_groups for axis in self.axes[kind] if axis.num_units))

    def why_fixed(self, kind: str) -> str | None:
        """Return why no unit of a kind can be cut from this model; None where some can."""
        if kind not in self.axes:
            return "no model of this family has any"
        sizes = {axis.per_group for axis in self.axes[kind] if axis.num_units}
        if kind == QUERY_HEAD and sizes == {1}:
            return "every key/value head of this model has one query head, which goes with it as a gqa_group"
        reason = family_axis(self.family, kind).fixed
        if kind == EXPERT_CHANNEL and len({axis.num_groups for axis in self.axes[kind] if axis.num_units}) > 1:
            return "its layers hold different numbers of experts; cut channels first, and experts of the result"
        if reason is None and not sizes and self.experts:
            return f"no layer of this model has {UNIT_NAMES[kind]}"
        return reason

    def allowed_counts(self, kind: str) -> list[int]:
        """Return the unit counts that a uniform model of this family may have, descending."""
        most, step = max(axis.num_units for axis in self.axes[kind]), self.step(kind)
        return [n for n in range(most - most % step, 0, -step) if self.is_allowed(kind, n)]

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

    def layers_updates(self, layers: Sequence[int]) -> dict[str, Any]:
        """Return the configuration keys to write when the given decoder layers stay, in that order.

        They say how many there are, and which of them have experts.
        """
        key = self.family.dimensions["num_layers"].config
        assert key is not None, "the schema demands it"
        updates: dict[str, Any] = {key: len(layers)}
        experts = self.family.experts
        if experts is None:
            return updates
        dense = [new for new, old in enumerate(layers) if old not in self.expert_layers]
        if experts.dense_first is not None:
            updates[experts.dense_first] = len(dense)
        if experts.dense_layers is not None:
            updates[experts.dense_layers] = dense
        if experts.step is not None:
            updates[experts.step] = 1
        return updates

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
    expert_layers = _expert_layers(family.experts, config, num_layers)
    experts: list[RoutedExperts | None] = []
    sizes: list[Mapping[str, int]] = []
    for layer in range(num_layers):
        local = resolve_dimensions(family, {**base, **overrides.get(layer, {})}) if overrides else dimensions
        sizes.append(local)
        skipped = overrides.get(layer, {}).get("skip") or ()
        has_experts = layer in expert_layers
        if family.experts is not None:
            there = has_experts and SKIP_WORDS[FFN] not in skipped
            experts.append(_routed_experts(family, layer, local, config) if there else None)
        for axis in family.axes:
            is_there = SKIP_WORDS[SUBLAYER_OF[axis.name]] not in skipped
            is_there &= axis.layers == "all" or has_experts == (axis.layers == "experts")
            axes[axis.name].append(_unit_axis(family, axis, layer, local if is_there else None, dimensions))
    return Geometry(
        family=family,
        num_layers=num_layers,
        axes={kind: tuple(layers) for kind, layers in axes.items()},
        dimensions=dimensions,
        layer_types=_layer_types(family, config, num_layers),
        fixed_blocks=_fixed_blocks(family, config),
        layer_dimensions=tuple(sizes) if overrides else (),
        experts=tuple(experts),
        expert_layers=expert_layers,
    )


def _expert_layers(experts: Experts | None, config: Mapping[str, Any], num_layers: int) -> frozenset[int]:
    """Return the layers whose FFN the configuration makes of experts."""
    if experts is None:
        return frozenset()

    def said(key: str | None, otherwise: Any) -> Any:
        value = None if key is None else config.get(key)
        return otherwise if value is None else value

    first, step = said(experts.dense_first, 0), said(experts.step, 1)
    dense = set(said(experts.dense_layers, ()))
    return frozenset(layer for layer in range(first, num_layers) if layer not in dense and (layer + 1) % step == 0)


def _routed_experts(family: Family, layer: int, sizes: Mapping[str, int], config: Mapping[str, Any]) -> RoutedExperts:
    """Return the experts of a layer with the given sizes."""
    experts = family.experts
    assert experts is not None, "only families with experts are asked"
    prefix = f"{family.layers}.{layer}."
    stated = None if experts.renormalised.config is None else config.get(experts.renormalised.config)
    return RoutedExperts(
        layer=layer,
        module=prefix + experts.module,
        router=prefix + experts.router,
        num_experts=sizes[experts.count],
        per_token=sizes[experts.per_token],
        width=sizes[experts.width],
        num_groups=1 if experts.num_groups is None else sizes[experts.num_groups],
        renormalised=experts.renormalised.default if stated is None else bool(stated),
        groups_per_token=1 if experts.groups_per_token is None else sizes[experts.groups_per_token],
        min_per_group=experts.min_per_group,
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
        per_group=_per_group(axis, known),
        tensors=tuple(
            TensorSlice(
                prefix + t.name, t.dim, evaluate(t.offset, known), evaluate(t.width, known), t.stacked, t.buffer
            )
            for t in axis.tensors
            if sizes is not None
        ),
    )


def _per_group(axis: Axis, sizes: Mapping[str, int]) -> int | None:
    """Return the units in each group; experts in a single group are free."""
    each = None if axis.per_group is None else evaluate(axis.per_group, sizes)
    return None if axis.name == EXPERT and each == sizes[axis.count] else each
