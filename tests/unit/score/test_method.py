"""Registering a method, and checking its options from its signature."""

from __future__ import annotations

from typing import Annotated, Literal

import pytest
import torch
from jaxtyping import Float64
from pydantic import Field
from torch import Tensor

from secateur.errors import ConfigError
from secateur.records.masks import MaskSettings
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


def ranged(
    evidence: Evidence,
    /,
    *,
    share: Annotated[float, Field(ge=0.0)] = 0.0,
    flag: bool = False,
    count: Annotated[int, Field(ge=1)] | None = None,
    of: Annotated[str, METHODS] = "contextual",
) -> Float64[Tensor, " units"]:
    """Return nothing useful."""
    del share, flag, count, of
    return torch.zeros(evidence.num_units, dtype=torch.float64)


RANGED = Method("ranged", ranged, **WORDS)


@pytest.mark.parametrize(
    "options", [{"share": 0}, {"share": 2.5}, {"flag": True}, {"count": 1}, {"count": None}, {"of": "obs"}]
)
def test_values_of_the_annotated_type_and_range_pass(options: dict[str, object]) -> None:
    """Whole numbers are numbers, and None passes where it is meant to."""
    RANGED.check_options(options)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"share": -0.5}, "option share of method ranged should be greater than or equal to 0; got -0.5."),
        ({"share": "half"}, "option share of method ranged should be a valid number; got 'half'."),
        ({"share": True}, "option share of method ranged should be a valid number; got True."),
        ({"count": 0}, "option count of method ranged should be greater than or equal to 1; got 0."),
        ({"count": 1.5}, "option count of method ranged should be a valid integer; got 1.5."),
        ({"flag": "yes"}, "unknown value for option flag of method ranged 'yes'. Known: False, True."),
    ],
)
def test_other_values_are_refused_before_anything_runs(options: dict[str, object], words: str) -> None:
    """The option, the method, what it takes and what it got are named."""
    with pytest.raises(ConfigError) as caught:
        RANGED.check_options(options)
    assert str(caught.value) == words


def test_whether_gram_matrices_or_gradients_are_read_depends_on_the_methods_that_options_name() -> None:
    """A method reads them itself, or hands its evidence to one that does."""
    assert METHODS["obs"].gram and METHODS["obs"].reads_grams({})
    assert not METHODS["contextual"].gram and not METHODS["contextual"].reads_grams({})
    assert not METHODS["reversed"].gram and not METHODS["reversed"].reads_grams({})
    assert METHODS["reversed"].reads_grams({"of": "leverage"})
    assert not RANGED.reads_grams({"share": 1.0}) and RANGED.reads_grams({"of": "tyr"})
    assert METHODS["taylor"].reads_gradients({"order": "second"}) and not METHODS["taylor"].reads_grams({})
    assert not METHODS["obs"].reads_gradients({}) and not METHODS["reversed"].reads_gradients({})
    assert METHODS["reversed"].reads_gradients({"of": "fisher"})


def test_how_masks_are_trained_depends_on_the_options_of_the_method_that_reads_them() -> None:
    """Its own, with defaults; the defaults alone where another method names it; nothing for all others."""
    own = METHODS["learned_mask"].mask_settings({"target": 0.4, "objective": "kl"})
    assert own == MaskSettings(target=0.4, steps=200, learning_rate=0.3, objective="kl")
    named = METHODS["reversed"].mask_settings({"of": "learned_mask"})
    assert named == METHODS["learned_mask"].mask_settings({}) and named is not None and named.target == 0.25
    assert METHODS["fisher"].mask_settings({}) is None


def test_a_method_without_options_says_so() -> None:
    """The message says what to remove."""
    with pytest.raises(ConfigError, match=r"method plain has no options; got 'at'. Remove prune\.options"):
        PLAIN.check_options({"at": "here"})


def test_registering_returns_the_function_unchanged() -> None:
    """The decorator only enrols; a second use of the name is refused."""
    try:
        assert register("a test method", **WORDS, control=True, gram=True)(plain) is plain
        entry = METHODS["a test method"]
        assert (entry.function, entry.control, entry.gram, entry.formula) == (plain, True, True, "words")
        with pytest.raises(ValueError, match="registered twice"):
            register("a test method", **WORDS)(plain)
    finally:
        METHODS._items.pop("a test method", None)


def test_the_registered_methods_are_those_of_the_docs() -> None:
    """Importing the package enrols the paper's method, the baselines, the second-order methods and the two controls."""
    first_order = {"activation_norm", "contextual", "fluctuation", "magnitude", "wanda"}
    second_order = {"kfac", "leverage", "obs", "tyr"}
    assert first_order | second_order | {"random", "reversed"} <= set(METHODS)
    assert {name for name in METHODS if METHODS[name].control} == {"random", "reversed"}
    assert {name for name in METHODS if METHODS[name].gram} == second_order
