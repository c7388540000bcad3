"""Documents are chosen by the published formulas, exactly within the budget, and the same way every time."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from secateur.corpus.selection import (
    TEMPERATURE,
    Clusters,
    allocate,
    complexity,
    density_budgets,
    directions,
    needs_embeddings,
    select_documents_for_training,
    spherical_kmeans,
)
from secateur.errors import ConfigError
from secateur.recipe import SelectSpec

Method = Literal["random", "prototypes", "density"]


def planted(sizes: list[int], spread: list[float], seed: int = 0) -> tuple[Tensor, np.ndarray]:
    """Return embeddings around orthogonal directions, far from the origin as hidden states are, and their clusters."""
    draw = np.random.default_rng(seed)
    of = np.repeat(np.arange(len(sizes)), sizes)
    centres = 10.0 * np.eye(len(sizes), 12)
    noise = draw.standard_normal((len(of), 12)) * np.array(spread)[of][:, None]
    shuffled = draw.permutation(len(of))
    return torch.tensor(100.0 + centres[of] + noise)[shuffled], of[shuffled]


def spec(method: Method, clusters: int = 3, keep: Literal["near", "far"] = "near") -> SelectSpec:
    return SelectSpec(method=method, clusters=clusters, keep=keep)


def test_kmeans_finds_planted_clusters_whatever_the_seed() -> None:
    """Members of one planted cluster share one found cluster, and prototypes are their mean directions."""
    embeddings, planted_in = planted([20, 5, 9, 30], [0.5, 0.5, 0.5, 0.5])
    points = directions(embeddings)
    for seed in range(5):
        found = spherical_kmeans(points, 4, seed)
        pairs = set(zip(planted_in.tolist(), found.of.tolist(), strict=True))
        assert found.count == len(pairs) == 4
        for cluster in range(4):
            total = points[found.of == cluster].sum(0)
            np.testing.assert_allclose(found.centroids[cluster], total / np.linalg.norm(total), atol=1e-12)
        expected = [1 - point @ found.centroids[cluster] for point, cluster in zip(points, found.of, strict=True)]
        np.testing.assert_allclose(found.distance, expected, atol=1e-12)
        assert (found.distance <= 1 - (points @ found.centroids.T).max(1) + 1e-12).all()


def test_kmeans_makes_no_more_clusters_than_there_are_directions() -> None:
    """Identical documents share a cluster, however many clusters are asked for, and nothing is undefined."""
    points = directions(torch.tensor([[1.0, 0.0]] * 6 + [[0.0, 1.0]] * 6))
    found = spherical_kmeans(points, 5, seed=1)
    assert found.count == 2
    np.testing.assert_allclose(found.distance, 0.0, atol=1e-12)
    assert not complexity(found).any()
    same = spherical_kmeans(directions(torch.ones(8, 3)), 2, seed=0)
    assert same.count == 1 and not same.distance.any() and np.isfinite(complexity(same)).all()


def test_complexity_follows_the_definition() -> None:
    """d_inter is the mean distance to the nearest other centroids, d_intra that of the members to their own."""
    embeddings, _ = planted([12, 12, 12], [0.5, 2.0, 4.0])
    found = spherical_kmeans(directions(embeddings), 3, seed=0)
    for cluster in range(3):
        others = [1 - found.centroids[cluster] @ found.centroids[o] for o in range(3) if o != cluster]
        own = [d for d, of in zip(found.distance, found.of, strict=True) if of == cluster]
        assert complexity(found)[cluster] == pytest.approx(np.mean(others) * np.mean(own))


@pytest.mark.parametrize("seed", range(6))
def test_allocation_is_the_minimum_of_the_quadratic_program(seed: int) -> None:
    """Limits and sum are kept, and no transfer between two clusters comes nearer to what was wanted."""
    draw = np.random.default_rng(seed)
    least = draw.uniform(0, 3, 8)
    most = least + draw.uniform(0, 10, 8)
    wanted = draw.uniform(-5, 20, 8)
    total = least.sum() + draw.uniform(0, 1) * (most - least).sum()
    found = allocate(wanted, least, most, total)
    assert found.sum() == pytest.approx(total)
    assert (found >= least - 1e-9).all() and (found <= most + 1e-9).all()
    cost = np.square(found - wanted).sum()
    for giver in range(8):
        for taker in range(8):
            amount = min(1e-3, found[giver] - least[giver], most[taker] - found[taker])
            moved = found.copy()
            moved[giver] -= amount
            moved[taker] += amount
            assert np.square(moved - wanted).sum() >= cost - 1e-9


def test_density_budgets_are_softmax_shares_where_no_limit_binds() -> None:
    """With plenty of text in every cluster the budget is shared in proportion to exp(C / tau)."""
    embeddings, _ = planted([40, 40, 40], [1.0, 2.0, 3.0])
    found = spherical_kmeans(directions(embeddings), 3, seed=0)
    tokens = np.full(120, 100)
    weights = np.exp(complexity(found) / TEMPERATURE)
    np.testing.assert_allclose(density_budgets(found, tokens, 3000), 3000 * weights / weights.sum(), rtol=1e-9)


def test_density_gives_a_cluster_of_copies_its_least_and_keeps_the_farthest_of_each() -> None:
    """Copies get the smallest share; from every cluster the documents farthest from its centroid are taken."""
    embeddings, of = planted([30, 30, 30], [0.0, 3.0, 3.0])
    tokens = torch.full((90,), 10)
    chosen = select_documents_for_training(embeddings, tokens, 300, spec("density"), seed=0)
    assert len(chosen) == 30
    kept = np.bincount(of[chosen], minlength=3)
    assert kept[0] < min(kept[1:]) and kept[0] >= 5
    found = spherical_kmeans(directions(embeddings), 3, seed=0)
    for cluster in range(3):
        taken = np.isin(np.arange(90), chosen) & (found.of == cluster)
        left = ~np.isin(np.arange(90), chosen) & (found.of == cluster)
        assert found.distance[taken].min() >= found.distance[left].max() - 1e-12


@pytest.mark.parametrize("keep", ["near", "far"])
def test_prototypes_keep_the_nearest_or_farthest_and_half_of_every_clusters_share(
    keep: Literal["near", "far"],
) -> None:
    """Half of the budget goes to each cluster's own best, the other half to the best of all."""
    embeddings, _ = planted([40, 40, 40], [0.2, 1.0, 3.0])
    tokens = torch.full((120,), 10)
    chosen = select_documents_for_training(embeddings, tokens, 600, spec("prototypes", keep=keep), seed=0)
    found = spherical_kmeans(directions(embeddings), 3, seed=0)
    score = found.distance if keep == "near" else -found.distance
    expected: set[int] = set()
    for cluster in range(3):
        members = np.flatnonzero(found.of == cluster)
        expected |= set(members[np.argsort(score[members], kind="stable")][: math.ceil(len(members) / 4)].tolist())
    for document in np.argsort(score, kind="stable"):
        if len(expected) < 60:
            expected.add(int(document))
    assert set(chosen) == expected


