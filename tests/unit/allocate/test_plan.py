"""Making plans: every kind of budget, both shapes, and every refusal."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from secateur.allocate import Request, make_plan, same_size_plan
from secateur.errors import PlanError
from secateur.recipe import PruneSpec
from secateur.records.plan import Plan
from secateur.records.units import FFN_CHANNEL, GQA_GROUP
from tests.allocation import CHANNEL_COST, GROUP_COST, counts, llama, random_scores, scores_of, total

FFN, GROUPS = [FFN_CHANNEL], [GQA_GROUP]
BOTH = [FFN_CHANNEL, GQA_GROUP]


def plan(
    budget: dict[str, float],
    kinds: list[str] = FFN,
    channels: tuple[int, ...] = (40, 40),
    groups: tuple[int, ...] = (6, 6),
    family: str = "llama",
    **request: Any,
) -> Plan:
    """Return the plan of random scores on a llama of given widths."""
    geometry, shapes = llama(channels, groups, family)
    return make_plan(random_scores(geometry, kinds), geometry, shapes, Request(budget, **request))


def refusal(*args: Any, **kwargs: Any) -> str:
    """Return the message with which a plan is refused."""
    with pytest.raises(PlanError) as caught:
        plan(*args, **kwargs)
    return str(caught.value)


def test_a_plan_keeps_the_best_units_and_records_why() -> None:
    """The record says what stays, the score at the border, the request, and the size before and after."""
    geometry, shapes = llama([4, 4], [1, 1])
    scores = scores_of({FFN_CHANNEL: [[0.4, 0.1, 0.3, 0.2], [1.0, 2.0, 2.0, 4.0]]})
    done = make_plan(
        scores, geometry, shapes, Request({"channels": 0.5}), model_fingerprint="abc", calibration_tokens=50
    )
    first, second = done.layers[FFN_CHANNEL]
    assert (first.keep, first.lowest_kept, first.highest_removed) == ((0, 2), 0.3, 0.2)
    assert (second.keep, second.lowest_kept, second.highest_removed) == ((1, 3), 2.0, 2.0)
    assert (first.num_units, first.constants) == (4, ())
    assert (done.family, done.model_fingerprint, done.shape) == ("llama", "abc", "uniform")
    assert (done.method, done.options, done.budget) == ("by hand", {"power": 2}, {"channels": 0.5})
    assert (done.calibrated_on, done.calibration_tokens, done.notes) == (("medical",), 50, ())
    assert done.total_dense == total(shapes)
    assert done.total_pruned == total(shapes) - 4 * CHANNEL_COST
    assert done.parameters_pruned["ffn"] == 4 * CHANNEL_COST


@pytest.mark.parametrize("shape", ["uniform", "uneven"])
def test_a_layer_that_loses_nothing_has_no_removed_score(shape: str) -> None:
    """``highest_removed`` is empty where nothing was removed."""
    done = plan({"groups": 0.5}, GROUPS, groups=(2, 2), shape=shape, allocation="uniform")
    assert all(layer.highest_removed is not None for layer in done.layers[GQA_GROUP])
    geometry, shapes = llama([4, 4], [1, 1])
    scores = scores_of({FFN_CHANNEL: [[9, 9, 9, 9], [1, 2, 3, 4]]})
    skewed = make_plan(scores, geometry, shapes, Request({"channels": 0.25}, shape="uneven"))
    assert skewed.layers[FFN_CHANNEL][0].highest_removed is None
    assert counts(skewed, FFN_CHANNEL) == [4, 2]


def test_channels_and_groups_are_shares_of_units() -> None:
    """A quarter of 40 channels and half of 6 groups, in every layer."""
    assert counts(plan({"channels": 0.25}), FFN_CHANNEL) == [30, 30]
    assert counts(plan({"groups": 0.5}, GROUPS), GQA_GROUP) == [3, 3]
    both = plan({"channels": 0.25, "groups": 0.5}, BOTH)
    assert (counts(both, FFN_CHANNEL), counts(both, GQA_GROUP)) == ([30, 30], [3, 3])


def test_uneven_shape_ranks_the_whole_model() -> None:
    """The same share goes in total, from where the scores are low; allocation: uniform spreads it evenly."""
    geometry, shapes = llama([40, 40], [6, 6])
    scores = scores_of({FFN_CHANNEL: [[i / 100 for i in range(40)], [0.2 + i / 100 for i in range(40)]]})
    request = Request({"channels": 0.25}, shape="uneven", normalize="none")
    assert counts(make_plan(scores, geometry, shapes, request), FFN_CHANNEL) == [20, 40]
    scaled = Request({"channels": 0.25}, shape="uneven")
    assert counts(make_plan(scores, geometry, shapes, scaled), FFN_CHANNEL) == [30, 30]
    even = Request({"channels": 0.25}, shape="uneven", allocation="uniform")
    assert counts(make_plan(scores, geometry, shapes, even), FFN_CHANNEL) == [30, 30]


@pytest.mark.parametrize("shape", ["uniform", "uneven"])
@pytest.mark.parametrize("kinds", [FFN, BOTH], ids=["ffn", "both"])
@pytest.mark.parametrize("share", [0.05, 0.2, 0.4])
def test_a_parameter_budget_is_met_within_a_step(shape: str, kinds: list[str], share: float) -> None:
    """The removed parameters are the asked share of all parameters, within half a step of channels."""
    _, shapes = llama([200] * 3, [6] * 3)
    done = plan({"parameters": share}, kinds, channels=(200,) * 3, groups=(6,) * 3, shape=shape)
    step = CHANNEL_COST * (3 if shape == "uniform" else 1)
    assert abs(done.total_dense - done.total_pruned - share * total(shapes)) <= step / 2
    assert not done.notes or abs(done.total_dense - done.total_pruned - share * total(shapes)) > 0.005 * share * total(
        shapes
    )


def test_a_parameter_budget_takes_groups_rounded_towards_keeping() -> None:
    """Groups never give more than the common share; channels make up for it."""
    done = plan({"parameters": 0.4}, BOTH, channels=(200, 200), family="mistral")
    share = (done.total_dense - done.total_pruned) / (2 * 200 * CHANNEL_COST + 2 * 6 * GROUP_COST)
    kept = counts(done, GQA_GROUP)
    assert kept == [4, 4] or kept == [3, 3]
    assert 1 - kept[0] / 6 <= share < 1 - (kept[0] - 1) / 6
    assert 1 - counts(done, FFN_CHANNEL)[0] / 200 >= share - 0.01


def test_a_byte_budget_is_the_size_of_what_is_left() -> None:
    """The weights fit into the target within one step, in the checkpoint's own bytes per parameter."""
    _, shapes = llama([200, 200], [6, 6])
    target = int(0.7 * total(shapes)) * 2
    done = plan({"bytes": target}, channels=(200, 200), bytes_per_parameter=2.0)
    assert abs(done.total_pruned * 2 - target) <= 2 * CHANNEL_COST
    assert done.budget == {"bytes": target}


