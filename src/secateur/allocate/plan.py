"""Turns scores and a budget into a plan: how many units of each kind stay in each layer, and which.

Budgets over all parameters take the same share from every unit kind: groups first (they come in few, large pieces,
rounded towards keeping), FFN channels then make up the rest exactly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from jaxtyping import Float64
from torch import Tensor

from secateur.allocate.budget import Shapes, cost_per_unit, parameters_after, token_cost
from secateur.allocate.counts import (
    floor_count,
    global_counts,
    keep_best,
    standardised,
    threshold_counts,
    uniform_count,
)
from secateur.errors import PlanError
from secateur.families.geometry import Geometry, parameters_by_part
from secateur.recipe import PruneSpec
from secateur.records.plan import LayerPlan, Plan, VocabularyPlan
from secateur.records.scores import Scores
from secateur.records.units import FFN_CHANNEL, GQA_GROUP

TOKEN_FREQUENCY = "token_frequency"
"""Method named by a plan that cuts only the vocabulary."""

_COARSE_WIDTH, _COARSE_MULTIPLE = 512, 32
_RATIO_KEYS = {FFN_CHANNEL: "channels", GQA_GROUP: "groups"}


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked of the allocator.

    Attributes:
        budget: one of ``channels``, ``groups`` (or both), ``parameters``: shares removed; ``bytes``: target size of
            the weights; ``threshold``: absolute score at or below which units go.
        shape: ``uniform`` or ``uneven``.
        allocation: ``uniform`` (same share everywhere) or ``global`` (rank the whole model; uneven shape only).
        min_keep_ratio: share of a layer's units that global ranking and thresholds never go below.
        multiple_of: kept FFN widths are multiples of this; ``auto`` is 32 from a width of 512 on, else 1.
        normalize: ``layer``: before layers compete, scores are standardised within each (mean 0, deviation 1), because
            raw scores of different layers have different scales; ``none``: they compete as they are.
        bytes_per_parameter: of the saved weights, for ``bytes``.
    """

    budget: Mapping[str, int | float]
    shape: Literal["uniform", "uneven"] = "uniform"
    allocation: Literal["auto", "uniform", "global"] = "auto"
    min_keep_ratio: float = 0.1
    multiple_of: int | Literal["auto"] = "auto"
    normalize: Literal["layer", "none"] = "layer"
    bytes_per_parameter: float = 4.0

    @classmethod
    def of(cls, spec: PruneSpec, *, bytes_per_parameter: float) -> Request:
        """Return the request that a recipe's ``prune`` section makes."""
        return cls(
            budget=spec.budget.model_dump(exclude_none=True) if spec.budget else {},
            shape=spec.shape,
            allocation=spec.allocation,
            min_keep_ratio=spec.min_keep_ratio,
            multiple_of=spec.multiple_of,
            normalize=spec.normalize,
            bytes_per_parameter=bytes_per_parameter,
        )

    @property
    def is_global(self) -> bool:
        """Whether layers compete with each other for units."""
        return self.allocation == "global" or (self.allocation == "auto" and self.shape == "uneven")


