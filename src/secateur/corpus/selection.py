"""Which documents to train on where there are more than fit: spread over clusters of their embeddings, or by chance.

Pure: embeddings and token counts in, an order of documents out; the same seed gives the same order, ties break by
index. Embeddings are centred on their mean and scaled to length one before anything else, because hidden states share
one large direction; every distance is 1 - cosine.

``random`` is the control: a seeded permutation.

``prototypes``: spherical k-means; a document's score is its distance to the nearest prototype, and the nearest (or the
farthest) are kept. The easy, near ones serve when little text is kept, the hard, far ones when there is plenty. Every
cluster keeps at least half of its proportional share, so that no cluster disappears.
Source: B. Sorscher et al., "Beyond neural scaling laws", 2022, arXiv 2206.14486, section 5 (k-means prototypes; class
balance of 50 %). Where we differ: the balance is over clusters, because text has no classes; centring.

``density``: cluster j gets the part P_j = softmax_j(d_inter_j d_intra_j / tau) of the budget, as far as it has text,
and keeps the documents farthest from its centroid. d_intra is the mean distance of members to their centroid, d_inter
the mean distance of the centroid to the 20 nearest others. Dense clusters close to others are redundant and get little.
Source: A. Abbas et al., "Effective pruning of web-scale datasets based on complexity of concept clusters", 2024, arXiv
2401.04578 (complexity, softmax and quadratic program). Where we differ: budgets are tokens, not documents; the
quadratic program is solved in closed form up to one number, which is bisected; centring.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from secateur.errors import ConfigError
from secateur.recipe import SelectSpec

TEMPERATURE = 0.5
"""tau of the density method, as in the authors' published script."""

NEIGHBOURS = 20
"""Nearest centroids that the distance between clusters is a mean over."""

BALANCE = 0.5
"""Part of a cluster's even share that it keeps in any case."""

_RESTARTS = 4
_ITERATIONS = 50
_SMALLEST_DISTANCE = 1e-12


@dataclass(frozen=True, slots=True)
class Clusters:
    """Documents around prototypes.

    Attributes:
        of: cluster of each document; every cluster has at least one.
        centroids: unit vectors.
        distance: 1 - cosine of each document to its centroid.
    """

    of: Int64[np.ndarray, " documents"]
    centroids: Float64[np.ndarray, "clusters hidden"]
    distance: Float64[np.ndarray, " documents"]

    @property
    def count(self) -> int:
        """Clusters."""
        return len(self.centroids)


def select_documents_for_training(
    embeddings: Float[Tensor, "documents hidden"] | None,
    token_counts: Int64[Tensor, " documents"],
    budget_tokens: int | None,
    spec: SelectSpec,
    seed: int,
) -> list[int]:
    """Return the indices of the documents to train on, in order: as few as reach the budget.

    Every start of the list is spread over the clusters as the whole is, so that the last document may be cut short or
    left out. Where all documents together do not reach the budget, all are returned.

    Args:
        embeddings: one vector per document, such as ``embed_documents`` gives; ``random`` needs none.
        token_counts: tokens of each document.
        budget_tokens: how many tokens are wanted; None takes all.
        spec: method, number of clusters, and which side of them to keep.
        seed: of the permutation and of the first prototypes.

    Raises:
        ConfigError: there are more clusters than half the documents, or embeddings are missing.
    """
    tokens = token_counts.cpu().numpy()
    budget = int(tokens.sum()) if budget_tokens is None else min(budget_tokens, int(tokens.sum()))
    if spec.method == "random":
        return _until(np.random.default_rng(seed).permutation(len(tokens)), tokens, budget)
    require_clusters(spec, len(tokens))
    if embeddings is None:
        raise ConfigError(
            f"recover.select.method {spec.method} needs an embedding of every document and got none. Run "
            "embed_documents first, or set method: random."
        )
    assert len(embeddings) == len(tokens), "one embedding per document"
    clusters = spherical_kmeans(directions(embeddings), spec.clusters, seed)
    order = _by_prototypes if spec.method == "prototypes" else _by_density
    return _until(order(clusters, tokens, budget, spec), tokens, budget)


def needs_embeddings(spec: SelectSpec) -> bool:
    """Return whether a selection looks at embeddings."""
    return spec.method != "random"


def require_clusters(spec: SelectSpec, num_documents: int) -> None:
    """Raise ConfigError if there are too few documents for the clusters; ``random`` has none."""
    if needs_embeddings(spec) and 2 * spec.clusters > num_documents:
        raise ConfigError(
            f"recover.select.clusters is {spec.clusters} and there are {num_documents} documents to choose from, fewer "
            f"than two for each. Set it to {max(num_documents // 2, 2)} or less, raise recover.select.pool, give more "
            "text, or set method: random."
        )