def test_a_threshold_removes_what_is_at_or_below_it() -> None:
    """In uneven shape every layer keeps exactly the units above the threshold."""
    geometry, shapes = llama([4, 4], [1, 1])
    scores = scores_of({FFN_CHANNEL: [[0.4, 0.1, 0.3, 0.2], [0.1, 0.2, 0.3, 0.9]]})
    uneven = make_plan(scores, geometry, shapes, Request({"threshold": 0.2}, shape="uneven"))
    assert [layer.keep for layer in uneven.layers[FFN_CHANNEL]] == [(0, 2), (2, 3)]
    skewed = scores_of({FFN_CHANNEL: [[0.4, 0.1, 0.3, 0.25], [0.1, 0.2, 0.3, 0.9]]})
    uniform = make_plan(skewed, geometry, shapes, Request({"threshold": 0.2}))
    assert counts(uniform, FFN_CHANNEL) == [3, 3], "no unit above the threshold goes"


@pytest.mark.parametrize("shape", ["uniform", "uneven"])
def test_thresholds_stop_at_the_floor(shape: str) -> None:
    """No layer keeps less than min_keep_ratio of its units, and the plan says that it was raised."""
    done = plan({"threshold": 2.0}, channels=(64, 64), shape=shape)
    assert all(kept / 64 >= 0.1 for kept in counts(done, FFN_CHANNEL))
    assert counts(done, FFN_CHANNEL) == [7, 7]
    assert done.notes == (
        "2 layers would have kept fewer ffn_channels than min_keep_ratio 0.1 allows and were raised to it",
    )


