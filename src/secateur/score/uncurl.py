"""UNCURL: experts that the router treats alike on the text become one.

Source: Sarkar et al. 2024, "Revisiting SMoE Language Models by Evaluating Inefficiencies with Task Specific Expert
Pruning" (UNCURL), arXiv 2409.01483: per layer, spectral clustering of the experts by their router logits on the task's
tokens, then permutation alignment and usage-weighted merging of each cluster. There is no published code; the last two
steps are those of MC-SMoE (Li et al. 2024, arXiv 2310.01334), and the first one is standard: affinity max(0,
correlation of logits), normalised Laplacian, the K eigenvectors of the smallest eigenvalues with rows of length 1
(Ng, Jordan and Weiss 2001), k-means.

Where we differ, or the paper is not known to say. The router's row of a merged expert is that of the most used member,
because the mean of rows is shorter than they are and would be chosen for fewer tokens than any of them. How many
clusters there are comes from the budget; where several sizes are to be compared, layers are given more by how often
their experts are used. Where a router chooses among groups of experts first, clusters are formed inside each group. The
paper trains afterwards; ``recover`` does.

Dims: ``experts`` of a layer, ``others`` the same ones, ``rows`` points of k-means.
"""

from __future__ import annotations

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from secateur.errors import ConfigError
from secateur.records.routing import RoutingSums
from secateur.records.units import EXPERT
from secateur.score.method import Evidence, Merged, register
from secateur.score.routed import per_token

_STARTS, _STEPS = 10, 100
"""Draws of first centres, and steps from each, of k-means."""


