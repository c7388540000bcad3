"""Turns scores and a budget into a plan: how many units of each kind stay in each layer, and which.

Budgets over all parameters take the same share from every unit kind: coarse kinds first, FFN channels then make up the
rest exactly (in models with experts, the kind that owns most does). Whole layers come before sub-layers, sub-layers
before groups; each is rounded towards keeping, and the next kind's share is of what is left. Attention and FFN
sub-layers count as one kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from jaxtyping import Float64
from torch import Tensor

from secateur.allocate.blocks import (
    RATIO_KEYS,
    Block,
    BlockCut,
    Order,
    left_cost,
    removal_order,
    take_parameters,
    take_ratio,
)
from secateur.allocate.budget import Shapes, block_cost, cost_per_unit, parameters_after, token_cost
from secateur.allocate.counts import keep_best
from secateur.allocate.request import Request, parameters_to_remove
from secateur.allocate.widths import Widths
from secateur.errors import PlanError
from secateur.families.geometry import Geometry, UnitAxis, parameters_by_part
from secateur.records.plan import LayerPlan, Plan, VocabularyPlan
from secateur.records.scores import Scores
from secateur.records.units import (
    ATTENTION,
    BLOCK_KINDS,
    FFN,
    LAYER,
    LAYER_UNIT_KINDS,
    SUBLAYER_OF,
    UNIT_NAMES,
    WHOLE_KINDS,
)

TOKEN_FREQUENCY = "token_frequency"
"""Method named by a plan that cuts only the vocabulary."""


def make_plan(
    scores: Scores,
    geometry: Geometry,
    shapes: Shapes,
    request: Request,
    *,
    vocabulary: VocabularyPlan | None = None,
    model_fingerprint: str = "",
    calibration_tokens: int = 0,
    counts: Mapping[str, Sequence[int]] | None = None,
) -> Plan:
    """Return the plan that meets ``request`` by keeping the best-scored units.

    A budget over all parameters counts what the vocabulary gives up first; the units of layers make up the rest.

    Args:
        scores: importance of every unit of the kinds that may be cut.
        geometry: of the dense model.
        shapes: its parameters by name, tied ones once.
        request: the budget and its constraints.
        vocabulary: which token ids stay; None where all do.
        model_fingerprint: of the dense model, for the record.
        calibration_tokens: behind the scores, for the record.
        counts: units that stay, by kind and layer, where they were measured or searched; they meet the budget.

    Raises:
        PlanError: the budget rounds to nothing, removes everything, or cannot be met; what can be is said.
    """
    notes: list[str] = []
    tokens_removed = vocabulary.num_removed if vocabulary else 0
    given_up = tokens_removed * token_cost(geometry, shapes)
    if counts is not None:
        layers = {kind: _layer_plans(kind, kept, scores, geometry) for kind, kept in counts.items()}
    else:
        layers = _Allocation(scores, geometry, shapes, request, notes).solve(given_up) if scores.values else {}
    removed = {kind: [layer.num_removed for layer in per_layer] for kind, per_layer in layers.items()}
    if not any(any(per_layer) for per_layer in removed.values()) and (scores.values or not tokens_removed):
        raise PlanError(f"budget {dict(request.budget)} removes nothing. Ask for more, or use another budget.")
    return Plan(
        family=geometry.family.name,
        model_fingerprint=model_fingerprint,
        shape=_shape(request, scores, layers, geometry),
        method=scores.method if layers else TOKEN_FREQUENCY,
        options=dict(scores.options) if layers else {},
        budget=dict(request.budget),
        layers=layers,
        parameters_dense=parameters_by_part(shapes, geometry),
        parameters_pruned=parameters_after(shapes, geometry, removed, tokens_removed=tokens_removed),
        vocabulary=vocabulary,
        calibrated_on=tuple(scores.buckets),
        calibration_tokens=calibration_tokens,
        notes=tuple(notes),
        depth_method=scores.depth_method,
        depth_options=dict(scores.depth_options),
    )


def choose_blocks(
    kinds: Sequence[str], geometry: Geometry, shapes: Shapes, request: Request, order: Order, *, given_up: int = 0
) -> BlockCut:
    """Return the whole blocks that go for a budget, as ``make_plan`` chooses them, in an order that is not known yet.

    Args:
        kinds: all unit kinds that may be cut.
        geometry: of the dense model.
        shapes: its parameters by name, tied ones once.
        request: the budget and its constraints.
        order: is asked for one block at a time, and never for one more than the budget needs to know.
        given_up: parameters that the vocabulary gives up.

    Raises:
        PlanError: as ``make_plan``.
    """
    made_up = {kind: [torch.zeros(n, dtype=torch.float64) for n in geometry.num_units(kind)] for kind in kinds}
    allocation = _Allocation(Scores("", {}, (), made_up), geometry, shapes, request, [])
    allocation.order = order
    allocation.take_blocks(given_up)
    return allocation.cut


def _shape(request: Request, scores: Scores, layers: Mapping[str, Sequence[LayerPlan]], geometry: Geometry) -> str:
    """Return the shape that was asked for; where only whole blocks go, the simplest that fits what is left."""
    if any(kind in LAYER_UNIT_KINDS for kind in scores.values):
        return request.shape
    stay = [any(layer.keep for layer in entries) for entries in zip(*layers.values(), strict=True)]
    for kind, per_layer in layers.items():
        kept = {
            len(entry.keep)
            for layer, entry in enumerate(per_layer)
            if stay[layer] and (entry.num_units or not geometry.has_sublayer(SUBLAYER_OF[kind], layer))
        }
        if len(kept) > 1 or 0 in kept or not all(geometry.is_allowed(kind, count) for count in kept):
            return "uneven"
    return "uniform"


def same_size_plan(plan: Plan, scores: Scores, geometry: Geometry, vocabulary: VocabularyPlan | None = None) -> Plan:
    """Return a plan that keeps as many units as ``plan`` does, but those that ``scores`` prefers.

    This is how controls are made: the size is equal, only the choice differs. Of whole layers and sub-layers, as many
    of each kind go over the whole model; the layers that stay then keep, in order, as many units as those of ``plan``,
    and all units of kinds without scores.

    Args:
        plan: what the control is compared with.
        scores: importance of every unit of the kinds that were cut.
        geometry: of the dense model.
        vocabulary: the control's own.
    """
    cut = _same_number(plan, scores, geometry)
    layers: dict[str, tuple[LayerPlan, ...]] = {}
    for kind, per_layer in plan.layers.items():
        stay = [layer for layer in cut.left(SUBLAYER_OF[kind]) if geometry.axes[kind][layer].num_units]
        kept = [len(layer.keep) for layer in per_layer if layer.keep]
        widths = dict(zip(stay, kept if kind in scores.values else (), strict=False))
        counts = [
            _shared_out(axis, widths.get(axis.layer, axis.num_units)) if axis.layer in stay else 0
            for axis in geometry.axes[kind]
        ]
        layers[kind] = _layer_plans(kind, counts, scores, geometry)
    return replace(
        plan,
        layers=layers,
        vocabulary=vocabulary,
        method=scores.method,
        options=dict(scores.options),
        depth_method=scores.depth_method,
        depth_options=dict(scores.depth_options),
    )


def _same_number(plan: Plan, scores: Scores, geometry: Geometry) -> BlockCut:
    """Return as many blocks of each scored kind as ``plan`` removes; of other kinds the very same.

    Of layers with experts, and of those without, as many go.
    """
    whole, scored = plan.removed_layers, set(scores.values)
    numbers: dict[str, tuple[int, ...]] = {kind: plan.removed_sublayers(kind) for kind in (ATTENTION, FFN)}
    if LAYER in scored or not scored & {ATTENTION, FFN}:
        numbers = {LAYER: whole, **numbers}
    else:  # layers go where both sub-layers do
        numbers = {
            kind: (*gone, *(layer for layer in whole if geometry.has_sublayer(kind, layer)))
            for kind, gone in numbers.items()
        }
    cut = BlockCut(geometry)
    for kind, gone in numbers.items():
        order = removal_order(geometry, scores.values, [kind]) if kind in scored else [(kind, layer) for layer in gone]
        for has_experts in (False, True):  # layers with experts have another size than those without
            alike = [block for block in order if (block[1] in geometry.expert_layers) == has_experts]
            cut.take_first(alike, sum((layer in geometry.expert_layers) == has_experts for layer in gone))
    return cut


def _shared_out(axis: UnitAxis, count: int) -> int:
    """Return ``count``, or the next number above that the axis has and its groups can share out evenly."""
    return min(axis.num_units, -(-count // axis.num_groups) * axis.num_groups)


def _layer_plans(kind: str, counts: Sequence[int], scores: Scores, geometry: Geometry) -> tuple[LayerPlan, ...]:
    """Return the entries of one kind of unit; a kind without scores keeps its first units, as a rule all of them."""
    values = scores.values.get(kind)
    return tuple(
        LayerPlan(axis.num_units, tuple(range(count)))
        if values is None or not count
        else _layer_plan(values[axis.layer], count, axis.num_groups)
        for axis, count in zip(geometry.axes[kind], counts, strict=True)
    )


def _layer_plan(scores: Float64[Tensor, " _units"], count: int, groups: int) -> LayerPlan:
    keep = keep_best(scores, count, groups=groups)
    gone = sorted(set(range(len(scores))) - set(keep))
    return LayerPlan(
        num_units=len(scores),
        keep=keep,
        lowest_kept=float(scores[list(keep)].min()),
        highest_removed=float(scores[gone].max()) if gone else None,
    )


class _Allocation:
    """Works out what goes: whole blocks first, then units inside the sub-layers that stay."""

    def __init__(self, scores: Scores, geometry: Geometry, shapes: Shapes, request: Request, notes: list[str]) -> None:
        self.scores = scores
        self.geometry = geometry
        self.shapes = shapes
        self.request = request
        self.notes = notes
        self.cut = BlockCut(geometry)
        self.widths = Widths(scores, geometry, shapes, request, self.cut, notes)
        self.order: Order = self.by_scores

    def by_scores(self, cut: BlockCut, kinds: Sequence[str]) -> list[Block]:
        """Return the blocks of some kinds in the order of their scores."""
        shapes = None if self.scores.cumulative else self.shapes
        return removal_order(cut.geometry, self.scores.values, kinds, shapes)

    def solve(self, given_up: int) -> dict[str, tuple[LayerPlan, ...]]:
        """Return the entries of every kind of unit that loses some; where whole blocks go, of all that make one up."""
        self.require_uneven()
        left = self.take_blocks(given_up)
        counts = self.by_parameters(given_up, left) if self.is_size else self.widths.by_units()
        if not self.cut.is_empty:
            whole = [kind for kind in WHOLE_KINDS if kind in self.geometry.axes and kind not in counts]
            counts |= {kind: self.widths.sizes(kind) for kind in whole}
        return {
            kind: _layer_plans(kind, counts[kind], self.scores, self.geometry)
            for kind in LAYER_UNIT_KINDS
            if kind in counts
        }

    def require_uneven(self) -> None:
        """Raise PlanError where sub-layers are to go although all layers must stay alike."""
        asked = [kind for kind in (ATTENTION, FFN) if kind in self.scores.values]
        if asked and self.request.shape == "uniform":
            raise PlanError(
                f"taking out units of kind {' and '.join(asked)} leaves layers that differ; in shape: uniform only "
                "whole layers can go. Use shape: uneven, or units: [layer]."
            )

    def left_to_remove(self, given_up: int) -> float:
        wanted = parameters_to_remove(self.request, self.shapes, self.geometry)
        if given_up >= wanted:
            raise PlanError(
                f"the vocabulary alone gives up {given_up:,} parameters, and the budget asks for {wanted:,.0f}; "
                "nothing is left for the other units. Raise the budget, or prune the vocabulary alone."
            )
        return wanted - given_up

    @property
    def is_size(self) -> bool:
        """Whether the budget counts all parameters."""
        return bool({"parameters", "bytes"} & set(self.request.budget))

    def take_blocks(self, given_up: int) -> float:
        """Let whole blocks go; return how many parameters are still to go, for budgets that count them."""
        kinds = list(self.scores.values)
        if not self.is_size:
            for kind in (LAYER, ATTENTION, FFN):
                if kind in kinds:
                    take_ratio(self.cut, kind, self.request.budget[RATIO_KEYS[kind]], self.order)
            return 0.0
        left = self.left_to_remove(given_up)
        ratio = equal_share(self.geometry, self.shapes, kinds, left)
        steps = [step for step in ([LAYER], [k for k in (ATTENTION, FFN) if k in kinds]) if set(step) & set(kinds)]
        for step in steps:
            nearest = step is steps[-1] and not self.widths.kinds
            aim = left if nearest else ratio * left_cost(self.cut, step, self.shapes)
            gone = take_parameters(self.cut, step, aim, self.order, self.shapes, nearest=nearest)
            if not gone:
                names = " and ".join(UNIT_NAMES[kind] for kind in step)
                self.notes.append(f"no {names} go: the budget is too small for a whole one")
            left -= gone
        return left

    def by_parameters(self, given_up: int, left: float) -> dict[str, list[int]]:
        """Return kept counts of channels and groups, so that ``left`` parameters go with them."""
        wanted = self.left_to_remove(given_up)
        counts: dict[str, list[int]] = {}
        if self.widths.kinds:
            ratio = equal_share(self.geometry, self.shapes, list(self.scores.values), wanted)
            counts, left = self.widths.by_parameters(left, ratio)
        if abs(left) > 0.005 * wanted:
            self.notes.append(f"the budget asked for {wanted:,.0f} parameters to go; {wanted - left:,.0f} do")
        return counts


def equal_share(geometry: Geometry, shapes: Shapes, kinds: Sequence[str], wanted: float) -> float:
    """Return the share that every kind must give so that ``wanted`` parameters go in all.

    A coarse kind takes its share of the finer ones with it, and the finer ones give the same share of what it leaves.

    Raises:
        PlanError: the kinds together own no more than that.
    """
    blocks = {kind: sum(block_cost(geometry, kind, shapes)) for kind in BLOCK_KINDS}
    units = {kind: 0 for kind in LAYER_UNIT_KINDS}
    for kind in set(kinds) & set(LAYER_UNIT_KINDS):
        costs = cost_per_unit(geometry, kind, shapes)
        units[kind] = sum(cost * axis.num_units for cost, axis in zip(costs, geometry.axes[kind], strict=True))

    def removed(share: float) -> float:
        left = {kind: 1 - share if kind in kinds else 1.0 for kind in (*BLOCK_KINDS, *LAYER_UNIT_KINDS)}
        stays = float(blocks[LAYER] - blocks[ATTENTION] - blocks[FFN])  # what no sub-layer takes with it
        for sublayer in (ATTENTION, FFN):
            gone = sum((1 - left[kind]) * units[kind] for kind in units if SUBLAYER_OF[kind] == sublayer)
            stays += left[sublayer] * (blocks[sublayer] - gone)
        return blocks[LAYER] - left[LAYER] * stays

    if wanted >= removed(1.0):
        raise PlanError(
            f"the budget removes {wanted:,.0f} parameters, but the units that may be cut "
            f"({', '.join(kinds)}) own {removed(1.0):,.0f}. Lower the budget or add unit kinds."
        )
    if not set(kinds) & set(BLOCK_KINDS):
        return wanted / sum(units.values())
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if removed(middle) < wanted else (low, middle)
    return high
