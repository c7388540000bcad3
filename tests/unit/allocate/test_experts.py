"""Budgets and plans for models with experts: costs, shares, floors, and budgets over all parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from secateur.allocate.budget import cost_per_unit, parameters_after, unit_cost
from secateur.allocate.plan import make_plan, same_size_plan
from secateur.allocate.request import Request
from secateur.errors import PlanError
from secateur.families.geometry import Geometry, build_geometry
from secateur.families.loader import families
from secateur.records.units import ATTENTION, EXPERT, EXPERT_CHANNEL, FFN, FFN_CHANNEL, GQA_GROUP, LAYER, SHARED_CHANNEL
from secateur.shrink.apply import check_plan
from tests.allocation import counts, random_scores
from tests.conftest import pico_model

Shapes = dict[str, tuple[int, ...]]
WIDTH, HIDDEN = 24, 48


def model_of(name: str, layers: int = 4, **extra: Any) -> tuple[Geometry, Shapes]:
    """Return the geometry and parameter shapes of a pico model with experts; its first layer may be dense."""
    family = families()[name]
    with torch.device("meta"):
        model = pico_model(family, torch.float32, **{str(family.dimensions["num_layers"].config): layers, **extra})
    shapes = {key: tuple(parameter.shape) for key, parameter in model.named_parameters()}
    return build_geometry(family, model.config.to_dict()), shapes


def request(budget: dict[str, float], **changes: Any) -> Request:
    """Return a request with few floors."""
    return Request(budget, min_keep_ratio=0.05, **changes)


def test_an_expert_owns_its_matrices_and_its_row_of_the_router() -> None:
    """Buffers are no parameters; layers without experts have no cost."""
    geometry, shapes = model_of("deepseek_v3")
    assert cost_per_unit(geometry, EXPERT, shapes) == [0] + [3 * WIDTH * HIDDEN + HIDDEN] * 3
    assert cost_per_unit(geometry, EXPERT_CHANNEL, shapes) == [0] + [3 * HIDDEN] * 3
    geometry, shapes = model_of("gpt_oss")
    owned = 3 * WIDTH * HIDDEN + 2 * WIDTH + HIDDEN + HIDDEN + 1
    assert cost_per_unit(geometry, EXPERT, shapes) == [owned] * 4
    assert sum(unit_cost(geometry.axes[EXPERT_CHANNEL][0], shapes, "out_in").values()) == 3 * HIDDEN + 2


@pytest.mark.parametrize("name", ["mixtral", "deepseek_v3", "qwen2_moe"])
def test_half_of_the_experts_go_from_every_layer_that_has_them(name: str) -> None:
    """Uniform means as many in each of them, and as many of each routing group."""
    geometry, shapes = model_of(name)
    scores = random_scores(geometry, [EXPERT])
    plan = make_plan(scores, geometry, shapes, request({"experts": 0.5}))
    check_plan(plan, geometry)
    assert counts(plan, EXPERT) == [n // 2 for n in geometry.num_units(EXPERT)]
    best = (
        scores.values[EXPERT][3]
        .reshape(geometry.axes[EXPERT][3].num_groups, -1)
        .topk(4 if name != "deepseek_v3" else 2)
    )
    each = 8 // len(best.indices)
    kept = {each * group + int(unit) for group, row in enumerate(best.indices) for unit in row}
    assert set(plan.layers[EXPERT][3].keep) == kept


def test_a_share_that_leaves_too_few_is_refused_with_the_reason_and_what_works() -> None:
    """Uneven shape would not help, and is not offered."""
    geometry, shapes = model_of("mixtral")
    with pytest.raises(PlanError) as caught:
        make_plan(random_scores(geometry, [EXPERT]), geometry, shapes, request({"experts": 0.9}))
    message = str(caught.value)
    assert (
        "removing 0.9 of 8 experts leaves 1 per layer, but each token is sent to 2 experts. Allowed counts" in message
    )
    assert "uneven" not in message


@pytest.mark.parametrize(("name", "fewest"), [("mixtral", 2), ("deepseek_v3", 4)])
def test_no_layer_loses_more_experts_than_its_router_can_spare(name: str, fewest: int) -> None:
    """Layers that compete are stopped at the router's floor, in whole rounds of its groups."""
    geometry, shapes = model_of(name)
    scores = random_scores(geometry, [EXPERT])
    scores.values[EXPERT][2][:] -= 10.0
    plan = make_plan(scores, geometry, shapes, request({"experts": 0.4}, shape="uneven", normalize="none"))
    check_plan(plan, geometry)
    assert min(n for n in counts(plan, EXPERT) if n) == counts(plan, EXPERT)[2] == fewest
    with pytest.raises(PlanError, match="at most"):
        make_plan(scores, geometry, shapes, request({"experts": 0.95}, shape="uneven"))


