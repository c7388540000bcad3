"""Records survive being written and read."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from secateur.errors import PlanError
from secateur.records.plan import LayerPlan, Plan, VocabularyPlan, format_ranges, parse_ranges
from secateur.records.units import LAYER_UNIT_KINDS

finite = st.floats(allow_nan=False, allow_infinity=False)
names = st.text(min_size=1, max_size=8)
kept_units = st.sets(st.integers(0, 60), min_size=1).map(lambda units: tuple(sorted(units)))


@st.composite
def layers(draw: st.DrawFn, num_kept: int | None = None) -> dict[str, Any]:
    """Return the fields of any layer plan that is not refused."""
    sizes = {} if num_kept is None else {"min_size": num_kept, "max_size": num_kept}
    keep = draw(st.sets(st.integers(0, 40), **{"min_size": 1, **sizes}))
    return {
        "num_units": draw(st.integers(max(keep) + 1, 50)),
        "keep": tuple(sorted(keep)),
        "constants": tuple(draw(st.lists(st.tuples(st.integers(0, 500), finite), max_size=3))),
        "lowest_kept": draw(st.none() | finite),
        "highest_removed": draw(st.none() | finite),
    }


@st.composite
def vocabularies(draw: st.DrawFn) -> dict[str, Any]:
    """Return the fields of any vocabulary plan that is not refused."""
    keep = tuple(sorted(draw(st.sets(st.integers(0, 300), min_size=1))))
    return {
        "num_tokens": draw(st.integers(keep[-1] + 1, 400)),
        "keep": keep,
        "rule": draw(st.dictionaries(names, finite, max_size=1)),
        "reasons": draw(st.dictionaries(names, st.integers(0, 300), max_size=3)),
        "counted_tokens": draw(st.integers(0, 10**12)),
        "covered_ratio": draw(st.floats(0, 1)),
        "tokenizer_fingerprint": draw(names),
    }


@st.composite
def plans(draw: st.DrawFn) -> dict[str, Any]:
    """Return the fields of any plan that is not refused, its layers as fields too."""
    shape = draw(st.sampled_from(["uniform", "uneven"]))
    num_layers = draw(st.integers(1, 4))
    num_kept = {kind: draw(st.integers(1, 20)) if shape == "uniform" else None for kind in LAYER_UNIT_KINDS}
    return {
        "family": draw(names),
        "model_fingerprint": draw(names),
        "shape": shape,
        "method": draw(names),
        "options": draw(st.dictionaries(names, st.none() | st.booleans() | finite | names, max_size=3)),
        "budget": draw(st.dictionaries(names, finite | st.integers(0, 10**12), max_size=2)),
        "layers": {
            kind: [draw(layers(num_kept[kind])) for _ in range(num_layers)]
            for kind in draw(st.sets(st.sampled_from(LAYER_UNIT_KINDS)))
        },
        "parameters_dense": draw(st.dictionaries(names, st.integers(0, 10**12), max_size=3)),
        "parameters_pruned": draw(st.dictionaries(names, st.integers(0, 10**12), max_size=3)),
        "vocabulary": draw(st.none() | vocabularies()),
        "calibrated_on": tuple(draw(st.lists(names, max_size=3))),
        "calibration_tokens": draw(st.integers(0, 10**12)),
        "notes": tuple(draw(st.lists(st.text(), max_size=3))),
    }


@given(plans())
def test_plans_survive_plain_data_and_json(fields: dict[str, Any]) -> None:
    """from_dict(to_dict(x)) == x, and through the text of a JSON file as well."""
    layers = {kind: tuple(LayerPlan(**layer) for layer in per_layer) for kind, per_layer in fields["layers"].items()}
    vocabulary = fields["vocabulary"] and VocabularyPlan(**fields["vocabulary"])
    plan = Plan(**{**fields, "layers": layers, "vocabulary": vocabulary})
    assert Plan.from_dict(plan.to_dict()) == plan
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@given(kept_units)
def test_ranges_survive_being_written(units: tuple[int, ...]) -> None:
    """Written ranges read back as the same units, in the fewest ranges."""
    text = format_ranges(units)
    assert parse_ranges(text) == units
    assert len(text.split()) == sum(unit - 1 not in units for unit in units)


@given(st.text(alphabet="0123 -", max_size=10))
def test_any_text_is_a_list_of_units_or_a_plan_error(text: str) -> None:
    """Whatever a person types, the answer is indices or an explanation."""
    try:
        units = parse_ranges(text)
    except PlanError as error:
        assert "write for example 0-4 6 9-11" in str(error)
    else:
        assert all(isinstance(unit, int) and unit >= 0 for unit in units)