def test_a_floor_obeys_multiples_and_the_configuration() -> None:
    """Raising a count to the floor gives one that the model can have, not just any."""
    assert counts(plan({"threshold": 2.0}, channels=(64, 64), multiple_of=16), FFN_CHANNEL) == [16, 16]
    uneven = plan({"threshold": 2.0}, channels=(64, 64), multiple_of=16, shape="uneven")
    assert counts(uneven, FFN_CHANNEL) == [16, 16]
    groups = plan({"threshold": 2.0}, GROUPS, groups=(8, 8), min_keep_ratio=0.3)
    assert counts(groups, GQA_GROUP) == [3, 3]
    divisors = plan({"threshold": 2.0}, GROUPS, groups=(8, 8), min_keep_ratio=0.5)
    assert counts(divisors, GQA_GROUP) == [4, 4]
    raised = plan({"threshold": 2.0}, GROUPS, groups=(12, 12), min_keep_ratio=0.55)
    assert counts(raised, GQA_GROUP) == [8, 8], "7 groups are 14 heads, which do not divide 48"


def test_a_threshold_keeps_an_allowed_number_of_groups() -> None:
    """Where the configuration refuses the exact count, the next higher allowed one stays."""
    geometry, shapes = llama([4, 4], [12, 12])
    scores = scores_of({GQA_GROUP: [[1.0] * 5 + [0.0] * 7, [1.0] * 3 + [0.0] * 9]})
    done = make_plan(scores, geometry, shapes, Request({"threshold": 0.5}))
    assert counts(done, GQA_GROUP) == [6, 6]


def test_a_threshold_that_removes_nothing_uniformly_is_refused() -> None:
    """The layer in the way is named, and what the uneven shape would remove."""
    geometry, shapes = llama([4, 4], [1, 1])
    scores = scores_of({FFN_CHANNEL: [[0.4, 0.1, 0.1, 0.1], [0.9, 0.8, 0.7, 0.6]]})
    with pytest.raises(PlanError) as caught:
        make_plan(scores, geometry, shapes, Request({"threshold": 0.2}))
    assert str(caught.value) == (
        "threshold 0.2 removes no ffn_channel in shape uniform: layer 1 keeps 4 of 4, and all layers must keep the "
        "same number. Use shape: uneven, which would remove 3 of 8."
    )


def test_a_threshold_below_every_score_is_refused() -> None:
    """Neither shape removes anything; no shape is recommended that would not help."""
    message = refusal({"threshold": -1.0})
    assert message.startswith("threshold -1 removes no ffn_channel")
    assert "uneven, which would remove" not in message
    assert refusal({"threshold": -1.0}, shape="uneven") == (
        "budget {'threshold': -1.0} removes nothing. Ask for more, or use another budget."
    )


def test_wide_models_are_cut_in_steps_of_32() -> None:
    """From a width of 512 on, in multiples of 32, kept widths are multiples of 32; narrower ones are cut exactly."""
    wide = plan({"channels": 0.1}, channels=(512, 512))
    assert counts(wide, FFN_CHANNEL) == [448, 448]
    assert wide.notes == ("asked to remove 10.00% of ffn_channels; 12.50% go, because kept counts are multiples of 32",)
    assert counts(plan({"channels": 0.1}, channels=(512, 512), multiple_of=1), FFN_CHANNEL) == [461, 461]
    assert counts(plan({"channels": 0.1}, channels=(500, 500)), FFN_CHANNEL) == [450, 450]
    assert counts(plan({"channels": 0.1}, channels=(520, 520)), FFN_CHANNEL) == [468, 468]
    uneven = plan({"channels": 0.1}, channels=(512, 512), shape="uneven")
    assert all(kept % 32 == 0 for kept in counts(uneven, FFN_CHANNEL))