def directions(embeddings: Float[Tensor, "documents hidden"]) -> Float64[np.ndarray, "documents hidden"]:
    """Return embeddings less their mean, scaled to length one; one that equals the mean stays zero."""
    rows = embeddings.detach().cpu().double().numpy()
    return _unit(rows - rows.mean(0))


def spherical_kmeans(
    points: Float64[np.ndarray, "documents hidden"], num_clusters: int, seed: int, restarts: int = _RESTARTS
) -> Clusters:
    """Return clusters of unit vectors around their mean directions, the tightest of a few starts.

    Starts are drawn as in greedy k-means++ (Arthur and Vassilvitskii, 2007), with chances in proportion to 1 -
    cosine, which on the sphere is half the squared distance. A cluster that runs empty starts again at the point
    farthest from its prototype. Fewer clusters come out where fewer directions are different.

    Args:
        points: unit vectors.
        num_clusters: wanted, at most the number of points.
        seed: of the starts.
        restarts: starts.
    """
    draw = np.random.default_rng(seed)
    found = [_lloyd(points, _first_prototypes(points, num_clusters, draw)) for _ in range(restarts)]
    return min(found, key=lambda clusters: float(clusters.distance.sum()))


def complexity(clusters: Clusters) -> Float64[np.ndarray, " clusters"]:
    """Return d_inter d_intra of each cluster; 0 for one whose members are all the same."""
    members = np.bincount(clusters.of, minlength=clusters.count)
    intra = np.bincount(clusters.of, weights=clusters.distance, minlength=clusters.count) / members
    between = 1.0 - clusters.centroids @ clusters.centroids.T
    np.fill_diagonal(between, np.inf)
    nearest = np.sort(between, axis=1)[:, : min(NEIGHBOURS, clusters.count - 1)]
    inter = nearest.mean(1) if clusters.count > 1 else np.ones(1)
    product: Float64[np.ndarray, " clusters"] = np.maximum(inter, 0.0) * intra
    return product


def allocate(
    wanted: Float64[np.ndarray, " clusters"],
    least: Float64[np.ndarray, " clusters"],
    most: Float64[np.ndarray, " clusters"],
    total: float | int,
) -> Float64[np.ndarray, " clusters"]:
    """Return the x with least <= x <= most and sum x = total that is nearest to ``wanted`` in squares.

    It is clip(wanted + nu, least, most), the condition of Karush, Kuhn and Tucker; nu is bisected.

    Args:
        wanted: what each cluster would get without limits.
        least: lower limits; their sum is at most ``total``.
        most: upper limits; their sum is at least ``total``.
        total: what is given out.
    """
    low, high = float((least - wanted).min()), float((most - wanted).max())
    for _ in range(200):
        middle = 0.5 * (low + high)
        if middle in (low, high):
            break
        if np.clip(wanted + middle, least, most).sum() < total:
            low = middle
        else:
            high = middle
    given: Float64[np.ndarray, " clusters"] = np.clip(wanted + high, least, most)
    return given


def density_budgets(
    clusters: Clusters, tokens: Int64[np.ndarray, " documents"], budget: int
) -> Float64[np.ndarray, " clusters"]:
    """Return the tokens each cluster may keep; they add up to the budget."""
    has = np.bincount(clusters.of, weights=tokens, minlength=clusters.count)
    weights = complexity(clusters) / TEMPERATURE
    shares = np.exp(weights - weights.max())
    shares /= shares.sum()
    least = np.minimum(BALANCE * budget / clusters.count, has)
    return allocate(shares * budget, least, has, budget)


def _by_density(
    clusters: Clusters, tokens: Int64[np.ndarray, " documents"], budget: int, spec: SelectSpec
) -> Int64[np.ndarray, " documents"]:
    """Return all documents, the hardest of each cluster first, as evenly over their budgets as documents allow."""
    del spec
    budgets = density_budgets(clusters, tokens, budget)
    return _interleaved(clusters.of, tokens, -clusters.distance, budgets)[0]


def _by_prototypes(
    clusters: Clusters, tokens: Int64[np.ndarray, " documents"], budget: int, spec: SelectSpec
) -> Int64[np.ndarray, " documents"]:
    """Return all documents: first each cluster's least share, cluster beside cluster, then the rest by score."""
    score = clusters.distance if spec.keep == "near" else -clusters.distance
    has = np.bincount(clusters.of, weights=tokens, minlength=clusters.count)
    order, within = _interleaved(clusters.of, tokens, score, BALANCE * budget * has / max(has.sum(), 1))
    rest = order[~within]
    rest = np.sort(rest)
    return np.concatenate([order[within], rest[np.argsort(score[rest], kind="stable")]])


