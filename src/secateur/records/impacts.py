"""What single documents say of the units: how much a layer's output would change on each if a unit were not there.

Per unit only sums, a maximum and a histogram over documents are kept, so that shards add up and memory does not grow
with the text; yet any threshold or share can be chosen afterwards, because a unit is below a threshold on every
document exactly where its maximum is.

Dims: ``units`` of one kind in one layer, ``bins`` of equal width over 0 to 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from secateur.records.units import SiteKey

RANK_BINS = 32
"""Bins of the histogram of ranks."""


@dataclass(frozen=True, slots=True)
class UnitImpacts:
    """What ``count`` documents say of the units of one kind in one layer.

    The impact of a unit on a document is the Euclidean norm, over tokens and hidden channels, of how the output changes
    without the unit. Its rank is the share of the layer's units that have less impact on that document, the unit itself
    counted with them: 1 / units for the least, and the same for all that are equally little.

    Attributes:
        count: documents.
        impact_max: largest impact over the documents.
        impact_sq: sum of squared impacts.
        rank_max: largest rank, 0..1.
        rank_sum: sum of ranks.
        rank_counts: how many documents gave a rank in each bin; bin k of n is above k / n up to (k + 1) / n.
    """

    count: int
    impact_max: Float64[Tensor, " units"]
    impact_sq: Float64[Tensor, " units"]
    rank_max: Float64[Tensor, " units"]
    rank_sum: Float64[Tensor, " units"]
    rank_counts: Int64[Tensor, "units bins"]

    def __add__(self, other: UnitImpacts) -> UnitImpacts:
        return UnitImpacts(
            self.count + other.count,
            torch.maximum(self.impact_max, other.impact_max),
            self.impact_sq + other.impact_sq,
            torch.maximum(self.rank_max, other.rank_max),
            self.rank_sum + other.rank_sum,
            self.rank_counts + other.rank_counts,
        )

    def rank_quantile(self, share: float) -> Float64[Tensor, " units"]:
        """Return the rank that a share of the documents does not exceed, read off the histogram, at most a bin off."""
        counts = self.rank_counts.double()
        reached = counts.cumsum(1)
        wanted = share * self.count
        bins = (reached < wanted - 1e-9).sum(1).clamp_max(counts.shape[1] - 1)[:, None]
        inside = counts.gather(1, bins)[:, 0]
        before = reached.gather(1, bins)[:, 0] - inside
        within = ((wanted - before) / inside.clamp_min(1.0)).clamp(0.0, 1.0)
        return torch.minimum((bins[:, 0] + within) / counts.shape[1], self.rank_max)


TENSORS: tuple[str, ...] = ("impact_max", "impact_sq", "rank_max", "rank_sum", "rank_counts")
"""What ``UnitImpacts`` holds besides the count, by name."""


@dataclass(frozen=True, slots=True)
class ImpactStatistics:
    """The impacts of one text.

    Attributes:
        num_documents: documents that were run.
        units: by site (layer, unit kind).
    """

    num_documents: int
    units: Mapping[SiteKey, UnitImpacts]


def merge_impacts(texts: Sequence[ImpactStatistics]) -> ImpactStatistics:
    """Return the impacts of several texts as those of one; no document may be cut in two by where they part.

    Raises:
        ValueError: the texts have different sites.
    """
    if any(text.units.keys() != texts[0].units.keys() for text in texts):
        raise ValueError("impacts at different sites cannot be merged")
    units = {site: reduce(UnitImpacts.__add__, (text.units[site] for text in texts)) for site in texts[0].units}
    return ImpactStatistics(sum(text.num_documents for text in texts), units)


def competition_ranks(values: Float64[Tensor, "rows units"]) -> Int64[Tensor, "rows units"]:
    """Return for each value how many of its row are smaller, plus one: equal values share the lowest place."""
    values = values.contiguous()
    return torch.searchsorted(values.sort(-1).values, values) + 1


def judged(impacts: Float64[Tensor, "documents units"]) -> UnitImpacts:
    """Return what documents say of the units of one layer, from each unit's impact on each of them."""
    units = impacts.shape[1]
    places = competition_ranks(impacts)
    ranks = places.double() / units
    bins = (places * RANK_BINS + units - 1) // units - 1
    counts = torch.zeros(units, RANK_BINS, dtype=torch.int64, device=impacts.device)
    counts.scatter_add_(1, bins.T, torch.ones_like(bins.T))
    return UnitImpacts(len(impacts), impacts.amax(0), impacts.square().sum(0), ranks.amax(0), ranks.sum(0), counts)


def judged_alike(units: int) -> UnitImpacts:
    """Return what one document says of units that all have the same impact: enough to try a method on."""
    return judged(torch.ones(1, units, dtype=torch.float64))
