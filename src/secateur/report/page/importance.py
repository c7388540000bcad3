"""What a page shows of layers: importance binned by rank, and parameters of every layer before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from secateur.records.plan import LayerPlan, Plan
from secateur.records.units import EXPERT, EXPERT_CHANNEL, FFN_CHANNEL, GQA_GROUP, QUERY_HEAD, SHARED_CHANNEL

MAX_BINS = 40
_PARTS = {"attention": (QUERY_HEAD, GQA_GROUP), "ffn": (FFN_CHANNEL, EXPERT, EXPERT_CHANNEL, SHARED_CHANNEL)}


@dataclass(frozen=True, slots=True)
class ImportanceBin:
    """Some units of one layer that follow each other when its units are ordered by score.

    Attributes:
        layer: index of the layer.
        start: share of the layer's units that score higher, 0 to 1; ``end`` the same with this bin.
        num_units: units in the bin.
        percentile: mean share of all units of the kind, in all layers, that score no higher, 0 to 100.
        score: mean score.
        kept_ratio: share of the bin's units that stay.
    """

    layer: int
    start: float
    end: float
    num_units: int
    percentile: float
    score: float
    kept_ratio: float


def bin_importance(
    scores: Sequence[npt.NDArray[np.float64]], layers: Sequence[LayerPlan], max_bins: int = MAX_BINS
) -> list[ImportanceBin]:
    """Return the scores of one kind of unit in bins of neighbouring ranks, the most important first.

    Equal scores are ordered by unit index and share a percentile.

    Args:
        scores: per layer, one score per unit.
        layers: per layer, which units stay.
        max_bins: per layer.

    Raises:
        ValueError: the scores are of other layers or units than the plan's.
    """
    if [len(values) for values in scores] != [layer.num_units for layer in layers]:
        raise ValueError("scores and plan are of different units")
    ordered = np.sort(np.concatenate([np.empty(0), *scores]))
    bins = []
    for index, (values, layer) in enumerate(zip(scores, layers, strict=True)):
        kept = np.zeros(len(values))
        kept[list(layer.keep)] = 1
        percentiles = 100 * np.searchsorted(ordered, values, side="right") / max(1, len(ordered))
        order = np.argsort(-values, kind="stable")
        place = 0
        for units in np.array_split(order, min(max_bins, len(order))) if len(order) else []:
            bins.append(
                ImportanceBin(
                    layer=index,
                    start=place / len(order),
                    end=(place + len(units)) / len(order),
                    num_units=len(units),
                    percentile=float(percentiles[units].mean()),
                    score=float(values[units].mean()),
                    kept_ratio=float(kept[units].mean()),
                )
            )
            place += len(units)
    return bins


def parameters_by_layer(plan: Plan) -> Mapping[str, Sequence[tuple[float, float]]]:
    """Return per part (``attention``, ``ffn``) each layer's parameters before and after, as the plan's totals say.

    The plan has totals of all layers and counts of units in each. A unit costs the same in every layer, and so does
    what a sub-layer has besides its units, so two totals give both costs. A part is left out where that does not hold:
    where the plan does not count its units, two kinds of them go, or some layers may have an FFN of another kind.
    """
    found = {}
    for part, kinds in _PARTS.items():
        counted = [plan.layers[kind] for kind in kinds if any(layer.num_units for layer in plan.layers.get(kind, ()))]
        narrowed = [layers for layers in counted if any(layer.is_narrowed for layer in layers)]
        layers = next(iter(narrowed or counted), ())
        is_everywhere = part == "attention" or all(layer.num_units for layer in layers)
        if layers and is_everywhere and len(narrowed) < 2:
            totals = plan.parameters_dense.get(part, 0), plan.parameters_pruned.get(part, 0)
            found[part] = _split(layers, *totals)
    return found


def _split(layers: Sequence[LayerPlan], dense: int, pruned: int) -> list[tuple[float, float]]:
    """Return each layer's part of two totals, from a cost per unit and a cost per sub-layer that is there."""
    before = sum(layer.num_units for layer in layers), sum(layer.num_units > 0 for layer in layers)
    after = sum(len(layer.keep) for layer in layers), sum(bool(layer.keep) for layer in layers)
    determinant = before[0] * after[1] - after[0] * before[1]
    if determinant:
        unit = (dense * after[1] - pruned * before[1]) / determinant
        fixed = (before[0] * pruned - after[0] * dense) / determinant
    else:
        unit, fixed = dense / max(1, before[0]), 0.0
    return [
        (
            unit * layer.num_units + fixed * (layer.num_units > 0),
            unit * len(layer.keep) + fixed * bool(layer.keep),
        )
        for layer in layers
    ]
