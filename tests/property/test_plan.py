"""Plans keep exactly what they promise, for any scores and any budget."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.allocate import Request, make_plan
from secateur.allocate.counts import floor_count, global_counts, keep_best, threshold_counts, uniform_count
from secateur.errors import PlanError
from secateur.records.units import FFN_CHANNEL, GQA_GROUP, QUERY_HEAD
from tests.allocation import CHANNEL_COST, counts, llama, random_scores, scores_of, total

few_values = st.sampled_from([0.0, 0.25, 0.5, 1.0, -1.0])
"""Scores drawn from few values, so that ties are common."""
ratios = st.sampled_from([1e-9, 0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99, 1 - 1e-9]) | st.floats(0.001, 0.999)
usual_ratios = st.sampled_from([0.1, 0.2, 0.25, 0.3, 0.5])
kinds = st.sampled_from([[FFN_CHANNEL], [GQA_GROUP], [FFN_CHANNEL, GQA_GROUP], [QUERY_HEAD], [FFN_CHANNEL, QUERY_HEAD]])


def vectors(min_size: int = 1, max_size: int = 30) -> st.SearchStrategy[Tensor]:
    """Return score vectors full of ties."""
    lists = st.lists(few_values, min_size=min_size, max_size=max_size)
    return lists.map(lambda values: torch.tensor(values, dtype=torch.float64))


@given(vectors(), st.data())
def test_the_best_stay_and_ties_go_by_index(scores: Tensor, data: st.DataObject) -> None:
    """No removed unit beats a kept one, and among equals every kept index is below every removed one."""
    count = data.draw(st.integers(1, len(scores)))
    keep = keep_best(scores, count)
    assert len(set(keep)) == count
    assert list(keep) == sorted(keep)
    for kept in keep:
        for gone in set(range(len(scores))) - set(keep):
            assert scores[kept] > scores[gone] or (scores[kept] == scores[gone] and kept < gone)


@given(ratios, st.integers(1, 2000), st.sampled_from([1, 2, 8, 32]))
def test_a_uniform_count_is_the_nearest_multiple_or_an_error(ratio: float, num_units: int, multiple: int) -> None:
    """What stays is a multiple within half a multiple of what was asked, between one unit and all but one."""
    try:
        kept = uniform_count(ratio, num_units, multiple=multiple, kind="unit", is_allowed=lambda _: True)
    except PlanError as error:
        exact = num_units * (1 - ratio)
        assert exact < multiple / 2 + 1e-9 or exact >= num_units - multiple / 2 - 1e-9
        assert "Allowed counts" in str(error) or "No smaller count" in str(error)
    else:
        assert kept % multiple == 0
        assert 1 <= kept < num_units
        assert abs(kept - num_units * (1 - ratio)) <= multiple / 2 + 1e-9


@given(st.lists(vectors(4), min_size=1, max_size=5), st.floats(0, 1), st.sampled_from([0.01, 0.1, 0.5]))
def test_global_ranking_removes_exactly_what_it_promises(scores: list[Tensor], share: float, floor: float) -> None:
    """The total is exact, floors hold, and only layers at their floor keep units that score below a removed one."""
    sizes = [len(layer) for layer in scores]
    floors = [floor_count(size, floor) for size in sizes]
    removable = sum(sizes) - sum(floors)
    num_removed = int(share * removable)
    kept = global_counts(scores, num_removed, min_keep_ratio=floor, multiple=1, kind="unit")
    assert sum(sizes) - sum(kept) == num_removed
    assert all(low <= n <= size for low, n, size in zip(floors, kept, sizes, strict=True))
    ranked = [layer.sort(descending=True).values.tolist() for layer in scores]
    highest_removed = max(
        (layer[n] for layer, n in zip(ranked, kept, strict=True) if n < len(layer)), default=-math.inf
    )
    for layer, n, low in zip(ranked, kept, floors, strict=True):
        if n > low:
            assert layer[n - 1] >= highest_removed
    try:
        global_counts(scores, removable + 1, min_keep_ratio=floor, multiple=1, kind="unit")
    except PlanError as error:
        assert f"at most {removable} of {sum(sizes)} can go" in str(error)
    else:
        raise AssertionError("a budget beyond the floors was accepted")


@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
    st.sampled_from([2, 8, 32]),
    st.floats(0, 1),
    st.integers(0, 99),
)
def test_rounded_widths_keep_the_total_within_half_a_multiple(
    multiples: list[int], multiple: int, share: float, seed: int
) -> None:
    """Where dense widths are multiples, so are the kept ones, above the floors, and the total is as promised."""
    generator = torch.Generator().manual_seed(seed)
    scores = [torch.rand(n * multiple, dtype=torch.float64, generator=generator) for n in multiples]
    sizes = [len(layer) for layer in scores]
    floors = [math.ceil(floor_count(size, 0.1) / multiple) * multiple for size in sizes]
    num_removed = int(share * (sum(sizes) - sum(floors)))
    kept = global_counts(scores, num_removed, min_keep_ratio=0.1, multiple=multiple, kind="unit")
    assert all(n % multiple == 0 for n in kept)
    assert all(low <= n <= size for low, n, size in zip(floors, kept, sizes, strict=True))
    assert abs(sum(sizes) - sum(kept) - num_removed) <= multiple / 2


@given(st.lists(vectors(), min_size=1, max_size=4), few_values)
def test_threshold_counts_and_best_units_agree(scores: list[Tensor], threshold: float) -> None:
    """The units kept by count are exactly those above the threshold."""
    for layer, count in zip(scores, threshold_counts(scores, threshold), strict=True):
        if count:
            assert keep_best(layer, count) == tuple((layer > threshold).nonzero()[:, 0].tolist())


@st.composite
def requests(draw: st.DrawFn) -> tuple[list[str], dict[str, Any]]:
    """Return unit kinds and the fields of a request that fits them."""
    chosen = draw(kinds)
    shape = draw(st.sampled_from(["uniform", "uneven"]))
    keys = {FFN_CHANNEL: "channels", GQA_GROUP: "groups", QUERY_HEAD: "heads"}
    budget: dict[str, Any] = draw(
        st.one_of(
            st.fixed_dictionaries({keys[kind]: usual_ratios | ratios for kind in chosen}),
            st.fixed_dictionaries({"parameters": usual_ratios | ratios}),
            st.fixed_dictionaries({"bytes": st.integers(20_000, 150_000)}),
            st.fixed_dictionaries({"threshold": st.floats(0, 1)}),
        )
    )
    return chosen, {
        "budget": budget,
        "shape": shape,
        "allocation": draw(st.sampled_from(["auto", "uniform"] + (["global"] if shape == "uneven" else []))),
        "min_keep_ratio": draw(st.sampled_from([0.1, 0.3, 0.9])),
        "multiple_of": draw(st.sampled_from(["auto", 1, 4])),
    }


@settings(max_examples=200)
@given(
    requests(),
    st.lists(st.tuples(st.sampled_from([4, 16, 40, 63]), st.sampled_from([1, 2, 6])), min_size=1, max_size=3),
    st.sampled_from(["llama", "mistral"]),
    st.integers(1, 4),
    st.integers(0, 99),
)
def test_every_plan_adds_up_or_is_refused(
    asked: tuple[list[str], dict[str, Any]], widths: list[tuple[int, int]], family: str, q_per_kv: int, seed: int
) -> None:
    """For any request a plan removes something, fits its model, obeys shape and rules and counts parameters right."""
    chosen, request = asked[0], Request(**asked[1])
    geometry, shapes = llama([c for c, _ in widths], [g for _, g in widths], family, q_per_kv)
    scores = random_scores(geometry, chosen, seed)
    try:
        plan = make_plan(scores, geometry, shapes, request)
    except PlanError as error:
        assert len(str(error).split()) > 5
        return
    assert set(plan.layers) == set(chosen)
    removed = 0
    for kind in chosen:
        kept = counts(plan, kind)
        for axis, layer, values in zip(geometry.axes[kind], plan.layers[kind], scores.values[kind], strict=True):
            assert layer.num_units == axis.num_units
            assert 1 <= len(layer.keep) <= axis.num_units
            assert layer.keep == keep_best(values, len(layer.keep), groups=axis.num_groups)
            rows = sum(segment.width for segment in axis.segments)
            removed += layer.num_removed * rows * 48
            heads = {group: sum(unit // q_per_kv == group for unit in layer.keep) for group in range(axis.num_groups)}
            assert kind != QUERY_HEAD or len(set(heads.values())) == 1
            if kind == FFN_CHANNEL and request.multiple_of == 4:
                assert len(layer.keep) % 4 == 0 or len(layer.keep) == axis.num_units
        if plan.shape == "uniform":
            assert len(set(kept)) == 1
            assert geometry.is_allowed(kind, kept[0])
        if "threshold" in request.budget or request.is_global:
            sizes = [axis.num_units for axis in geometry.axes[kind]]
            assert all(n >= floor_count(size, request.min_keep_ratio) for n, size in zip(kept, sizes, strict=True))
    assert removed > 0
    assert plan.total_dense == total(shapes)
    assert plan.total_dense - plan.total_pruned == removed
    again = make_plan(scores, geometry, shapes, request)
    assert again == plan


@given(st.floats(0.02, 0.5), st.integers(0, 50), st.sampled_from(["uniform", "uneven"]))
def test_parameter_budgets_are_met_within_half_a_step(share: float, seed: int, shape: Any) -> None:
    """With channels to choose from, the removed share is the asked one to within half a channel per layer."""
    geometry, shapes = llama([200] * 3, [6] * 3)
    assume(share * total(shapes) < 0.85 * 600 * CHANNEL_COST)
    scores = random_scores(geometry, [FFN_CHANNEL], seed)
    plan = make_plan(scores, geometry, shapes, Request({"parameters": share}, shape=shape))
    step = CHANNEL_COST * (3 if shape == "uniform" else 1)
    assert abs(plan.total_dense - plan.total_pruned - share * total(shapes)) <= step / 2 + 1e-6


@given(vectors(2, 12), st.integers(0, 5))
def test_a_plan_does_not_depend_on_the_scale_of_scores(values: Tensor, power: int) -> None:
    """Only the order of scores matters."""
    geometry, shapes = llama([len(values)], [1])
    plain = scores_of({FFN_CHANNEL: [values.tolist()]})
    scaled = scores_of({FFN_CHANNEL: [(values * 2.0**power).tolist()]})
    request = Request({"channels": 0.5})
    first, second = (make_plan(s, geometry, shapes, request).layers[FFN_CHANNEL][0].keep for s in (plain, scaled))
    assert first == second