def make_plan(
    scores: Scores,
    geometry: Geometry,
    shapes: Shapes,
    request: Request,
    *,
    vocabulary: VocabularyPlan | None = None,
    model_fingerprint: str = "",
    calibration_tokens: int = 0,
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

    Raises:
        PlanError: the budget rounds to nothing, removes everything, or cannot be met; what can be is said.
    """
    notes: list[str] = []
    tokens_removed = vocabulary.num_removed if vocabulary else 0
    given_up = tokens_removed * token_cost(geometry, shapes)
    counts = _Counts(scores, geometry, shapes, request, notes, given_up).solve() if scores.values else {}
    removed = {
        kind: [axis.num_units - kept for axis, kept in zip(geometry.axes[kind], per_layer, strict=True)]
        for kind, per_layer in counts.items()
    }
    if not any(any(per_layer) for per_layer in removed.values()) and (scores.values or not tokens_removed):
        raise PlanError(f"budget {dict(request.budget)} removes nothing. Ask for more, or use another budget.")
    return Plan(
        family=geometry.family.name,
        model_fingerprint=model_fingerprint,
        shape=request.shape if counts else "uniform",
        method=scores.method if counts else TOKEN_FREQUENCY,
        options=dict(scores.options) if counts else {},
        budget=dict(request.budget),
        layers={
            kind: tuple(_layer_plan(layer, kept) for layer, kept in zip(scores.values[kind], per_layer, strict=True))
            for kind, per_layer in counts.items()
        },
        parameters_dense=parameters_by_part(shapes, geometry),
        parameters_pruned=parameters_after(shapes, geometry, removed, tokens_removed=tokens_removed),
        vocabulary=vocabulary,
        calibrated_on=tuple(scores.buckets),
        calibration_tokens=calibration_tokens,
        notes=tuple(notes),
    )


def same_size_plan(plan: Plan, scores: Scores, vocabulary: VocabularyPlan | None = None) -> Plan:
    """Return a plan that keeps as many units per layer as ``plan`` does, but those that ``scores`` prefers.

    This is how controls are made: the size is equal, only the choice differs. ``vocabulary`` is the control's own.
    """
    layers = {
        kind: tuple(
            _layer_plan(values, len(layer.keep)) for values, layer in zip(scores.values[kind], per_layer, strict=True)
        )
        for kind, per_layer in plan.layers.items()
    }
    return replace(plan, layers=layers, vocabulary=vocabulary, method=scores.method, options=dict(scores.options))


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


def _layer_plan(scores: Float64[Tensor, " _units"], count: int) -> LayerPlan:
    keep = keep_best(scores, count)
    gone = sorted(set(range(len(scores))) - set(keep))
    return LayerPlan(
        num_units=len(scores),
        keep=keep,
        lowest_kept=float(scores[list(keep)].min()),
        highest_removed=float(scores[gone].max()) if gone else None,
    )


class _Counts:
    """Works out how many units of each kind stay in each layer."""

    def __init__(
        self,
        scores: Scores,
        geometry: Geometry,
        shapes: Shapes,
        request: Request,
        notes: list[str],
        given_up: int,
    ) -> None:
        self.scores = scores
        self.geometry = geometry
        self.shapes = shapes
        self.request = request
        self.notes = notes
        self.given_up = given_up

    def solve(self) -> dict[str, list[int]]:
        budget = self.request.budget
        if "threshold" in budget:
            return {kind: self.by_threshold(kind, budget["threshold"]) for kind in self.scores.values}
        if "parameters" in budget or "bytes" in budget:
            return self.by_parameters(self.left_to_remove())
        return {kind: self.by_ratio(kind, budget[_RATIO_KEYS[kind]]) for kind in self.scores.values}

    def sizes(self, kind: str) -> list[int]:
        return [axis.num_units for axis in self.geometry.axes[kind]]

    def multiple(self, kind: str) -> int:
        if kind != FFN_CHANNEL:
            return 1
        if self.request.multiple_of != "auto":
            return self.request.multiple_of
        sizes = self.sizes(kind)
        coarse = min(sizes) >= _COARSE_WIDTH and all(size % _COARSE_MULTIPLE == 0 for size in sizes)
        return _COARSE_MULTIPLE if coarse else 1

    def is_allowed(self, kind: str, count: int) -> bool:
        return self.request.shape == "uneven" or self.geometry.is_allowed(kind, count)

    def require_even(self, kind: str) -> int:
        sizes = self.sizes(kind)
        if len(set(sizes)) > 1:
            raise PlanError(
                f"the model's layers hold between {min(sizes)} and {max(sizes)} {kind}s, so shape: uniform is not "
                "possible. Use shape: uneven."
            )
        return sizes[0]

    def by_ratio(self, kind: str, ratio: float) -> list[int]:
        sizes = self.sizes(kind)
        if self.request.is_global:
            kept = self.rank_globally(kind, round(ratio * sum(sizes)))
            if sum(kept) == sum(sizes):
                raise PlanError(f"removing {ratio:.4g} of {sum(sizes)} {kind}s rounds to none. Ask for more.")
            return kept
        if self.request.shape == "uniform":
            self.require_even(kind)
        kept = [
            uniform_count(
                ratio, size, multiple=self.multiple(kind), kind=kind, is_allowed=lambda n: self.is_allowed(kind, n)
            )
            for size in sizes
        ]
        self.note_rounding(kind, ratio, kept)
        return kept

    def note_rounding(self, kind: str, ratio: float, kept: Sequence[int]) -> None:
        real = 1 - sum(kept) / sum(self.sizes(kind))
        multiple = self.multiple(kind)
        if abs(real - ratio) > 1e-3:
            self.notes.append(
                f"asked to remove {ratio:.2%} of {kind}s; {real:.2%} go, because "
                + (f"kept counts are multiples of {multiple}" if multiple > 1 else "units go whole")
            )

    def rank_globally(self, kind: str, num_removed: int) -> list[int]:
        scores = self.scores.values[kind]
        return global_counts(
            standardised(scores) if self.request.normalize == "layer" else scores,
            num_removed,
            min_keep_ratio=self.request.min_keep_ratio,
            multiple=self.multiple(kind),
            kind=kind,
        )

    def by_threshold(self, kind: str, threshold: float) -> list[int]:
        """Keep what scores above the threshold, at least the floor, rounded up: no unit above the threshold goes."""
        sizes, multiple = self.sizes(kind), self.multiple(kind)
        counts = self.floored(kind, threshold_counts(self.scores.values[kind], threshold))
        rounded = [min(size, -(-n // multiple) * multiple) for n, size in zip(counts, sizes, strict=True)]
        if self.request.shape == "uneven":
            return rounded
        size, widest = self.require_even(kind), max(rounded)
        fits = (n for n in range(widest, size) if n % multiple == 0 and self.is_allowed(kind, n))
        kept = next(fits, size)
        if kept == size:
            uneven = sum(size - n for n in rounded)
            refused = "" if widest == size else " that the configuration accepts"
            advice = (
                f"Use shape: uneven, which would remove {uneven} of {sum(sizes)}" if uneven else "Raise the threshold"
            )
            raise PlanError(
                f"threshold {threshold:g} removes no {kind} in shape uniform: layer {rounded.index(widest)} keeps "
                f"{widest} of {size}, and all layers must keep the same number{refused}. {advice}."
            )
        return [kept] * len(sizes)

    def floored(self, kind: str, counts: Sequence[int]) -> list[int]:
        floors = [floor_count(size, self.request.min_keep_ratio) for size in self.sizes(kind)]
        raised = [layer for layer, (n, floor) in enumerate(zip(counts, floors, strict=True)) if n < floor]
        if raised:
            self.notes.append(
                f"{len(raised)} layers would have kept fewer {kind}s than min_keep_ratio "
                f"{self.request.min_keep_ratio:g} allows and were raised to it"
            )
        return [max(n, floor) for n, floor in zip(counts, floors, strict=True)]

    def left_to_remove(self) -> float:
        wanted = parameters_to_remove(self.request, self.shapes, self.geometry)
        if self.given_up >= wanted:
            raise PlanError(
                f"the vocabulary alone gives up {self.given_up:,} parameters, and the budget asks for {wanted:,.0f}; "
                "nothing is left for the other units. Raise the budget, or prune the vocabulary alone."
            )
        return wanted - self.given_up

    def by_parameters(self, wanted: float) -> dict[str, list[int]]:
        costs = {kind: cost_per_unit(self.geometry, kind, self.shapes) for kind in self.scores.values}
        owned = {
            kind: sum(c * n for c, n in zip(costs[kind], self.sizes(kind), strict=True)) for kind in self.scores.values
        }
        if wanted >= sum(owned.values()):
            raise PlanError(
                f"the budget removes {wanted:,.0f} parameters, but the units that may be cut "
                f"({', '.join(owned)}) own {sum(owned.values()):,}. Lower the budget or add unit kinds."
            )
        ratio, left, counts = wanted / sum(owned.values()), wanted, {}
        kinds = sorted(self.scores.values, key=lambda kind: kind == FFN_CHANNEL)
        for kind in kinds:
            share = left / owned[kind] if kind == kinds[-1] else ratio
            counts[kind] = self.by_share(kind, share, exact=kind == kinds[-1])
            left -= sum(
                cost * (size - kept)
                for cost, size, kept in zip(costs[kind], self.sizes(kind), counts[kind], strict=True)
            )
        if abs(left) > 0.005 * wanted:
            self.notes.append(f"the budget asked for {wanted:,.0f} parameters to go; {wanted - left:,.0f} do")
        return {kind: counts[kind] for kind in self.scores.values}

    def by_share(self, kind: str, share: float, *, exact: bool) -> list[int]:
        """Keep units so that ``share`` of a kind's parameters goes; rounded towards keeping unless ``exact``."""
        sizes = self.sizes(kind)
        if share >= 1:
            raise PlanError(
                f"the budget would need {share:.0%} of the {kind}s. Lower it, or allow more unit kinds in prune.units."
            )
        if self.request.is_global:
            return self.rank_globally(kind, round(share * sum(sizes)) if exact else int(share * sum(sizes)))
        if self.request.shape == "uniform":
            self.require_even(kind)
        return [self.nearest_count(kind, size, size * (1 - share), exact=exact) for size in sizes]

    def nearest_count(self, kind: str, size: int, aim: float, *, exact: bool) -> int:
        """Return the allowed count for a layer of ``size`` units nearest to ``aim``, or next above unless ``exact``."""
        allowed = [n for n in range(size, 0, -1) if self.is_allowed(kind, n)]
        if not exact:
            return min(n for n in allowed if n >= aim)
        multiple = self.multiple(kind)
        steps = [n for n in allowed if n % multiple == 0 or n == size]
        return min(steps, key=lambda n: (abs(n - aim), -n))