@pytest.mark.parametrize("method", ["random", "prototypes", "density"])
def test_a_selection_reaches_the_budget_and_is_the_same_again(method: Method) -> None:
    """As few documents as reach the budget, each once; equal for equal seeds, and all where there is too little."""
    embeddings, _ = planted([25, 10, 40], [1.0, 2.0, 3.0])
    tokens = torch.randint(1, 60, (75,), generator=torch.Generator().manual_seed(0))
    for budget in (1, 200, 700):
        chosen = select_documents_for_training(embeddings, tokens, budget, spec(method), seed=3)
        assert len(set(chosen)) == len(chosen)
        assert sum(tokens[chosen].tolist()) >= budget > sum(tokens[chosen[:-1]].tolist())
        assert chosen == select_documents_for_training(embeddings.float(), tokens, budget, spec(method), seed=3)
    for everything in (None, 10**9):
        chosen = select_documents_for_training(embeddings, tokens, everything, spec(method), seed=3)
        assert sorted(chosen) == list(range(75))


def test_the_random_control_needs_no_embeddings_and_looks_at_none() -> None:
    """Another seed gives another order; clusters do not matter."""
    tokens = torch.ones(8, dtype=torch.int64)
    orders = {tuple(select_documents_for_training(None, tokens, None, SelectSpec(), seed)) for seed in range(5)}
    assert len(orders) == 5
    assert not needs_embeddings(SelectSpec())


def test_every_start_of_a_density_selection_is_spread_over_the_clusters() -> None:
    """So that the limit in tokens, which cuts the end, takes from all clusters alike."""
    embeddings, of = planted([40, 40, 40], [2.0, 2.0, 2.0])
    tokens = torch.full((120,), 10)
    chosen = select_documents_for_training(embeddings, tokens, 600, spec("density"), seed=0)
    for length in (3, 15, 30, 45):
        kept = np.bincount(of[chosen[:length]], minlength=3)
        assert kept.min() >= length // 3 - 2


def test_too_many_clusters_and_missing_embeddings_are_refused() -> None:
    tokens = torch.ones(20, dtype=torch.int64)
    embeddings = torch.randn(20, 4)
    with pytest.raises(ConfigError, match=r"clusters is 11 and there are 20 documents.*Set it to 10 or less"):
        select_documents_for_training(embeddings, tokens, 5, spec("density", clusters=11), seed=0)
    select_documents_for_training(embeddings, tokens, 5, spec("density", clusters=10), seed=0)
    with pytest.raises(ConfigError, match="needs an embedding of every document"):
        select_documents_for_training(None, tokens, 5, spec("prototypes"), seed=0)


def test_ties_break_by_index() -> None:
    """Documents with equal scores come in the order of their indices."""
    clusters = Clusters(np.zeros(6, dtype=np.int64), np.ones((1, 1)), np.zeros(6))
    assert complexity(clusters).tolist() == [0.0]
    embeddings = torch.tensor([[1.0, 0.0], [0.0, 1.0]] * 4)
    chosen = select_documents_for_training(
        embeddings, torch.ones(8, dtype=torch.int64), 8, spec("prototypes", clusters=2), seed=0
    )
    assert sorted(chosen[:2]) == [0, 1] and sorted(chosen[2:4]) == [2, 3] and chosen[4:] == [4, 5, 6, 7]