def test_a_threshold_above_all_scores_leaves_what_a_router_needs() -> None:
    """The floor holds for thresholds too, and is noted."""
    geometry, shapes = model_of("deepseek_v3")
    plan = make_plan(random_scores(geometry, [EXPERT]), geometry, shapes, request({"threshold": 2.0}))
    assert counts(plan, EXPERT) == [0, 4, 4, 4]
    assert any("were raised to it" in note for note in plan.notes)


@pytest.mark.parametrize("shape", ["uniform", "uneven"])
@pytest.mark.parametrize(
    "kinds",
    [
        [EXPERT],
        [EXPERT, GQA_GROUP, LAYER],
        [EXPERT, SHARED_CHANNEL, FFN_CHANNEL],
        [EXPERT_CHANNEL],
        [LAYER],
    ],
    ids="-".join,
)
def test_budgets_over_all_parameters_are_met(kinds: list[str], shape: str) -> None:
    """Within a tenth of the model of what was asked, with the sum that the plan states."""
    geometry, shapes = model_of("qwen2_moe", layers=6)
    plan = make_plan(random_scores(geometry, kinds), geometry, shapes, request({"parameters": 0.3}, shape=shape))
    check_plan(plan, geometry)
    assert plan.total_pruned / plan.total_dense == pytest.approx(0.7, abs=0.1)
    removed = {kind: [layer.num_removed for layer in layers] for kind, layers in plan.layers.items()}
    assert parameters_after(shapes, geometry, removed) == plan.parameters_pruned
    control = same_size_plan(plan, random_scores(geometry, kinds, seed=1), geometry)
    check_plan(control, geometry)
    assert [sum(counts(control, kind)) for kind in plan.layers] == [sum(counts(plan, kind)) for kind in plan.layers]


def test_whole_layers_take_their_experts_with_them() -> None:
    """A plan that removes layers says so for every kind that a layer of the model may consist of."""
    geometry, shapes = model_of("qwen2_moe", layers=6)
    scores = random_scores(geometry, [LAYER])
    plan = make_plan(scores, geometry, shapes, request({"layers": 1 / 3}))
    assert plan.shape == "uniform"
    assert set(plan.layers) == {FFN_CHANNEL, GQA_GROUP, EXPERT}
    assert len(plan.removed_layers) == 2
    assert plan.removed_sublayers(FFN) == plan.removed_sublayers(ATTENTION) == ()


def test_sub_layers_of_experts_go_whole() -> None:
    """What the FFN consists of in each layer goes; the plan is uneven."""
    geometry, shapes = model_of("qwen2_moe", layers=6)
    scores = random_scores(geometry, [FFN])
    scores.values[FFN][0][:] = scores.values[FFN][4][:] = -1.0
    plan = make_plan(scores, geometry, shapes, request({"ffn": 1 / 3}, shape="uneven"))
    check_plan(plan, geometry)
    assert plan.removed_sublayers(FFN) == (0, 4)
    assert counts(plan, FFN_CHANNEL) == [0] * 6
    assert counts(plan, EXPERT) == [0, 8, 8, 8, 0, 8]


def test_expert_widths_are_multiples_that_the_product_takes() -> None:
    """Of eight by default; what is asked for is met together with it."""
    geometry, shapes = model_of("mixtral", intermediate_size=96)
    scores = random_scores(geometry, [EXPERT_CHANNEL])
    for multiple, width in (("auto", 64), (3, 72), (16, 64)):
        made = request({"expert_channels": 0.3}, multiple_of=multiple)
        plan = make_plan(scores, geometry, shapes, made)
        assert counts(plan, EXPERT_CHANNEL) == [8 * width] * 4
