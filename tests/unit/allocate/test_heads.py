"""Query heads: every group of a layer loses as many, whatever the budget, and the best of each group stay."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from secateur.allocate import Request, make_plan, same_size_plan
from secateur.allocate.counts import keep_best, of_rounds
from secateur.errors import PlanError
from secateur.records.plan import Plan
from secateur.records.units import ATTENTION, FFN_CHANNEL, GQA_GROUP, LAYER, QUERY_HEAD
from tests.allocation import CHANNEL_COST, HEAD_COST, counts, llama, random_scores, scores_of, total

HEADS = [QUERY_HEAD]
PER_GROUP = 4


def plan(budget: dict[str, float], kinds: list[str] = HEADS, groups: tuple[int, ...] = (3, 3), **request: Any) -> Plan:
    """Return the plan of random scores on a mistral with four query heads per group."""
    geometry, shapes = llama([40] * len(groups), groups, "mistral", PER_GROUP)
    return make_plan(random_scores(geometry, kinds), geometry, shapes, Request(budget, **request))


def per_group(done: Plan, layer: int) -> list[int]:
    """Return how many query heads each group of a layer keeps."""
    entry = done.layers[QUERY_HEAD][layer]
    groups = entry.num_units // PER_GROUP
    return [sum(head // PER_GROUP == group for head in entry.keep) for group in range(groups)]


def test_the_best_of_each_group_stay() -> None:
    """A group of strong heads loses as many as a group of weak ones; of equals the lower index stays."""
    scores = torch.tensor([9.0, 8, 7, 0, 1, 0, 5, 5], dtype=torch.float64)
    assert keep_best(scores, 4, groups=2) == (0, 1, 6, 7)
    assert keep_best(scores, 2, groups=2) == (0, 6)
    assert keep_best(scores, 4) == (0, 1, 2, 6)


def test_heads_go_round_by_round() -> None:
    """Every head gets its round's value: that of the heads of its rank in every group."""
    scores = torch.tensor([4.0, 1, 2, 10, 40, 30], dtype=torch.float64)
    mean = of_rounds(scores, 2, lambda ordered: ordered.mean(0))
    assert mean.tolist() == [22.0, 5.5, 16.0, 5.5, 22.0, 16.0]
    highest = of_rounds(scores, 2, lambda ordered: ordered.amax(0))
    assert highest.tolist() == [40.0, 10.0, 30.0, 10.0, 40.0, 30.0]


@pytest.mark.parametrize(
    ("budget", "request_"),
    [
        ({"heads": 0.5}, {}),
        ({"heads": 0.3}, {}),
        ({"heads": 0.3}, {"shape": "uneven"}),
        ({"heads": 0.4}, {"shape": "uneven", "allocation": "log_increase"}),
        ({"parameters": 0.1}, {"shape": "uneven"}),
        ({"parameters": 0.1}, {}),
        ({"threshold": 0.5}, {"shape": "uneven"}),
    ],
)
def test_every_group_keeps_as_many(budget: dict[str, float], request_: dict[str, Any]) -> None:
    """Under every kind of budget, shape and allocation; and the parameters add up."""
    _, shapes = llama([40] * 3, [3] * 3, "mistral", PER_GROUP)
    done = plan(budget, groups=(3, 3, 3), **request_)
    assert all(len(set(per_group(done, layer))) == 1 for layer in range(3))
    removed = sum(layer.num_removed for layer in done.layers[QUERY_HEAD])
    assert removed > 0
    assert done.total_pruned == total(shapes) - removed * HEAD_COST