def _interleaved(
    of: Int64[np.ndarray, " documents"],
    tokens: Int64[np.ndarray, " documents"],
    score: Float64[np.ndarray, " documents"],
    budgets: Float64[np.ndarray, " clusters"],
) -> tuple[Int64[np.ndarray, " documents"], Bool[np.ndarray, " documents"]]:
    """Return the documents by how much of their cluster's budget is used before them; and whether any is left then.

    Within a cluster the smallest score comes first. A cluster's first document comes before any of its budget is used.
    """
    ranked = np.lexsort((np.arange(len(of)), score, of))
    before = np.cumsum(tokens[ranked]) - tokens[ranked]
    starts = np.r_[True, of[ranked][1:] != of[ranked][:-1]]
    before -= np.maximum.accumulate(np.where(starts, before, 0))
    used = before / np.maximum(budgets[of[ranked]], np.finfo(np.float64).tiny)
    order = np.lexsort((ranked, of[ranked], used))
    return ranked[order], used[order] < 1.0


def _until(order: Int64[np.ndarray, " documents"], tokens: Int64[np.ndarray, " documents"], budget: int) -> list[int]:
    """Return the documents from the start of the order whose tokens reach the budget."""
    reached = np.cumsum(tokens[order])
    count = min(len(order), int(np.searchsorted(reached, budget)) + 1)
    return [int(document) for document in order[:count]]


def _unit(rows: Float64[np.ndarray, "rows hidden"]) -> Float64[np.ndarray, "rows hidden"]:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: Float64[np.ndarray, "rows hidden"] = rows / np.where(lengths > 0.0, lengths, 1.0)
    return unit


def _first_prototypes(
    points: Float64[np.ndarray, "documents hidden"], num_clusters: int, draw: np.random.Generator
) -> Float64[np.ndarray, "clusters hidden"]:
    """Return points far from each other: of a few drawn, each time the one that leaves all points nearest to some."""
    chosen = [min(int(draw.random() * len(points)), len(points) - 1)]
    distance = _distances(points, points[chosen]).ravel()
    while len(chosen) < num_clusters and distance.any():
        reached = np.cumsum(distance)
        drawn = draw.random(2 + int(math.log(num_clusters))) * reached[-1]
        candidates = np.unique(np.searchsorted(reached, drawn, side="right"))
        left = np.minimum(distance[:, None], _distances(points, points[candidates]))
        best = int(left.sum(0).argmin())
        chosen.append(int(candidates[best]))
        distance = left[:, best]
    prototypes: Float64[np.ndarray, "clusters hidden"] = points[chosen]
    return prototypes


def _distances(
    points: Float64[np.ndarray, "documents hidden"], prototypes: Float64[np.ndarray, "clusters hidden"]
) -> Float64[np.ndarray, "documents clusters"]:
    """Return 1 - cosine of every pair; 0 where it is rounding, and for a point at the mean, which has no direction."""
    found: Float64[np.ndarray, "documents clusters"] = 1.0 - points @ prototypes.T
    found[found < _SMALLEST_DISTANCE] = 0.0
    found[~points.any(axis=1)] = 0.0
    return found


def _lloyd(
    points: Float64[np.ndarray, "documents hidden"], prototypes: Float64[np.ndarray, "clusters hidden"]
) -> Clusters:
    of = np.full(len(points), -1)
    for _ in range(_ITERATIONS):
        distances = _distances(points, prototypes)
        nearest = distances.argmin(1)
        _fill_empty(nearest, distances.min(1), len(prototypes))
        if np.array_equal(nearest, of):
            break
        of = nearest
        prototypes = _unit(np.stack([points[of == cluster].sum(0) for cluster in range(len(prototypes))]))
    there, renumbered = np.unique(of, return_inverse=True)
    distance = _distances(points, prototypes)[np.arange(len(points)), of]
    return Clusters(renumbered, prototypes[there], distance)


def _fill_empty(
    of: Int64[np.ndarray, " documents"], distance: Float64[np.ndarray, " documents"], num_clusters: int
) -> None:
    """Give every empty cluster the point farthest from its prototype, unless all lie on theirs; changes both arrays."""
    members = np.bincount(of, minlength=num_clusters)
    for cluster in np.flatnonzero(members == 0):
        candidates = np.where(members[of] > 1, distance, 0.0)
        farthest = int(candidates.argmax())
        if candidates[farthest] == 0.0:
            return
        members[of[farthest]] -= 1
        members[cluster] += 1
        of[farthest], distance[farthest] = cluster, 0.0
