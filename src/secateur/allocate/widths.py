"""How many channels and groups stay in each layer, by shares of units, by a threshold, or by parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from torch import Tensor

from secateur.allocate.blocks import BlockCut
from secateur.allocate.budget import Shapes, cost_per_unit
from secateur.allocate.counts import (
    floor_count,
    global_counts,
    of_rounds,
    standardised,
    threshold_counts,
    uniform_count,
)
from secateur.allocate.layer_ratios import by_influence, log_increase
from secateur.allocate.request import RULES, Request
from secateur.errors import PlanError
from secateur.families.geometry import WIDTH_MULTIPLE, Geometry
from secateur.records.scores import Scores
from secateur.records.units import (
    EXPERT,
    EXPERT_CHANNEL,
    FFN_CHANNEL,
    GQA_GROUP,
    LAYER,
    LAYER_UNIT_KINDS,
    QUERY_HEAD,
    SHARED_CHANNEL,
    SUBLAYER_OF,
)

_COARSE_WIDTH, _COARSE_MULTIPLE = 512, 32
_WIDTHS = (FFN_CHANNEL, EXPERT_CHANNEL, SHARED_CHANNEL)
"""Kinds whose numbers are the widths of matrices."""
_RATIO_KEYS = {
    FFN_CHANNEL: "channels",
    GQA_GROUP: "groups",
    QUERY_HEAD: "heads",
    EXPERT: "experts",
    EXPERT_CHANNEL: "expert_channels",
    SHARED_CHANNEL: "shared_channels",
}


def kept_multiple(geometry: Geometry, kind: str, sizes: Sequence[int], request: Request) -> int:
    """Return what kept counts of a kind are multiples of, in layers of these sizes; 0 where the sub-layer is gone."""
    step = geometry.step(kind)
    if kind not in _WIDTHS:
        return step
    if kind == EXPERT_CHANNEL:
        step *= WIDTH_MULTIPLE
    if request.multiple_of != "auto":
        return math.lcm(step, geometry.step(kind) * request.multiple_of)
    there = [size // axis.num_groups for size, axis in zip(sizes, geometry.axes[kind], strict=True) if size] or [0]
    coarse = min(there) >= _COARSE_WIDTH and all(size % _COARSE_MULTIPLE == 0 for size in there)
    return geometry.step(kind) * _COARSE_MULTIPLE if coarse else step


class Widths:
    """Works out how many units of each kind stay in each layer, in the sub-layers that stay.

    Args:
        scores: importance of every unit.
        geometry: of the dense model.
        shapes: its parameters by name, tied ones once.
        request: the budget and its constraints.
        cut: the whole sub-layers and layers that go; 0 units stay there.
        notes: sentences on what was rounded are added to it.
    """

    def __init__(
        self,
        scores: Scores,
        geometry: Geometry,
        shapes: Shapes,
        request: Request,
        cut: BlockCut,
        notes: list[str],
    ) -> None:
        self._scores = scores
        self._geometry = geometry
        self._shapes = shapes
        self._request = request
        self._cut = cut
        self._notes = notes
        self.kinds = [kind for kind in scores.values if kind in LAYER_UNIT_KINDS]

    def by_units(self) -> dict[str, list[int]]:
        """Return kept counts for a threshold, or for shares of units."""
        budget = self._request.budget
        if "threshold" in budget:
            return {kind: self._by_threshold(kind, budget["threshold"]) for kind in self.kinds}
        return {kind: self._by_ratio(kind, budget[_RATIO_KEYS[kind]]) for kind in self.kinds}

    def sizes(self, kind: str) -> list[int]:
        """Return the units per layer, 0 where the sub-layer goes or is gone already."""
        stay = set(self._cut.left(SUBLAYER_OF[kind]))
        return [axis.num_units if axis.layer in stay else 0 for axis in self._geometry.axes[kind]]

    def _scores_of(self, kind: str, value: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Return the scores that are left; where groups must keep the same number, of every unit's round."""
        scores = [layer[:size] for layer, size in zip(self._scores.values[kind], self.sizes(kind), strict=True)]
        axes = self._geometry.axes[kind]
        return [
            layer if axis.per_group is None or not len(layer) else of_rounds(layer, axis.num_groups, value)
            for axis, layer in zip(axes, scores, strict=True)
        ]

    def multiple(self, kind: str) -> int:
        """Return what kept counts of a kind are multiples of."""
        return kept_multiple(self._geometry, kind, self.sizes(kind), self._request)

    def _is_allowed(self, kind: str, count: int) -> bool:
        if self._request.shape == "uneven":
            return not self._geometry.why_impossible(kind, count)
        return self._geometry.is_allowed(kind, count)

    def _possible(self, kind: str, counts: Sequence[int]) -> list[int]:
        """Return the counts, those that no model can have raised to the next that one can."""
        return [
            self._nearest_count(kind, size, n, exact=False) if n and self._geometry.why_impossible(kind, n) else n
            for size, n in zip(self.sizes(kind), counts, strict=True)
        ]

    def _require_even(self, kind: str) -> int:
        sublayer, per_layer = SUBLAYER_OF[kind], self.sizes(kind)
        others = {layer for layer in self._cut.left(sublayer) if not self._geometry.axes[kind][layer].num_units}
        sizes = [per_layer[layer] for layer in self._cut.left(LAYER) if layer not in others]
        if not sizes:
            raise PlanError(f"no layer that stays has {kind}s. Use other units, or remove fewer layers.")
        if 0 in sizes:
            raise PlanError(
                f"some layers of the model have no {SUBLAYER_OF[kind]} sub-layer, so shape: uniform is not possible. "
                "Use shape: uneven."
            )
        if len(set(sizes)) > 1:
            raise PlanError(
                f"the model's layers hold between {min(sizes)} and {max(sizes)} {kind}s, so shape: uniform is not "
                "possible. Use shape: uneven."
            )
        return sizes[0]

    def _by_ratio(self, kind: str, ratio: float) -> list[int]:
        sizes = self.sizes(kind)
        if self._request.is_global:
            kept = self._rank_globally(kind, round(ratio * sum(sizes)))
            if sum(kept) == sum(sizes):
                raise PlanError(f"removing {ratio:.4g} of {sum(sizes)} {kind}s rounds to none. Ask for more.")
            return kept
        if self._request.shape == "uniform":
            self._require_even(kind)
        if self._request.allocation in RULES:
            kept = self._by_rule(kind, ratio)
        else:
            kept = [
                uniform_count(
                    ratio,
                    size,
                    multiple=self.multiple(kind),
                    kind=kind,
                    is_allowed=lambda n: self._is_allowed(kind, n),
                    why_impossible=lambda n: self._geometry.why_impossible(kind, n),
                )
                if size
                else 0
                for size in sizes
            ]
        self._note_rounding(kind, ratio, kept)
        return kept

    def _by_rule(self, kind: str, ratio: float) -> list[int]:
        """Return kept counts nearest to the shares that ``log_increase`` or ``block_influence`` gives."""
        sizes, request = self.sizes(kind), self._request
        stay = [layer for layer, size in enumerate(sizes) if size]
        cap = 1 - request.min_keep_ratio
        if request.allocation == "log_increase":
            shares = log_increase(ratio, len(stay), cap=cap)
        else:
            shares = by_influence(ratio, [request.influence[layer] for layer in stay], cap=cap)
        kept = [0] * len(sizes)
        for layer, share in zip(stay, shares, strict=True):
            kept[layer] = self._nearest_count(kind, sizes[layer], sizes[layer] * (1 - share), exact=True)
        return kept

    def _note_rounding(self, kind: str, ratio: float, kept: Sequence[int]) -> None:
        real = 1 - sum(kept) / sum(self.sizes(kind))
        multiple = self.multiple(kind)
        if abs(real - ratio) > 1e-3:
            self._notes.append(
                f"asked to remove {ratio:.2%} of {kind}s; {real:.2%} go, because "
                + (f"kept counts are multiples of {multiple}" if multiple > 1 else "units go whole")
            )

    def _rank_globally(self, kind: str, num_removed: int) -> list[int]:
        scores = self._scores_of(kind, lambda ordered: ordered.mean(0))
        counts = global_counts(
            standardised(scores) if self._request.normalize == "layer" else scores,
            num_removed,
            min_keep_ratio=self._request.min_keep_ratio,
            multiple=self.multiple(kind),
            kind=kind,
            fewest=self._geometry.fewest(kind),
        )
        return self._possible(kind, counts)

    def _by_threshold(self, kind: str, threshold: float) -> list[int]:
        """Keep what scores above the threshold, at least the floor, rounded up: no unit above the threshold goes."""
        sizes, multiple = self.sizes(kind), self.multiple(kind)
        scores = self._scores_of(kind, lambda ordered: ordered.amax(0))
        counts = self._floored(kind, threshold_counts(scores, threshold))
        rounded = [min(size, -(-n // multiple) * multiple) for n, size in zip(counts, sizes, strict=True)]
        rounded = self._possible(kind, rounded)
        if self._request.shape == "uneven":
            return rounded
        size, widest = self._require_even(kind), max(rounded)
        fits = (n for n in range(widest, size) if n % multiple == 0 and self._is_allowed(kind, n))
        kept = next(fits, size)
        if kept == size:
            uneven = sum(sizes) - sum(rounded)
            refused = "" if widest == size else " that the configuration accepts"
            advice = (
                f"Use shape: uneven, which would remove {uneven} of {sum(sizes)}" if uneven else "Raise the threshold"
            )
            raise PlanError(
                f"threshold {threshold:g} removes no {kind} in shape uniform: layer {rounded.index(widest)} keeps "
                f"{widest} of {size}, and all layers must keep the same number{refused}. {advice}."
            )
        return [kept if size else 0 for size in sizes]

    def _floored(self, kind: str, counts: Sequence[int]) -> list[int]:
        fewest = self._geometry.fewest(kind)
        floors = [min(size, max(fewest, floor_count(size, self._request.min_keep_ratio))) for size in self.sizes(kind)]
        raised = [layer for layer, (n, floor) in enumerate(zip(counts, floors, strict=True)) if n < floor]
        if raised:
            self._notes.append(
                f"{len(raised)} layers would have kept fewer {kind}s than min_keep_ratio "
                f"{self._request.min_keep_ratio:g} allows and were raised to it"
            )
        return [max(n, floor) for n, floor in zip(counts, floors, strict=True)]

    def by_parameters(self, left: float, ratio: float) -> tuple[dict[str, list[int]], float]:
        """Return kept counts that remove ``left`` parameters in all, and how many are still left to remove.

        ``ratio`` of each kind's goes, rounded towards keeping; the last kind makes up the rest: FFN channels, or what
        owns most in models with experts.
        """
        costs = {kind: cost_per_unit(self._geometry, kind, self._shapes) for kind in self.kinds}
        owned = {kind: sum(c * n for c, n in zip(costs[kind], self.sizes(kind), strict=True)) for kind in self.kinds}
        counts = {}
        kinds = sorted(self.kinds, key=lambda kind: owned[kind] if self._geometry.experts else kind == FFN_CHANNEL)
        for kind in kinds:
            share = left / owned[kind] if kind == kinds[-1] else ratio
            counts[kind] = self._by_share(kind, share, exact=kind == kinds[-1])
            left -= sum(
                cost * (size - kept)
                for cost, size, kept in zip(costs[kind], self.sizes(kind), counts[kind], strict=True)
            )
        return {kind: counts[kind] for kind in self.kinds}, left

    def _by_share(self, kind: str, share: float, *, exact: bool) -> list[int]:
        """Keep units so that ``share`` of a kind's parameters goes; rounded towards keeping unless ``exact``."""
        sizes = self.sizes(kind)
        if share >= 1:
            raise PlanError(
                f"the budget would need {share:.0%} of the {kind}s. Lower it, or allow more unit kinds in prune.units."
            )
        if self._request.is_global:
            return self._rank_globally(kind, round(share * sum(sizes)) if exact else int(share * sum(sizes)))
        if self._request.allocation in RULES:
            return self._by_rule(kind, share)
        if self._request.shape == "uniform":
            self._require_even(kind)
        return [self._nearest_count(kind, size, size * (1 - share), exact=exact) if size else 0 for size in sizes]

    def _nearest_count(self, kind: str, size: int, aim: float, *, exact: bool) -> int:
        """Return the allowed count for a layer of ``size`` units nearest to ``aim``, or next above unless ``exact``."""
        multiple = self.multiple(kind)
        whole = [n for n in range(size, 0, -1) if n % multiple == 0 or n == size]
        steps = [n for n in whole if self._is_allowed(kind, n)]
        if not exact:
            return min(n for n in steps if n >= aim)
        return min(steps, key=lambda n: (abs(n - aim), -n))