def test_layers_compete_by_rounds() -> None:
    """Of all ways to remove two rounds, the ranking takes the one whose heads add up to the least."""
    geometry, shapes = llama([8, 8], [3, 3], "mistral", PER_GROUP)
    scores = random_scores(geometry, HEADS, seed=4)
    request = Request({"heads": 6 / 24}, shape="uneven", normalize="none")
    done = make_plan(scores, geometry, shapes, request)

    def lost(layer: int, rounds: int) -> float:
        ordered = scores.values[QUERY_HEAD][layer].reshape(3, PER_GROUP).sort(dim=1).values
        return float(ordered[:, :rounds].sum())

    ways = {pair: lost(0, pair[0]) + lost(1, pair[1]) for pair in product(range(3), repeat=2) if sum(pair) == 2}
    best = min(ways, key=lambda pair: ways[pair])
    assert tuple((12 - count) // 3 for count in counts(done, QUERY_HEAD)) == best


def test_no_head_above_the_threshold_goes() -> None:
    """A group with a strong head keeps the heads of the other groups in the layer."""
    geometry, shapes = llama([8, 8], [2, 2], "mistral", 2)
    scores = scores_of({QUERY_HEAD: [[0.1, 0.9, 0.1, 0.1], [0.9, 0.9, 0.1, 0.1]]})
    done = make_plan(scores, geometry, shapes, Request({"threshold": 0.5}, shape="uneven"))
    assert [layer.keep for layer in done.layers[QUERY_HEAD]] == [(1, 2), (0, 1, 2, 3)]


def test_channels_make_up_for_what_heads_cannot_meet() -> None:
    """Both kinds give the same share of their parameters, heads rounded towards keeping."""
    _, shapes = llama([40] * 2, [3] * 2, "mistral", PER_GROUP)
    done = plan({"parameters": 0.2}, [FFN_CHANNEL, QUERY_HEAD])
    heads = sum(layer.num_removed for layer in done.layers[QUERY_HEAD])
    channels = sum(layer.num_removed for layer in done.layers[FFN_CHANNEL])
    wanted = 0.2 * total(shapes)
    owned = 2 * (12 * HEAD_COST + 40 * CHANNEL_COST)
    assert 0 < heads * HEAD_COST <= 24 * HEAD_COST * wanted / owned
    assert abs(heads * HEAD_COST + channels * CHANNEL_COST - wanted) <= CHANNEL_COST


def test_heads_go_beside_whole_layers_and_attention() -> None:
    """Where attention goes, so do its heads; the layers that keep it lose some; groups are listed whole or gone."""
    kinds = [LAYER, ATTENTION, QUERY_HEAD]
    budget = {"layers": 0.25, "attention": 0.34, "heads": 0.5}
    done = plan(budget, kinds, groups=(3, 3, 3, 3), shape="uneven", allocation="uniform")
    assert len(done.removed_layers) == 1 and len(done.removed_sublayers(ATTENTION)) == 1
    gone = {*done.removed_layers, *done.removed_sublayers(ATTENTION)}
    assert counts(done, QUERY_HEAD) == [0 if layer in gone else 6 for layer in range(4)]
    assert counts(done, GQA_GROUP) == [0 if layer in gone else 3 for layer in range(4)]
    geometry, _ = llama([40] * 4, [3] * 4, "mistral", PER_GROUP)
    control = same_size_plan(done, random_scores(geometry, kinds, seed=9), geometry)
    assert sorted(counts(control, QUERY_HEAD)) == sorted(counts(done, QUERY_HEAD))


def test_controls_are_balanced_too() -> None:
    """Random and reversed scores keep as many heads per layer, and as many of each group."""
    done = plan({"heads": 0.3}, shape="uneven", groups=(3, 3, 3))
    geometry, _ = llama([40] * 3, [3] * 3, "mistral", PER_GROUP)
    control = same_size_plan(done, random_scores(geometry, HEADS, seed=9), geometry)
    assert counts(control, QUERY_HEAD) == counts(done, QUERY_HEAD)
    assert control.layers != done.layers
    assert all(per_group(control, layer) == per_group(done, layer) for layer in range(3))


def test_layers_that_lost_groups_keep_a_number_that_fits_all_of_them() -> None:
    """In a model whose layers differ in groups, kept counts can be shared out in each."""
    done = plan({"heads": 0.5}, groups=(2, 3), shape="uneven", allocation="uniform")
    assert (per_group(done, 0), per_group(done, 1)) == ([3, 3], [2, 2, 2])


def test_a_share_that_takes_no_head_of_a_group_says_which_do() -> None:
    """The counts that work are multiples of the number of groups."""
    with pytest.raises(PlanError) as caught:
        plan({"heads": 0.05})
    assert "removing 0.05 of 12 query_heads rounds to none (kept counts are multiples of 3)" in str(caught.value)
    assert "9 (ratio 0.25), 6 (ratio 0.5), 3 (ratio 0.75)" in str(caught.value)