def test_groups_are_never_rounded_to_multiples() -> None:
    """multiple_of is about channels."""
    assert counts(plan({"groups": 0.5}, GROUPS, multiple_of=32), GQA_GROUP) == [3, 3]


@pytest.mark.parametrize(
    ("budget", "kinds", "request_", "words"),
    [
        ({"channels": 0.001}, FFN, {}, "removing 0.001 of 40 ffn_channels rounds to none"),
        ({"channels": 0.001}, FFN, {"shape": "uneven"}, "removing 0.001 of 80 ffn_channels rounds to none. Ask"),
        ({"channels": 0.05}, FFN, {"shape": "uneven", "multiple_of": 20}, "removing 0.05 of 80 ffn_channels rounds"),
        ({"groups": 0.01}, GROUPS, {}, "removing 0.01 of 6 gqa_groups rounds to none"),
        ({"channels": 0.99}, FFN, {}, "removing 0.99 of 40 ffn_channels leaves none"),
        (
            {"groups": 0.2},
            GROUPS,
            {},
            "leaves 5 per layer, which this family's configuration refuses. Allowed counts to"
            " keep: 4 (ratio 0.3333), 3 (ratio 0.5), 2 (ratio 0.6667), 1 (ratio 0.8333). Or use shape: uneven.",
        ),
        (
            {"channels": 0.95},
            FFN,
            {"shape": "uneven"},
            "the budget removes 76 ffn_channels, but with min_keep_ratio 0.1 at most 72 of 80 can go",
        ),
        ({"parameters": 0.9}, FFN, {}, "but the units that may be cut (ffn_channel) own 11,520. Lower the budget"),
        ({"parameters": 0.00001}, FFN, {}, "budget {'parameters': 1e-05} removes nothing"),
        ({"bytes": 1e9}, FFN, {}, "which is not more than the target of 1,000,000,000. Ask for a smaller target"),
        ({"bytes": 10.0}, FFN, {}, "but the units that may be cut (ffn_channel) own 11,520"),
    ],
)
def test_budgets_that_cannot_be_met_are_refused(
    budget: dict[str, float], kinds: list[str], request_: dict[str, Any], words: str
) -> None:
    """Every refusal says what was asked, what it comes to, and what can be had."""
    assert words in refusal(budget, kinds, **request_)


def test_one_kind_that_rounds_to_nothing_is_not_passed_over() -> None:
    """With two ratios, each must remove something: a budget that was asked for is never dropped in silence."""
    message = refusal({"channels": 0.02, "groups": 0.5}, BOTH, shape="uneven", multiple_of=8)
    assert message.startswith("removing 0.02 of 80 ffn_channels rounds to none")


def test_more_than_all_channels_cannot_make_up_for_groups() -> None:
    """Where groups cannot give their share, channels are asked for more than they have, and that is said."""
    message = refusal({"parameters": 0.62}, BOTH, channels=(20, 20), groups=(1, 1))
    assert "of the ffn_channels. Lower it, or allow more unit kinds" in message


def test_uneven_models_cannot_become_uniform() -> None:
    """A model whose layers differ keeps a shape in which they may."""
    for budget in ({"channels": 0.5}, {"parameters": 0.1}, {"threshold": 0.5}):
        message = refusal(budget, channels=(40, 20))
        assert message == (
            "the model's layers hold between 20 and 40 ffn_channels, so shape: uniform is not possible. "
            "Use shape: uneven."
        )


