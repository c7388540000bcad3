"""How many units stay in each layer: uniform, by global ranking with floors, or by an absolute threshold.

Pure: scores and numbers in, counts out. Ties break by layer, then unit index. Dims: ``units`` of one layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float64
from torch import Tensor

from secateur.errors import PlanError


def floor_count(num_units: int, min_keep_ratio: float) -> int:
    """Return the fewest units that a layer may keep: its share rounded up, at least one of those it has."""
    return min(num_units, max(1, math.ceil(num_units * min_keep_ratio - 1e-9)))


def round_to_multiple(count: int, multiple: int, *, limit: int) -> int:
    """Return the multiple of ``multiple`` nearest to ``count``, at least one multiple, at most ``limit``."""
    nearest = int(count / multiple + 0.5) * multiple
    return min(limit, max(min(multiple, limit), nearest))


def keep_best(scores: Float64[Tensor, " units"], count: int, *, groups: int = 1) -> tuple[int, ...]:
    """Return the indices of the ``count`` highest scores, ascending; among equals the lower index stays.

    Args:
        scores: of the units of one layer.
        count: how many stay, a multiple of ``groups``.
        groups: consecutive groups of the same size; as many of each stay, its best.
    """
    assert count % groups == 0, f"{count} units cannot be shared out evenly between {groups} groups"
    order = torch.argsort(scores.reshape(groups, -1), dim=1, descending=True, stable=True)
    first = torch.arange(groups)[:, None] * (len(scores) // groups)
    return tuple(sorted((order[:, : count // groups].cpu() + first).flatten().tolist()))


def of_rounds(
    scores: Float64[Tensor, " units"], groups: int, value: Callable[[Tensor], Tensor]
) -> Float64[Tensor, " units"]:
    """Return the score of every unit's round; a round is one unit of each group, those of the same rank in it.

    Units of which every group must keep the same number go round by round: the worst of each group first.

    Args:
        scores: of the units of one layer.
        groups: consecutive groups of the same size.
        value: of a round: (groups, ranks) scores, each group's ascending, to one number per rank, ascending too.
    """
    ordered, order = scores.reshape(groups, -1).sort(dim=1, stable=True)
    return torch.zeros_like(ordered).scatter_(1, order, value(ordered).expand_as(ordered)).flatten()


def uniform_count(
    ratio: float,
    num_units: int,
    *,
    multiple: int,
    kind: str,
    is_allowed: Callable[[int], bool],
    why_impossible: Callable[[int], str | None] = lambda count: None,
) -> int:
    """Return how many units every layer keeps when ``ratio`` of them goes.

    Args:
        ratio: share to remove, between 0 and 1.
        num_units: units per layer.
        multiple: kept counts are multiples of this.
        kind: unit kind, for messages.
        is_allowed: whether the family's configuration takes a count.
        why_impossible: why no model can have a count, or None where one can.

    Raises:
        PlanError: rounds to no removal, removes everything, or gives a count the configuration refuses.
    """
    kept = int(num_units * (1 - ratio) / multiple + 0.5) * multiple
    feasible = [n for n in range(num_units - 1, 0, -1) if n % multiple == 0 and is_allowed(n)]
    if kept >= num_units or kept < 1:
        problem = "leaves none" if kept < 1 else "rounds to none"
        raise PlanError(
            f"removing {ratio:.4g} of {num_units} {kind}s {problem} (kept counts are multiples of {multiple}). "
            + _advice(feasible, num_units)
        )
    impossible = why_impossible(kept)
    if impossible is not None:
        raise PlanError(
            f"removing {ratio:.4g} of {num_units} {kind}s leaves {kept} per layer, but {impossible}. "
            + _advice(feasible, num_units)
        )
    if not is_allowed(kept):
        raise PlanError(
            f"removing {ratio:.4g} of {num_units} {kind}s leaves {kept} per layer, which this family's configuration "
            f"refuses. {_advice(feasible, num_units)} Or use shape: uneven."
        )
    return kept


def _advice(feasible: Sequence[int], num_units: int) -> str:
    if not feasible:
        return "No smaller count is allowed."
    shown = ", ".join(f"{n} (ratio {1 - n / num_units:.4g})" for n in _spread(feasible))
    return f"Allowed counts to keep: {shown}{', ...' if len(feasible) > 8 else ''}."


def _spread(values: Sequence[int]) -> list[int]:
    if len(values) <= 8:
        return list(values)
    return [values[round(i * (len(values) - 1) / 7)] for i in range(8)]


def threshold_counts(scores: Sequence[Float64[Tensor, " _units"]], threshold: float) -> list[int]:
    """Return, per layer, how many units score above ``threshold`` (those at or below it go)."""
    return [int((layer > threshold).sum()) for layer in scores]


def standardised(scores: Sequence[Float64[Tensor, " _units"]]) -> list[Float64[Tensor, " _units"]]:
    """Return each layer's scores with mean 0 and standard deviation 1; a layer of equal scores becomes zeros.

    Source: the standardisation of FLAP (An et al. 2024, arXiv 2312.11983), which compares layers of different scale.
    """
    centred = [layer - layer.mean() if len(layer) else layer for layer in scores]
    return [
        layer / layer.square().mean().sqrt().clamp_min(torch.finfo(layer.dtype).tiny) if len(layer) else layer
        for layer in centred
    ]


def global_counts(
    scores: Sequence[Float64[Tensor, " _units"]],
    num_removed: int,
    *,
    min_keep_ratio: float,
    multiple: int,
    kind: str,
    fewest: int = 1,
) -> list[int]:
    """Return, per layer, how many units stay when the ``num_removed`` lowest of the whole model go.

    No layer goes below ``min_keep_ratio`` of its units, nor below ``fewest`` of them; widths are then rounded to
    ``multiple`` and the rounding error is handed to the layers that were rounded furthest, so that the total stays
    within half a multiple.

    Raises:
        PlanError: the floors leave too few removable units; how far the budget can reach is said.
    """
    sizes = [len(layer) for layer in scores]
    floors = [min(n, -(-max(fewest, floor_count(n, min_keep_ratio)) // multiple) * multiple) for n in sizes]
    removable = sum(n - floor for n, floor in zip(sizes, floors, strict=True))
    if num_removed > removable:
        raise PlanError(
            f"the budget removes {num_removed} {kind}s, but with min_keep_ratio {min_keep_ratio:g} at most {removable} "
            f"of {sum(sizes)} can go. Lower the budget or prune.min_keep_ratio."
        )
    removable_scores = [layer.sort().values[: n - floor] for layer, n, floor in zip(scores, sizes, floors, strict=True)]
    layer_of = torch.cat([torch.full((len(values),), i) for i, values in enumerate(removable_scores)])
    order = torch.argsort(torch.cat(removable_scores), stable=True)[:num_removed]
    gone = torch.bincount(layer_of[order], minlength=len(sizes)).tolist()
    counts = [n - g for n, g in zip(sizes, gone, strict=True)]
    return _round_counts(counts, sizes, floors, multiple)


def _round_counts(counts: list[int], sizes: list[int], floors: list[int], multiple: int) -> list[int]:
    if multiple == 1:
        return counts
    target = sum(counts)
    rounded = [
        max(floor, round_to_multiple(count, multiple, limit=size)) if count < size else size
        for count, size, floor in zip(counts, sizes, floors, strict=True)
    ]
    while abs(error := sum(rounded) - target) > multiple / 2:
        step = -multiple if error > 0 else multiple
        movable = [
            i
            for i, kept in enumerate(rounded)
            if floors[i] <= kept + step <= sizes[i] and (kept + step) % multiple == 0
        ]
        if not movable:
            break
        furthest = max(movable, key=lambda i: ((rounded[i] - counts[i]) * (1 if error > 0 else -1), -i))
        rounded[furthest] += step
    return rounded
