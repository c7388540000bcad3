"""Which way of cutting each layer loses least in all, when what each way loses on its own was measured.

The losses of layers are taken to add up. They do not quite: cuts in several layers lose more together than apart. As a
start for a search that measures whole plans, and where there is no time for one, it is good enough.

Source: a multiple-choice knapsack, solved exactly on rounded sizes by dynamic programming. As a way to give layers of
language models their own sizes: the level databases of ZipLM (Kurtic et al. 2023, arXiv 2302.04089) and Tyr-the-Pruner
(arXiv 2503.09657), where the choice is searched instead.

Dims: none; plain numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from secateur.errors import PlanError

_BINS = 8192


@dataclass(frozen=True, slots=True)
class Option:
    """One way of cutting one layer.

    Attributes:
        counts: units that stay, by kind.
        removed: parameters that go.
        loss: what the cut loses on its own; 0 or more.
    """

    counts: Mapping[str, int]
    removed: int
    loss: float


def choose_options(layers: Sequence[Sequence[Option]], wanted: float) -> list[Option]:
    """Return one option per layer, together removing at least ``wanted`` parameters for the least sum of losses.

    Args:
        layers: per layer, its options.
        wanted: parameters to remove. Sizes are counted in 8,192 steps, each layer's rounded down.

    Raises:
        PlanError: the options together cannot remove so much.
    """
    most = sum(max(option.removed for option in options) for options in layers)
    if most < wanted:
        raise PlanError(
            f"the budget removes {wanted:,.0f} parameters of the layers, but the cuts that were measured can remove "
            f"{most:,} at most. Lower the budget, prune.min_keep_ratio, or add unit kinds to prune.units."
        )
    if wanted <= 0:
        return [min(options, key=lambda option: (option.removed, option.loss)) for options in layers]
    size = wanted / _BINS
    tables = [_empty()]
    tables[0][0] = 0.0  # least loss by bins removed, before the first layer and after each
    picks: list[NDArray[np.int64]] = []
    for options in layers:
        after, pick = _empty(), np.zeros(_BINS + 1, dtype=np.int64)
        for index, option in enumerate(options):
            reached = _reached(tables[-1], option, size)
            better = reached < after
            after[better], pick[better] = reached[better], index
        tables.append(after)
        picks.append(pick)
    if not math.isfinite(tables[-1][_BINS]):  # sizes are rounded down, which can only matter at the very end
        return [max(options, key=lambda option: option.removed) for options in layers]
    place, result = _BINS, []
    for options, pick, before in zip(reversed(layers), reversed(picks), reversed(tables[:-1]), strict=True):
        option = options[int(pick[place])]
        result.append(option)
        left = _BINS - _bins(option, size)
        place = left + int(before[left:].argmin()) if place == _BINS else place - _bins(option, size)
    return result[::-1]


def _empty() -> NDArray[np.float64]:
    return np.full(_BINS + 1, np.inf)


def _bins(option: Option, size: float) -> int:
    return min(int(option.removed / size), _BINS)


def _reached(before: NDArray[np.float64], option: Option, size: float) -> NDArray[np.float64]:
    """Return the losses after taking an option; the last bin stands for everything from what is wanted on."""
    shift, reached = _bins(option, size), _empty()
    reached[shift:] = before[: _BINS + 1 - shift] + option.loss
    reached[_BINS] = before[_BINS - shift :].min() + option.loss
    return reached


def interpolated_loss(removed: float, measured: Sequence[tuple[float, float]]) -> float:
    """Return the loss of removing a share of a layer's units, from the losses measured at some shares.

    Between two measured shares, and beyond them, the loss is taken to grow as a power of the share, at least in
    proportion to it before the first one.

    Args:
        removed: share that goes, 0 to 1.
        measured: (share, loss) with shares ascending above 0 and losses ascending above 0.
    """
    if removed <= 0:
        return 0.0
    points = list(measured)
    if len(points) == 1:
        return points[0][1] * removed / points[0][0]
    upper = next((i for i, (share, _) in enumerate(points) if share >= removed), len(points) - 1)
    (share0, loss0), (share1, loss1) = points[max(upper - 1, 0)], points[max(upper, 1)]
    power = math.log(loss1 / loss0) / math.log(share1 / share0)
    if upper == 0:
        power = max(power, 1.0)
    return float(loss0 * (removed / share0) ** power)
