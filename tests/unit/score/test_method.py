"""Registering a method, and checking its options from its signature."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from jaxtyping import Float64
from torch import Tensor

from secateur.errors import ConfigError
from secateur.score.method import METHODS, Evidence, Method, register


def scored(
    evidence: Evidence, /, *, at: Literal["here", "there"] = "here", power: float = 2.0, limit: int | None = None
) -> Float64[Tensor, " units"]:
    """Return nothing useful."""
    del at, power, limit
    return torch.zeros(evidence.num_units, dtype=torch.float64)


def plain(evidence: Evidence, /) -> Float64[Tensor, " units"]:
    """Return nothing useful, without options."""
    return torch.zeros(evidence.num_units, dtype=torch.float64)


WORDS = {name: "words" for name in ("measures", "formula", "needs", "cost", "caveat", "source")}
METHOD = Method("scored", scored, **WORDS, control=False)
PLAIN = Method("plain", plain, **WORDS, control=False)


@pytest.mark.parametrize("options", [{}, {"at": "there"}, {"power": 0.5, "limit": 3}, {"limit": None}])
def test_known_options_pass(options: dict[str, object]) -> None:
    """Listed values pass, and so do options whose values are not listed."""
    METHOD.check_options(options)


def test_an_unknown_option_suggests_the_nearest() -> None:
    """The method and its options are named."""
    with pytest.raises(ConfigError) as caught:
        METHOD.check_options({"powr": 3})
    assert str(caught.value) == (
        "unknown option of method scored 'powr'. Did you mean 'power'? Known: at, limit, power."
    )


def test_an_unknown_value_lists_the_known_ones() -> None:
    """The option, the method and the values are named."""
    with pytest.raises(ConfigError) as caught:
        METHOD.check_options({"at": "ther"})
    assert str(caught.value) == (
        "unknown value for option at of method scored 'ther'. Did you mean 'there'? Known: here, there."
    )


def test_a_method_without_options_says_so() -> None:
    """The message says what to remove."""
    with pytest.raises(ConfigError, match=r"method plain has no options; got 'at'. Remove prune\.options"):
        PLAIN.check_options({"at": "here"})


def test_registering_returns_the_function_unchanged() -> None:
    """The decorator only enrols; a second use of the name is refused."""
    try:
        assert register("a test method", **WORDS, control=True)(plain) is plain
        entry = METHODS["a test method"]
        assert (entry.function, entry.control, entry.formula) == (plain, True, "words")
        with pytest.raises(ValueError, match="registered twice"):
            register("a test method", **WORDS)(plain)
    finally:
        METHODS._items.pop("a test method", None)


def test_the_registered_methods_are_those_of_the_docs() -> None:
    """Importing the package enrols at least the paper's method, the baseline and the two controls."""
    assert {"contextual", "magnitude", "random", "reversed"} <= set(METHODS)
    assert {name for name in METHODS if METHODS[name].control} == {"random", "reversed"}
