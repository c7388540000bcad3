"""Plans: records that refuse what cannot be applied and survive JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from secateur.errors import PlanError
from secateur.records.plan import LayerPlan, Plan, VocabularyPlan, composed, format_ranges, parse_ranges


def plan(**changes: Any) -> Plan:
    """Return a small uneven plan with some fields changed."""
    fields: dict[str, Any] = {
        "family": "llama",
        "model_fingerprint": "abc",
        "shape": "uneven",
        "method": "contextual",
        "options": {"at": "activation"},
        "budget": {"channels": 0.25},
        "layers": {
            "ffn_channel": (
                LayerPlan(4, (0, 2, 3), ((1, 0.25),), lowest_kept=0.5, highest_removed=0.25),
                LayerPlan(4, (1, 2)),
            )
        },
        "parameters_dense": {"ffn": 100, "embedding": 10},
        "parameters_pruned": {"ffn": 70, "embedding": 10},
        "calibrated_on": ("medical", "law"),
        "calibration_tokens": 1234,
        "notes": ("rounded",),
    }
    return Plan(**{**fields, **changes})


def as_json(**changes: Any) -> dict[str, Any]:
    """Return the plan as a JSON file would give it back, with some keys changed."""
    data: dict[str, Any] = json.loads(json.dumps(plan().to_dict()))
    return {**data, **changes}


def with_first_layer(**changes: Any) -> dict[str, Any]:
    """Return the plan as JSON data with some keys of the first layer changed."""
    data = as_json()
    data["layers"]["ffn_channel"][0].update(changes)
    return data


def test_a_plan_survives_plain_data_and_json() -> None:
    """What was written is what is read, tuples and all."""
    assert Plan.from_dict(plan().to_dict()) == plan()
    assert Plan.from_dict(as_json()) == plan()


@pytest.mark.parametrize(
    ("units", "text"),
    [((), ""), ((3,), "3"), ((0, 1), "0-1"), ((0, 1, 2, 3, 4, 6, 9, 10, 11), "0-4 6 9-11"), ((8, 10, 12), "8 10 12")],
)
def test_kept_units_are_written_as_ranges(units: tuple[int, ...], text: str) -> None:
    """A diff of two plans is readable, and what is written is what is read."""
    assert format_ranges(units) == text
    assert parse_ranges(text) == units


def test_spacing_and_single_steps_do_not_matter() -> None:
    """A person may write ranges as they like."""
    assert parse_ranges("  0-2   3 4-4\n") == (0, 1, 2, 3, 4)


@pytest.mark.parametrize("text", ["a", "1-", "-1", "1,2", "1-2-3", "1.5", "0x1", "[0,", "4-2"])
def test_other_notations_are_refused_with_an_example(text: str) -> None:
    """What cannot be read is quoted; a backward range is a slip, not nothing."""
    with pytest.raises(PlanError, match=r"cannot read '.*' in a plan's kept units; write for example 0-4 6 9-11"):
        parse_ranges(text)


def test_totals_and_removals_are_counted() -> None:
    """Derived numbers follow from the record."""
    assert (plan().total_dense, plan().total_pruned) == (110, 80)
    assert [layer.num_removed for layer in plan().layers["ffn_channel"]] == [1, 2]


@pytest.mark.parametrize(
    ("keep", "words"),
    [
        ((0, 0), "kept units must be ascending, without repeats, between 0 and 3; got 2 from 0 to 0"),
        ((2, 1), "ascending"),
        ((-1, 2), "got 2 from -1 to 2"),
        ((1, 4), "got 2 from 1 to 4"),
    ],
)
def test_impossible_choices_are_refused(keep: tuple[int, ...], words: str) -> None:
    """Kept units are ascending, distinct and in range."""
    with pytest.raises(PlanError, match=words):
        LayerPlan(4, keep)


def test_a_layer_may_keep_everything() -> None:
    """Keeping all units of a layer is a plan."""
    assert LayerPlan(2, (0, 1)).num_removed == 0


def test_unknown_unit_kinds_and_shapes_are_refused() -> None:
    """The known ones are listed."""
    with pytest.raises(PlanError, match=r"unknown unit kinds \['neuron'\]; known: ffn_channel, gqa_group"):
        plan(layers={"neuron": (LayerPlan(2, (0,)),)})
    with pytest.raises(PlanError, match="shape 'ragged'; known: uniform, uneven"):
        plan(shape="ragged")


def test_uniform_means_the_same_number_everywhere() -> None:
    """Uneven widths contradict shape uniform; different units of the same number do not."""
    with pytest.raises(PlanError, match="keeps between 2 and 3 ffn_channels per layer; set shape to uneven"):
        plan(shape="uniform")
    assert plan(shape="uniform", layers={"ffn_channel": (LayerPlan(4, (0, 1)), LayerPlan(4, (2, 3)))})


def blocks(ffn: str, groups: str, **changes: Any) -> Plan:
    """Return a plan that keeps of each layer all (``x``) or nothing (``.``), or never had the sub-layer (``0``)."""
    kept = {"x": LayerPlan(2, (0, 1)), ".": LayerPlan(2, ()), "0": LayerPlan(0, ()), "1": LayerPlan(2, (1,))}
    kinds = {"ffn_channel": ffn, "gqa_group": groups}
    return plan(layers={kind: tuple(kept[mark] for mark in marks) for kind, marks in kinds.items()}, **changes)


def test_a_layer_without_units_goes_and_a_sub_layer_without_units_too() -> None:
    """Nothing kept of both kinds is a removed layer; of one kind a removed sub-layer; what was not there is neither."""
    made = blocks(ffn=".x.x0.", groups=".x.0xx")
    assert made.removed_layers == (0, 2)
    assert made.removed_sublayers("ffn") == (5,)
    assert made.removed_sublayers("attention") == ()
    assert blocks(ffn="x0", groups="..").removed_layers == (1,)
    assert blocks(ffn="x0", groups="..").removed_sublayers("attention") == (0,)
    assert not made.narrows
    assert blocks(ffn="x1", groups="xx").narrows
    assert Plan.from_dict(json.loads(json.dumps(made.to_dict()))) == made


def test_one_kind_alone_removes_sub_layers_but_no_layer() -> None:
    """Without entries for the other kind, a layer that loses one sub-layer keeps the other."""
    made = plan(layers={"ffn_channel": (LayerPlan(2, ()), LayerPlan(2, (0,)))})
    assert (made.removed_layers, made.removed_sublayers("ffn"), made.removed_sublayers("attention")) == ((), (0,), ())


def test_a_uniform_plan_may_drop_layers_but_no_sub_layers() -> None:
    """The layers that stay must be alike."""
    assert blocks(ffn="x.x", groups="x.x", shape="uniform").removed_layers == (1,)
    with pytest.raises(PlanError, match=r"takes a sub-layer out of a layer that stays \(ffn_channels: none kept\)"):
        blocks(ffn="x.x", groups="xxx", shape="uniform")
    with pytest.raises(PlanError, match="keeps between 1 and 2 gqa_groups per layer"):
        blocks(ffn="x.x", groups="x.1", shape="uniform")


def test_something_must_stay_and_kinds_must_agree() -> None:
    """A plan without any layer is refused, and so are entries for different numbers of layers."""
    with pytest.raises(PlanError, match="plan removes all 2 layers; at least one must stay"):
        blocks(ffn="..", groups="..")
    with pytest.raises(PlanError, match="entries for 1 and 2 layers"):
        blocks(ffn="x", groups="xx")


@pytest.mark.parametrize("version", [None, 0, 1, 2, 4, "3"])
def test_another_schema_version_is_refused(version: object) -> None:
    """A plan of another time is not guessed at; the message says what to do."""
    with pytest.raises(PlanError, match=r"schema version .*; this secateur reads 3.*secateur plan"):
        Plan.from_dict(as_json(schema_version=version))


@pytest.mark.parametrize("key", ["family", "layers", "shape", "notes", "calibrated_on", "method"])
def test_a_missing_key_is_refused(key: str) -> None:
    """A file that lost a key is not a plan."""
    data = as_json()
    del data[key]
    with pytest.raises(PlanError, match=rf"not a plan that secateur wrote: .*{key}"):
        Plan.from_dict(data)


@pytest.mark.parametrize(
    "data",
    [
        as_json(surprise=1),
        as_json(layers={"ffn_channel": [{"keep": "0"}]}),
        as_json(layers={"ffn_channel": 3}),
        with_first_layer(num_units="4"),
        with_first_layer(keep=None),
        with_first_layer(keep=[0, 1]),
        with_first_layer(constants=[[1]]),
        with_first_layer(constants=[["a", 1.0]]),
    ],
    ids=["unknown key", "short layer", "no layers", "a string", "null", "a list", "half a pair", "no channel"],
)
def test_a_plan_edited_into_nonsense_is_refused(data: dict[str, Any]) -> None:
    """Wrong types never get as far as the weights."""
    with pytest.raises(PlanError, match=r"not a plan that secateur wrote|cannot read"):
        Plan.from_dict(data)


def test_an_edit_that_contradicts_itself_says_how() -> None:
    """The record's own message is not swallowed."""
    with pytest.raises(PlanError, match="kept units must be ascending"):
        Plan.from_dict(with_first_layer(keep="1 0"))
    with pytest.raises(PlanError, match="set shape to uneven"):
        Plan.from_dict(as_json(shape="uniform"))


