"""STUN, first stage: experts that the router can hardly tell apart are clustered, and one of each cluster stays.

Source: Lee et al. 2024, "STUN: Structured-Then-Unstructured Pruning for Scalable MoE Pruning", arXiv 2409.06211: the
distance between two experts is that between their rows of the router, clusters are made by complete linkage, and the
member nearest to its cluster's mean stays.

Where we differ, so that there is one score whatever the budget. All experts are merged, pair of clusters by pair; of
the two experts that stood for the clusters, the one nearer to the mean of the new cluster stands for it, and the other
gets the distance at which they were merged as its score (two single experts are equally near; the one with the longer
row stays). So cut anywhere, one expert of each cluster of that height stays, though not always the one nearest to the
mean. The paper takes that mean over the experts' weights, we over their rows of the router. Optional parts are left
out: how often two experts are chosen together, and the reconstruction of layers with few clusters. Nor is the second
stage, unstructured pruning, done here. Where a router chooses among groups of experts first, clusters may span groups,
and each group keeps as many.
"""

from __future__ import annotations

import torch
from jaxtyping import Float64
from torch import Tensor

from secateur.records.units import EXPERT
from secateur.score.method import Evidence, register


@register(
    "stun",
    measures="how far the expert's row of the router is from those of the experts that could stand for it",
    formula="score_e = height at which e's cluster is merged into one that another expert stands for; complete linkage "
    "of ||w_i - w_j||, w the rows of the router; the last expert scores twice the last height",
    needs="weights",
    cost="reads the router",
    caveat="looks at no text, so it keeps the same experts for every domain",
    source="Lee et al. 2024, STUN, arXiv 2409.06211, first stage",
    kinds=(EXPERT,),
)
def stun(evidence: Evidence, /) -> Float64[Tensor, " experts"]:
    """Return the distance of router rows at which each expert is no longer needed beside another."""
    return merge_heights(evidence.load_router().double())


def merge_heights(rows: Float64[Tensor, "experts hidden"]) -> Float64[Tensor, " experts"]:
    """Return at which distance each row's cluster is merged away; among equal distances the first pair goes first."""
    num = len(rows)
    members = torch.eye(num, dtype=torch.bool, device=rows.device)  # of the cluster that each expert stands for
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").fill_diagonal_(torch.inf)
    heights = rows.new_zeros(num)
    height = 0.0
    for _ in range(num - 1):
        first, second = divmod(int(distances.argmin()), num)
        height = float(distances[first, second])
        merged = members[first] | members[second]
        stays, goes = (first, second) if _stays(rows[merged], rows[first], rows[second]) else (second, first)
        heights[goes] = height
        members[stays] = merged
        farthest = torch.maximum(distances[stays], distances[goes])
        distances[stays], distances[:, stays] = farthest, farthest
        distances[goes], distances[:, goes] = torch.inf, torch.inf
        last = stays
    heights[last if num > 1 else 0] = 2 * height
    return heights


def _stays(cluster: Tensor, first: Tensor, second: Tensor) -> bool:
    """Return whether the first of two experts, rather than the second, is to stand for their cluster."""
    if len(cluster) == 2:
        return float(first.norm()) >= float(second.norm())
    mean = cluster.mean(0)
    return float((first - mean).norm()) <= float((second - mean).norm())
