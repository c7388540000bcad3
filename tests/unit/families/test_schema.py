"""Family files: their little expressions, and their refusal of keys that nobody reads."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from secateur.errors import FamilyError
from secateur.families.schema import Axis, Dimension, Divisor, Family, Output, evaluate

NAMES = {"units": 3, "q_per_kv": 2, "head_dim": 8, "hidden_size": 48, "zero": 0}


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("7", 7),
        ("units", 3),
        ("units * q_per_kv", 6),
        ("units*q_per_kv*head_dim", 48),
        (" hidden_size / head_dim ", 6),
        ("hidden_size / head_dim / q_per_kv", 3),
        ("hidden_size / q_per_kv * units", 72),
        ("units + q_per_kv * head_dim + 1", 20),
        ("4 * hidden_size + zero", 192),
        ("zero * units", 0),
    ],
)
def test_expressions_are_sums_of_products(expression: str, value: int) -> None:
    """Products bind tighter than sums, and division is exact, left to right."""
    assert evaluate(expression, NAMES) == value


@pytest.mark.parametrize(
    "expression",
    ["", "  ", "+", "*", "units +", "+ units", "units * ", "units units", "2 3", "2units", "units ** 2", "units + + 1",
     "units - 1", "(units)", "units // 2", "1.5", "units * + 1", "/ 2", "units, 1"],
)  # fmt: skip
def test_anything_else_is_refused_with_the_expression(expression: str) -> None:
    """A malformed expression is quoted in full."""
    with pytest.raises(FamilyError) as caught:
        evaluate(expression, NAMES)
    assert str(caught.value) == f"cannot read the expression {expression!r}"


def test_an_unknown_name_lists_the_known_ones() -> None:
    """A dimension that the family does not declare is named, with those that it does."""
    with pytest.raises(FamilyError, match=r"units \* heads: heads is not a dimension of this model; known: head_dim, "):
        evaluate("units * heads", NAMES)


@pytest.mark.parametrize("expression", ["hidden_size / 5", "units / zero", "7 / 2 * 2"])
def test_a_division_with_a_remainder_is_refused(expression: str) -> None:
    """Sizes are whole; nothing is rounded in silence, and nothing divides by zero."""
    with pytest.raises(FamilyError, match="is not a whole number"):
        evaluate(expression, NAMES)


def test_short_forms() -> None:
    """A dimension may be only its key, an output only its module."""
    assert Dimension.model_validate("n_embd") == Dimension(config="n_embd")
    assert Output.model_validate("mlp.c_fc") == Output(module="mlp.c_fc", offset="0")


@pytest.mark.parametrize(
    "fields",
    [{}, {"config": "a", "value": "b"}, {"default": "b"}, {"value": "b", "default": "c"}],
    ids=["nothing", "both", "only a default", "a default nobody reads"],
)
def test_a_dimension_has_one_source(fields: dict[str, str]) -> None:
    """Read from a key (with a default, perhaps) or derived; never both, and no default that is never used."""
    with pytest.raises(ValidationError, match="either a config key or a value"):
        Dimension(**fields)


CUT = {"members": [{"module": "mlp.up", "side": "out"}], "config": {"intermediate_size": "units"}}
AXIS = {"name": "ffn_channel", "count": "intermediate_size", "reader": "mlp.down"}


def test_an_axis_is_cut_or_fixed() -> None:
    """Either weight slices with configuration keys, or a reason."""
    assert Axis.model_validate({**AXIS, **CUT}).fixed is None
    assert Axis.model_validate({**AXIS, "fixed": "because"}).members == ()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {**CUT, "fixed": "because"},
        {"members": CUT["members"]},
        {"config": CUT["config"], "fixed": "because"},
        {"fixed": "because", "divisor": {"number": "units", "of": "hidden_size"}},
        {"fixed": "because", "per_group": "2"},
        {"fixed": ""},
    ],
    ids=[
        "neither",
        "both",
        "no config",
        "config of a fixed axis",
        "divisor of a fixed axis",
        "groups of a fixed axis",
        "no reason",
    ],
)
def test_an_axis_that_contradicts_itself_is_refused(fields: dict[str, object]) -> None:
    """Half of a description, or keys that nobody would read, are errors."""
    with pytest.raises(ValidationError, match="an axis has members and config to cut, or says in `fixed`"):
        Axis.model_validate({**AXIS, **fields})


def test_an_unknown_unit_kind_is_refused() -> None:
    """The known kinds are listed."""
    with pytest.raises(ValidationError, match="unknown unit kind 'neuron'; known: ffn_channel, gqa_group, query_head"):
        Axis.model_validate({**AXIS, **CUT, "name": "neuron"})


FFN = {**AXIS, **CUT}
HEADS = {"name": "gqa_group", "count": "num_attention_heads", "reader": "attn.o", "fixed": "because of the names"}
QUERIES = {**HEADS, "name": "query_head"}
SIZES = {
    "num_layers": "depth",
    "vocab_size": "vocab_size",
    "intermediate_size": "ffn",
    "num_attention_heads": "heads",
}
BLOCKS: dict[str, object] = {"attention": {"modules": ["attn"], "norms": ["norm"]}, "ffn": {"modules": ["mlp"]}}
FAMILY = {
    "name": "toy",
    "model_types": ["toy"],
    "layers": "model.layers",
    "vocabulary": ["model.embed_tokens", "lm_head"],
    "dimensions": SIZES,
    "parts": {"ffn": ["mlp"]},
    "blocks": BLOCKS,
    "axes": [FFN, HEADS, QUERIES],
}


def test_a_complete_family_is_accepted() -> None:
    """Layout and packing have defaults."""
    family = Family.model_validate(FAMILY)
    assert (family.weight_layout, family.packing) == ("out_in", "positions")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"parts": {"mlp": ["mlp"]}}, "unknown parts"),
        ({"axes": [FFN]}, "a family describes each of ffn_channel, gqa_group, query_head once, .* got ffn_channel"),
        ({"axes": [FFN, HEADS, HEADS, QUERIES]}, "got ffn_channel, gqa_group, gqa_group"),
        (
            {"axes": [{**FFN, "count": "ffn"}, HEADS, QUERIES]},
            "axis ffn_channel counts ffn, which is not under .dimensions.",
        ),
        ({"vocabulary": []}, "a family names its vocabulary modules"),
        ({"dimensions": {**SIZES, "vocab_size": {"value": "7"}}}, "the configuration key of vocab_size"),
        ({"dimensions": {**SIZES, "num_layers": {"value": "7"}}}, "the configuration key of num_layers"),
        ({"blocks": {"attention": {"modules": ["attn"]}}}, "blocks.ffn"),
        ({"blocks": {**BLOCKS, "ffn": {"modules": []}}}, "at least 1 item"),
        ({"blocks": {**BLOCKS, "ffn": {"modules": ["mlp"], "norm": "x"}}}, "Extra inputs are not permitted"),
        ({"blocks": {**BLOCKS, "layer_types": "types"}}, "layer_types names 'types', which is not one of the lists"),
        ({"blocks": {**BLOCKS, "fixed": [{"units": ["head"], "reason": "x"}]}}, r"unknown unit kinds \['head'\]"),
        ({"blocks": {**BLOCKS, "fixed": [{"units": ["ffn"]}]}}, "blocks.fixed.0.reason"),
        ({"packing": "guess"}, "'positions' or 'mask'"),
        ({"weight_layout": "rows"}, "'out_in' or 'in_out'"),
    ],
)
def test_an_incomplete_family_is_refused(changes: dict[str, object], words: str) -> None:
    """Every contradiction is named."""
    with pytest.raises(ValidationError, match=words):
        Family.model_validate({**FAMILY, **changes})


def test_records_are_frozen() -> None:
    """Model knowledge does not change while a program runs."""
    divisor = Divisor(number="units", of="hidden_size")
    with pytest.raises(ValidationError, match="frozen"):
        divisor.of = "x"  # type: ignore[misc]
