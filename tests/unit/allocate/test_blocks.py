"""Choosing whole layers and sub-layers: in what order, how many, and what must stay."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from secateur.allocate import Request, make_plan, same_size_plan
from secateur.allocate.blocks import BlockCut, removal_order
from secateur.allocate.budget import block_cost, parameters_after
from secateur.allocate.plan import equal_share
from secateur.errors import PlanError
from secateur.families.geometry import Geometry
from secateur.families.loader import families
from secateur.records.plan import Plan
from secateur.records.scores import Scores
from secateur.records.units import ATTENTION, FFN, FFN_CHANNEL, GQA_GROUP, LAYER
from tests.allocation import CHANNEL_COST, GROUP_COST, HIDDEN, counts, llama, scores_of, total
from tests.conftest import geometry_of, pico_model

SIZES = ([40] * 6, [6] * 6)
ATTENTION_COST, FFN_COST = 6 * GROUP_COST + HIDDEN, 40 * CHANNEL_COST + HIDDEN


def deep(layer_types: list[str] | None = None) -> tuple[Geometry, dict[str, tuple[int, ...]]]:
    """Return a llama of six layers, norms and all; with types of attention it is a qwen2 (there is no difference)."""
    geometry, shapes = llama(*SIZES)
    for layer in range(6):
        norms = ("input_layernorm", "post_attention_layernorm")
        shapes |= {f"model.layers.{layer}.{norm}.weight": (HIDDEN,) for norm in norms}
    if layer_types is None:
        return geometry, shapes
    return replace(geometry, family=families()["qwen2"], layer_types=tuple(layer_types)), shapes


def plan(values: dict[str, Any], budget: dict[str, float], shape: Any = "uneven", **options: Any) -> Plan:
    """Return the plan for given scores; those of blocks are one number per layer."""
    geometry, shapes = deep(options.pop("layer_types", None))
    return make_plan(scores_for(values), geometry, shapes, Request(budget, shape, **options))


def scores_for(values: dict[str, Any]) -> Scores:
    """Return scores with one number per layer for blocks, and rising ones for channels and groups."""
    widths = {FFN_CHANNEL: list(range(40)), GQA_GROUP: list(range(6))}
    return scores_of(
        {kind: [widths[kind]] * 6 if kind in widths else [[value] for value in values[kind]] for kind in values}
    )


def test_the_lowest_scored_layers_go_and_the_rest_stay_as_they_are() -> None:
    """A third of six layers: the two lowest, of equals the later one. What stays is uniform, whatever was asked."""
    for shape in ("uniform", "uneven"):
        made = plan({LAYER: [3, 1, 2, 1, 1, 5]}, {"layers": 1 / 3}, shape)
        assert made.removed_layers == (3, 4)
        assert made.shape == "uniform"
        assert counts(made, FFN_CHANNEL) == [40, 40, 40, 0, 0, 40]
        assert made.total_dense - made.total_pruned == 2 * (ATTENTION_COST + FFN_COST)


def test_the_first_layer_may_go_but_keeps_its_attention_where_it_stays() -> None:
    """Caches read the length of the text in the first layer."""
    assert plan({LAYER: [0, 1, 2, 3, 4, 5]}, {"layers": 0.5}).removed_layers == (0, 1, 2)
    made = plan({ATTENTION: [0, 1, 2, 3, 4, 5]}, {"attention": 0.5})
    assert made.removed_sublayers(ATTENTION) == (1, 2, 3)
    assert made.shape == "uneven"
    assert made.total_dense - made.total_pruned == 3 * ATTENTION_COST


def test_every_type_of_attention_keeps_its_first_layer() -> None:
    """Where layers attend in two ways, the first of each keeps its attention; later ones of a type may lose it."""
    types = ["sliding", "sliding", "full", "sliding", "full", "full"]
    made = plan({ATTENTION: [0, 5, 1, 6, 2, 7]}, {"attention": 0.5}, layer_types=types)
    assert made.removed_sublayers(ATTENTION) == (1, 3, 4)
    both = plan(
        {LAYER: [9, 9, 0, 9, 9, 9], ATTENTION: [9, 9, 9, 9, 0, 1]},
        {"layers": 0.17, "attention": 0.2},
        layer_types=types,
    )
    assert (both.removed_layers, both.removed_sublayers(ATTENTION)) == ((2,), (5,)), "layer 4 is the first full one now"


def test_a_layer_that_loses_both_goes() -> None:
    """Attention and FFN of one layer together are the layer."""
    made = plan({ATTENTION: [9, 9, 0, 1, 9, 9], FFN: [9, 0, 1, 9, 9, 9]}, {"attention": 0.34, "ffn": 0.34})
    assert made.removed_layers == (2,)
    assert (made.removed_sublayers(ATTENTION), made.removed_sublayers(FFN)) == ((3,), (1,))


@pytest.mark.parametrize(
    ("kind", "ratio", "words"),
    [
        (
            LAYER,
            0.08,
            "removing 0.08 of 6 decoder layers rounds to none. 1 to 5 of them can go: budget.layers from 0.167",
        ),
        (LAYER, 0.95, "removing 0.95 of 6 decoder layers would leave none. 1 to 5 of them can go"),
        (
            FFN,
            0.95,
            "removing 0.95 of 6 FFN sub-layers would leave none. 1 to 5 of them can go: budget.ffn from 0.167 to",
        ),
        (
            ATTENTION,
            0.99,
            "would leave none. 1 to 5 of them can go: .*; the first layer of each type keeps its attention.",
        ),
    ],
)
def test_shares_that_round_to_nothing_or_everything_are_refused(kind: str, ratio: float, words: str) -> None:
    """The message says which shares work, and they do."""
    key = {LAYER: "layers", FFN: "ffn", ATTENTION: "attention"}[kind]
    with pytest.raises(PlanError, match=words):
        plan({kind: range(6)}, {key: ratio})
    for count in (1, 5):
        assert (
            counts(plan({kind: range(6)}, {key: count / 6}), GQA_GROUP if kind == ATTENTION else FFN_CHANNEL).count(0)
            == count
        )


def test_sub_layers_cannot_go_in_a_uniform_shape() -> None:
    """The stock configuration cannot say it; whole layers can."""
    with pytest.raises(PlanError, match="in shape: uniform only whole layers can go"):
        plan({FFN: range(6)}, {"ffn": 0.5}, "uniform")


def test_sub_layers_compete_per_parameter() -> None:
    """Equal scores: the larger sub-layer goes, because it saves more; twice the score for half the size stays."""
    assert ATTENTION_COST > FFN_COST
    geometry, shapes = deep()
    equal = scores_for({ATTENTION: [1.0] * 6, FFN: [1.0] * 6}).values
    assert [kind for kind, _ in removal_order(geometry, equal, [FFN, ATTENTION], shapes)] == [ATTENTION] * 6 + [FFN] * 6
    dear = scores_for({ATTENTION: [1.01 * ATTENTION_COST / FFN_COST] * 6, FFN: [1.0] * 6}).values
    assert removal_order(geometry, dear, [FFN, ATTENTION], shapes)[0] == (FFN, 5)
    made = plan(
        {ATTENTION: [9, 2, 1, 9, 9, 9], FFN: [9, 9, 9, 0.1, 9, 9]}, {"parameters": 3 * ATTENTION_COST / total(shapes)}
    )
    assert (made.removed_sublayers(ATTENTION), made.removed_sublayers(FFN)) == ((1, 2), (3,))


def test_blocks_alone_come_as_near_to_the_parameters_as_they_can() -> None:
    """One more layer goes where that is nearer; the plan says what was missed."""
    _, shapes = deep()
    layer = ATTENTION_COST + FFN_COST
    for wanted, gone in ((1.4, 1), (1.6, 2), (4.9, 5)):
        made = plan({LAYER: range(6)}, {"parameters": wanted * layer / total(shapes)}, "uniform")
        assert len(made.removed_layers) == gone
        assert made.notes[0].startswith("the budget asked for ")


@pytest.mark.parametrize(
    "kinds", [(LAYER, FFN_CHANNEL), (ATTENTION, FFN, GQA_GROUP, FFN_CHANNEL), (LAYER, GQA_GROUP, FFN_CHANNEL, FFN)]
)
@pytest.mark.parametrize("share", [0.15, 0.3, 0.5])
def test_channels_make_up_what_whole_blocks_round_away(kinds: tuple[str, ...], share: float) -> None:
    """Every kind gives the same share, blocks no more than it, and the sum is met to within a channel per layer."""
    geometry, shapes = deep()
    made = plan({kind: [3, 1, 4, 2, 6, 5] for kind in kinds}, {"parameters": share}, min_keep_ratio=0.01)
    removed = made.total_dense - made.total_pruned
    assert removed == pytest.approx(share * total(shapes), abs=CHANNEL_COST)
    ratio = equal_share(geometry, shapes, kinds, share * total(shapes))
    assert len(made.removed_layers) <= 6 * ratio + 1e-9 or LAYER not in kinds
    if LAYER in kinds:
        assert len(made.removed_layers) == int(6 * ratio + 1e-9)


def test_the_equal_share_is_the_same_for_every_kind() -> None:
    """Brute force: the share removed of layers, then of what is left, adds up to the parameters asked for."""
    geometry, shapes = deep()
    layers = total({name: shape for name, shape in shapes.items() if ".layers." in name})
    channels = 6 * 40 * CHANNEL_COST
    share = equal_share(geometry, shapes, [LAYER, FFN_CHANNEL], 0.4 * layers)
    assert share * layers + (1 - share) * share * channels == pytest.approx(0.4 * layers)
    plain = equal_share(geometry, shapes, [FFN_CHANNEL, GQA_GROUP], 1000.0)
    assert plain == 1000.0 / (channels + 6 * 6 * GROUP_COST)


def test_more_than_the_blocks_own_is_refused() -> None:
    """What they own is said."""
    with pytest.raises(PlanError, match=r"the units that may be cut \(attention\) own [\d,]+\. Lower the budget"):
        plan({ATTENTION: range(6)}, {"parameters": 0.7})


def test_a_budget_too_small_for_a_block_is_told() -> None:
    """Channels do it all, and a note says that no layer went."""
    made = plan({LAYER: range(6), FFN_CHANNEL: None}, {"parameters": 0.05}, "uniform")
    assert made.removed_layers == ()
    assert made.notes[0] == "no decoder layers go: the budget is too small for a whole one"


def test_channels_of_layers_that_go_do_not_count() -> None:
    """A share of channels is of those in the layers that stay."""
    made = plan(
        {LAYER: [0, 1, 2, 3, 4, 5], FFN_CHANNEL: None, GQA_GROUP: None},
        {"layers": 0.5, "channels": 0.25, "groups": 0.34},
        "uniform",
    )
    assert counts(made, FFN_CHANNEL) == [0, 0, 0, 30, 30, 30]
    assert counts(made, GQA_GROUP) == [0, 0, 0, 4, 4, 4]
    assert made.shape == "uniform"


def test_a_control_loses_as_many_blocks_but_others() -> None:
    """Numbers of each kind are those of the plan; the first layer keeps its attention; kept widths follow in order."""
    geometry, _ = deep()
    values: dict[str, Any] = {LAYER: [0, 9, 9, 9, 9, 9], ATTENTION: [9, 0, 9, 1, 9, 9], FFN_CHANNEL: None}
    made = plan(values, {"layers": 0.17, "attention": 0.2, "channels": 0.25})
    assert (made.removed_layers, made.removed_sublayers(ATTENTION)) == ((0,), (3,))
    mirrored = {kind: [-layer for layer in layers] for kind, layers in scores_for(values).values.items()}
    control = same_size_plan(made, Scores("reversed", {}, (), mirrored), geometry)
    assert (control.removed_layers, control.removed_sublayers(ATTENTION)) == ((5,), (4,))
    assert [n for n in counts(control, FFN_CHANNEL) if n] == [n for n in counts(made, FFN_CHANNEL) if n]
    assert control.layers[FFN_CHANNEL][0].keep[0] == 0, "the lowest-scored channels stay"


def test_a_control_of_two_pools_loses_as_many_of_each() -> None:
    """Layers that lost both sub-layers count with both."""
    geometry, _ = deep()
    values = {ATTENTION: [9, 9, 0, 1, 9, 9], FFN: [9, 0, 1, 9, 9, 9]}
    made = plan(values, {"attention": 0.34, "ffn": 0.34})
    other = scores_for({ATTENTION: [0, 1, 2, 3, 4, 5], FFN: [0, 1, 2, 3, 4, 5]})
    control = same_size_plan(made, other, geometry)
    assert counts(control, GQA_GROUP) == [6, 0, 0, 6, 6, 6]
    assert counts(control, FFN_CHANNEL) == [0, 0, 40, 40, 40, 40]


def test_what_was_edited_by_hand_stays_in_a_control() -> None:
    """Blocks of kinds without scores go where the plan says."""
    geometry, _ = deep()
    made = plan({LAYER: range(6)}, {"layers": 0.34})
    channels = scores_for({FFN_CHANNEL: None})
    assert same_size_plan(made, channels, geometry).removed_layers == made.removed_layers


def test_a_cut_never_leaves_nothing() -> None:
    """The last layer does not go, neither at once nor by its sub-layers."""
    geometry, _ = deep()
    cut = BlockCut(geometry)
    assert cut.is_empty
    assert cut.take_first([(LAYER, layer) for layer in range(6)], 6) == 5
    assert cut.left(LAYER) == [5]
    assert cut.take_first([(FFN, 5), (ATTENTION, 5), (FFN, 0)], 3) == 1
    assert (cut.left(FFN), cut.left(ATTENTION)) == ([], [5])


def test_costs_are_those_of_the_modules_that_go(family: Any) -> None:
    """Counted on a real model of every family: all parameters under the block's modules, and what a plan leaves."""
    model = pico_model(family)
    geometry = geometry_of(model, family)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for kind in (ATTENTION, FFN, LAYER):
        modules = geometry.block_modules(kind, 1)
        held = sum(p.numel() for module in modules for p in model.get_submodule(module).parameters())
        assert block_cost(geometry, kind, shapes)[1] == held > 0
    layer = [sum(block_cost(geometry, kind, shapes)) for kind in (ATTENTION, FFN, LAYER)]
    assert layer[0] + layer[1] <= layer[2]
    removed = {kind: [0, geometry.axes[kind][1].num_units] for kind in (FFN_CHANNEL, GQA_GROUP)}
    left = parameters_after(shapes, geometry, removed)
    assert sum(left.values()) == total(shapes) - block_cost(geometry, LAYER, shapes)[1]
    assert torch.tensor(list(left.values())).min() >= 0
