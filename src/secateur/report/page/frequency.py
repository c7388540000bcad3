"""How often a text's token ids occur, from the most used one down, in few points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_POINTS_PER_DECADE = 24


@dataclass(frozen=True, slots=True)
class FrequencyPoint:
    """One token id in the order of use.

    Attributes:
        rank: its place, from 1.
        per_million: its uses per million tokens.
        coverage: share of the text that ids up to this one make up.
    """

    rank: int
    per_million: float
    coverage: float


@dataclass(frozen=True, slots=True)
class FrequencyCurve:
    """Token frequencies of one text.

    Attributes:
        points: some ranks, spaced evenly on a log scale; the last is the rarest id that occurs.
        num_tokens: tokens counted.
        num_used: different ids among them.
    """

    points: Sequence[FrequencyPoint]
    num_tokens: int
    num_used: int


def frequency_curve(counts: npt.NDArray[np.int64]) -> FrequencyCurve:
    """Return the curve of counts per token id; ids that do not occur have no place on it."""
    used = np.sort(counts[counts > 0])[::-1]
    total = int(used.sum())
    if not total:
        return FrequencyCurve((), 0, 0)
    covered = np.cumsum(used) / total
    steps = max(2, int(np.log10(len(used)) * _POINTS_PER_DECADE))
    ranks = np.unique(np.round(np.geomspace(1, len(used), steps)).astype(int))
    points = tuple(
        FrequencyPoint(int(rank), 1e6 * float(used[rank - 1]) / total, float(covered[rank - 1])) for rank in ranks
    )
    return FrequencyCurve(points, total, len(used))