def clusters(evidence: Evidence, count: int, groups: int, /) -> list[Merged]:
    """Return ``count`` clusters of a layer's experts, each with its members' shares in the merged expert.

    Args:
        evidence: what the pass says of the layer's experts.
        count: clusters, a multiple of ``groups``.
        groups: of the router, consecutive and of one size; each gets as many clusters.

    Raises:
        ConfigError: the statistics do not hold the router's logits.
    """
    routing = evidence.load_routing()
    alike = affinity(routing)
    size = len(alike) // groups
    found = []
    for first in range(0, len(alike), size):
        part = alike[first : first + size, first : first + size]
        labels = spectral_clusters(part, count // groups, seed=evidence.seed)
        for label in range(count // groups):
            found.append(_shares(((labels == label).nonzero()[:, 0] + first).tolist(), routing.routed))
    return found


def _shares(members: list[int], routed: Float64[Tensor, " experts"]) -> Merged:
    """Return members with their shares of the tokens, the most used first; where none is used, the first is all."""
    used = sorted(members, key=lambda member: (-float(routed[member]), member))
    total = float(routed[used].sum())
    if total == 0:
        return tuple((member, float(member == used[0])) for member in used)
    return tuple((member, float(routed[member]) / total) for member in used)


@register(
    "uncurl",
    measures="how often the expert is used; of experts that the router treats alike the most used one stays, merged "
    "with the others",
    formula="clusters of max(0, corr(l_i, l_j)), l the router's logits, as many as experts stay; channels of each "
    "member aligned to the most used one's; E = sum_j f_j E_j / sum_j f_j, f the tokens sent to j",
    needs="statistics",
    cost="reads all experts that are merged, and solves one assignment problem of an expert's width for each",
    caveat="merged experts answer for tokens that no member was made for: as a rule dropping experts is better unless "
    "the model is trained afterwards",
    source="Sarkar et al. 2024, UNCURL, arXiv 2409.01483; alignment and average as in MC-SMoE, arXiv 2310.01334",
    kinds=(EXPERT,),
    merge=clusters,
)
def uncurl(evidence: Evidence, /) -> Float64[Tensor, " experts"]:
    """Return the share of tokens that are sent to each expert, 0..1."""
    routing = evidence.load_routing()
    return per_token(routing.routed, routing)


def affinity(routing: RoutingSums) -> Float64[Tensor, "experts others"]:
    """Return max(0, correlation) of the router's logits of every two experts over the tokens; 1 on the diagonal.

    Raises:
        ConfigError: the statistics do not hold the router's logits.
    """
    if routing.logits is None or routing.logit_products is None:
        raise ConfigError(
            "method uncurl compares what the router gives the experts, and these statistics were taken before that was "
            "noted. Delete the statistics folder of the run, or calibrate into another one."
        )
    mean = routing.logits / routing.count
    covariance = routing.logit_products / routing.count - torch.outer(mean, mean)
    spread = covariance.diagonal().clamp_min(0.0).sqrt()
    least = 1e-12 * float(spread.max()) if len(spread) else 0.0
    known = spread > least
    scale = torch.where(known, spread, 1.0)
    correlation = covariance / torch.outer(scale, scale)
    correlation = torch.where(torch.outer(known, known), correlation, 0.0)
    return correlation.clamp(0.0, 1.0).fill_diagonal_(1.0)


def spectral_clusters(
    alike: Float64[Tensor, "experts others"], count: int, *, seed: int = 0
) -> Int64[Tensor, " experts"]:
    """Return for each expert its cluster, 0 to ``count`` - 1, none of them empty.

    Args:
        alike: affinities, symmetric, 0 or more, and above 0 on the diagonal.
        count: clusters.
        seed: of k-means.
    """
    assert 0 < count <= len(alike), f"{count} clusters of {len(alike)} experts"
    if count == len(alike):
        return torch.arange(count)
    scale = alike.sum(1).rsqrt()
    laplacian = torch.eye(len(alike), dtype=alike.dtype) - scale[:, None] * alike * scale
    _, vectors = torch.linalg.eigh((laplacian + laplacian.T) / 2)
    rows = torch.nn.functional.normalize(vectors[:, :count], dim=1)
    return k_means(rows, count, seed=seed)


def k_means(points: Float64[Tensor, "rows _coordinates"], count: int, *, seed: int = 0) -> Int64[Tensor, " rows"]:
    """Return for each point its cluster, none of them empty: the best of several starts.

    Args:
        points: at least ``count`` of them.
        count: clusters.
        seed: of the starts, each with distant points as first centres (k-means++, Arthur and Vassilvitskii 2007).
    """
    generator = torch.Generator().manual_seed(seed)
    best, least = torch.zeros(len(points), dtype=torch.int64), float("inf")
    for _ in range(_STARTS):
        labels, loss = _from_centres(points, _distant(points, count, generator))
        if loss < least - 1e-12:
            best, least = labels, loss
    return best


def _distant(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Return places of first centres, no place twice, far ones more likely."""
    chosen = [int(torch.randint(len(points), (), generator=generator))]
    while len(chosen) < count:
        squared = torch.cdist(points, points[chosen]).amin(1).square()
        squared[chosen] = 0.0
        free = torch.ones(len(points), dtype=points.dtype).index_fill_(0, torch.tensor(chosen), 0.0)
        weights = squared if float(squared.sum()) > 1e-20 else free
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
    return points[chosen].clone()


def _from_centres(points: Tensor, centres: Tensor) -> tuple[Tensor, float]:
    """Return labels after k-means from given centres, and the sum of squared distances."""
    labels = torch.full((len(points),), -1)
    for _ in range(_STEPS):
        distances = torch.cdist(points, centres)
        new = _none_empty(distances)
        if torch.equal(new, labels):
            break
        labels = new
        members = torch.nn.functional.one_hot(labels, len(centres)).to(points.dtype)
        centres = (members.T @ points) / members.sum(0)[:, None]
    return labels, float((points - centres[labels]).square().sum())


def _none_empty(distances: Tensor) -> Tensor:
    """Return each point's nearest centre; one without points gets the farthest point that another can spare."""
    labels = distances.argmin(1)
    for centre in range(distances.shape[1]):
        if bool((labels == centre).any()):
            continue
        counts = torch.bincount(labels, minlength=distances.shape[1])
        own = distances.gather(1, labels[:, None])[:, 0]
        labels[int(torch.where(counts[labels] > 1, own, -1.0).argmax())] = centre
    return labels