@pytest.mark.parametrize("allocation", ["auto", "uniform"])
@pytest.mark.parametrize("budget", [{"channels": 0.5, "groups": 0.5}, {"parameters": 0.3}, {"threshold": 0.5}], ids=str)
def test_uneven_models_are_planned_layer_by_layer(budget: dict[str, float], allocation: str) -> None:
    """Every layer keeps between one unit and all of its own, and the sizes add up."""
    geometry, shapes = llama([60, 20, 40], [6, 2, 3])
    done = make_plan(
        random_scores(geometry, BOTH), geometry, shapes, Request(budget, shape="uneven", allocation=allocation)
    )
    for kind, sizes in ((FFN_CHANNEL, [60, 20, 40]), (GQA_GROUP, [6, 2, 3])):
        assert [layer.num_units for layer in done.layers[kind]] == sizes
        assert all(1 <= kept <= size for kept, size in zip(counts(done, kind), sizes, strict=True))
    removed = sum(60 + 20 + 40 - n for n in [sum(counts(done, FFN_CHANNEL))]) * CHANNEL_COST
    removed += (6 + 2 + 3 - sum(counts(done, GQA_GROUP))) * GROUP_COST
    assert done.total_dense - done.total_pruned == removed
    if "parameters" in budget:
        assert removed == pytest.approx(0.3 * total(shapes), rel=0.05)
    if allocation == "uniform" and "channels" in budget:
        assert counts(done, FFN_CHANNEL) == [30, 10, 20]
        assert counts(done, GQA_GROUP) == [3, 1, 2]


def test_notes_say_what_was_rounded() -> None:
    """A budget that could not be met exactly is explained in the plan."""
    assert plan({"channels": 0.25}).notes == ()
    missed = plan({"parameters": 0.1}, GROUPS)
    assert len(missed.notes) == 1
    assert missed.notes[0].startswith("the budget asked for ")


def test_a_control_has_the_size_of_the_plan_it_controls() -> None:
    """The same number of units per layer, chosen by other scores."""
    geometry, shapes = llama([40, 40], [6, 6])
    done = make_plan(
        random_scores(geometry, BOTH),
        geometry,
        shapes,
        Request({"channels": 0.3, "groups": 0.3}, shape="uneven"),
    )
    control = same_size_plan(done, random_scores(geometry, BOTH, seed=1), geometry)
    for kind in BOTH:
        assert counts(control, kind) == counts(done, kind)
    assert control.layers[FFN_CHANNEL][0].keep != done.layers[FFN_CHANNEL][0].keep
    assert control.parameters_pruned == done.parameters_pruned


def test_a_request_says_what_the_recipe_says() -> None:
    """The prune section and the request have the same fields, also a size in bytes."""
    spec = PruneSpec.model_validate(
        {"budget": {"bytes": "1kb"}, "shape": "uneven", "min_keep_ratio": 0.2, "multiple_of": 8}
    )
    request = Request.of(spec, bytes_per_parameter=2.0)
    assert request == Request({"bytes": 1000}, "uneven", "auto", 0.2, 8, "layer", 2.0)
    assert request.is_global


@pytest.mark.parametrize(
    ("shape", "allocation", "is_global"),
    [("uniform", "auto", False), ("uneven", "auto", True), ("uneven", "uniform", False), ("uneven", "global", True)],
)
def test_layers_compete_where_they_may_differ(shape: Any, allocation: Any, is_global: bool) -> None:
    """Uneven shapes rank the whole model unless told otherwise."""
    assert Request({"channels": 0.1}, shape, allocation).is_global is is_global


def test_equal_scores_give_the_same_plan_every_time() -> None:
    """With nothing to choose by, the first units stay and the first layers give."""
    geometry, shapes = llama([8, 8], [1, 1])
    scores = scores_of({FFN_CHANNEL: [torch.zeros(8).tolist()] * 2})
    uniform = make_plan(scores, geometry, shapes, Request({"channels": 0.5}))
    assert [layer.keep for layer in uniform.layers[FFN_CHANNEL]] == [(0, 1, 2, 3)] * 2
    uneven = make_plan(scores, geometry, shapes, Request({"channels": 0.25}, shape="uneven"))
    assert counts(uneven, FFN_CHANNEL) == [4, 8]
