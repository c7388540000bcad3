"""Registries: names to objects, with refusals that help."""

from __future__ import annotations

import pytest

from secateur.errors import ConfigError, FamilyError
from secateur.registry import Registry, unknown_name


@pytest.fixture
def methods() -> Registry[int]:
    """A registry of two."""
    registry: Registry[int] = Registry("method")
    registry.add("random", 2)
    registry.add("contextual", 1)
    return registry


def test_what_was_added_is_found(methods: Registry[int]) -> None:
    """A registry reads as a mapping, in sorted order."""
    assert methods["contextual"] == 1
    assert dict(methods) == {"contextual": 1, "random": 2}
    assert list(methods) == ["contextual", "random"]
    assert len(methods) == 2
    assert "random" in methods
    assert "randon" not in methods


def test_add_returns_the_item() -> None:
    """Adding can be part of an expression."""
    assert Registry("thing").add("a", "item") == "item"


def test_an_unknown_name_suggests_the_nearest_and_lists_all(methods: Registry[int]) -> None:
    """A typo is answered with the name that was meant."""
    with pytest.raises(ConfigError) as caught:
        methods["contextaul"]
    assert str(caught.value) == "unknown method 'contextaul'. Did you mean 'contextual'? Known: contextual, random."
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_a_name_unlike_any_other_is_not_guessed_at() -> None:
    """No suggestion is better than a wrong one; names that are not strings are shown too."""
    assert unknown_name("unit", "zzz", ["b", "a"]) == "unknown unit 'zzz'. Known: a, b."
    assert unknown_name("unit", 3, ["b", "a"]) == "unknown unit 3. Known: a, b."


def test_the_exception_is_the_registrys_own() -> None:
    """A family that is not known is a FamilyError."""
    registry: Registry[int] = Registry("model family", FamilyError)
    with pytest.raises(FamilyError, match="unknown model family 'bert'"):
        registry["bert"]


def test_a_name_taken_twice_is_refused(methods: Registry[int]) -> None:
    """Two methods cannot share a name; the first one stays."""
    with pytest.raises(ValueError, match="'random' is registered twice"):
        methods.add("random", 3)
    assert methods["random"] == 2
