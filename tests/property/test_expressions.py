"""The family files' expressions mean what Python says they mean."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.errors import FamilyError
from secateur.families.schema import evaluate

NAMES = {"units": 3, "q_per_kv": 2, "head_dim": 8, "hidden_size": 48, "x1": 1}
factors = st.sampled_from([*NAMES, "0", "1", "7", "12"])
spaces = st.sampled_from(["", " ", "  "])


@st.composite
def sums_of_products(draw: st.DrawFn) -> str:
    """Return a random sum of products, spaced at random."""
    terms = draw(st.lists(st.lists(factors, min_size=1, max_size=4), min_size=1, max_size=4))
    space = draw(spaces)
    return draw(spaces) + f"{space}+{space}".join(f"{space}*{space}".join(term) for term in terms) + draw(spaces)


@given(sums_of_products())
def test_sums_of_products_equal_pythons(expression: str) -> None:
    """Any sum of products has the value that Python gives it."""
    assert evaluate(expression, NAMES) == eval(expression, {}, dict(NAMES))


@given(st.lists(st.tuples(st.sampled_from("*/"), factors), max_size=4), factors)
def test_exact_divisions_equal_pythons_and_others_are_refused(rest: list[tuple[str, str]], first: str) -> None:
    """Left to right, every step whole, or an error: never a rounded size."""
    value, expression, whole = int(NAMES.get(first, first) if first in NAMES else first), first, True
    for operator, factor in rest:
        number = NAMES[factor] if factor in NAMES else int(factor)
        expression += f" {operator} {factor}"
        if operator == "*":
            value *= number
        elif number == 0 or value % number:
            whole = False
            break
        else:
            value //= number
    if whole:
        assert evaluate(expression, NAMES) == value
    else:
        with pytest.raises(FamilyError, match="not a whole number"):
            evaluate(expression, NAMES)


@given(st.text(alphabet="ux1 *+/-(.", max_size=8))
def test_any_text_gives_a_number_or_a_family_error(text: str) -> None:
    """No text makes the reader fail in another way."""
    try:
        assert isinstance(evaluate(text, {"u": 1, "x": 2, "x1": 3}), int)
    except FamilyError:
        pass