def test_an_edit_by_hand_is_applied() -> None:
    """A person may choose other units in the file."""
    edited = Plan.from_dict(with_first_layer(keep="0-1", constants=[]))
    assert edited.layers["ffn_channel"][0] == replace(plan().layers["ffn_channel"][0], keep=(0, 1), constants=())


@pytest.mark.parametrize("keep", [(), (3, 2), (2, 2), (-1, 2), (0, 5)])
def test_kept_token_ids_are_checked_like_units(keep: tuple[int, ...]) -> None:
    """Ascending, without repeats, inside the vocabulary, and never none."""
    with pytest.raises(PlanError, match="token ids"):
        VocabularyPlan(5, keep)


def test_kept_token_ids_are_written_as_ranges() -> None:
    """The plan's file stays readable, and a plan without a vocabulary says null."""
    written = plan(vocabulary=VocabularyPlan(10, (0, 1, 2, 7))).to_dict()
    assert written["vocabulary"]["keep"] == "0-2 7"
    assert Plan.from_dict(written).vocabulary == VocabularyPlan(10, (0, 1, 2, 7))
    assert plan().to_dict()["vocabulary"] is None


def test_two_cuts_are_one_cut_of_the_first_model() -> None:
    """Units, layers and token ids are numbered as in the model that the first plan was made for."""
    first_layers = {
        "ffn_channel": (LayerPlan(4, (0, 2, 3)), LayerPlan(4, ()), LayerPlan(4, (1, 2, 3))),
        "gqa_group": (LayerPlan(2, (0, 1)), LayerPlan(2, ()), LayerPlan(2, (0, 1))),
    }
    second_layers = {
        "ffn_channel": (LayerPlan(3, (1, 2)), LayerPlan(3, (0, 2))),
        "gqa_group": (LayerPlan(2, (1,)), LayerPlan(2, (0,))),
    }
    vocabulary = VocabularyPlan(6, (0, 2, 4, 5))
    first = Plan(
        "llama", "one", "uniform", "m", {}, {"parameters": 0.5}, first_layers, {"ffn": 9}, {"ffn": 7}, vocabulary
    )
    second = Plan(
        "llama", "two", "uniform", "m", {}, {}, second_layers, {"ffn": 7}, {"ffn": 5}, VocabularyPlan(4, (1, 3))
    )
    both = composed(first, second)
    assert [layer.keep for layer in both.layers["ffn_channel"]] == [(2, 3), (), (1, 3)]
    assert [layer.keep for layer in both.layers["gqa_group"]] == [(1,), (), (0,)]
    assert both.removed_layers == (1,) and both.vocabulary is not None and both.vocabulary.keep == (2, 5)
    assert (both.model_fingerprint, both.total_dense, both.total_pruned) == ("one", 9, 5)
    assert Plan.from_dict(both.to_dict()) == both


def test_cuts_that_do_not_follow_each_other_are_refused() -> None:
    first = Plan("llama", "", "uneven", "m", {}, {}, {"ffn_channel": (LayerPlan(4, (0, 2)),)}, {}, {})
    with pytest.raises(PlanError, match="is for 3 units in layer 0, and the first one leaves 2"):
        composed(first, replace(first, layers={"ffn_channel": (LayerPlan(3, (0,)),)}))
    with pytest.raises(PlanError, match="is for 2 layers, and the first one leaves 1"):
        composed(first, replace(first, layers={"ffn_channel": (LayerPlan(2, (0,)),) * 2}))
