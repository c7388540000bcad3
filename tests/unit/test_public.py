"""The public surface: the names of ``secateur`` and nothing more."""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect

import pytest

import secateur
from secateur.errors import ExportError, SecateurError


def test_every_public_name_resolves() -> None:
    """What ``__all__`` promises is there, documented, and listed once in sorted order."""
    assert secateur.__all__ == sorted(set(secateur.__all__))
    for name in secateur.__all__:
        value = getattr(secateur, name)
        assert isinstance(value, str) or inspect.getdoc(value), name
    assert dir(secateur) == secateur.__all__


def test_rooms_do_not_hide_functions_of_the_same_name() -> None:
    """``secateur.shrink`` is the function also after the room ``secateur.shrink`` was imported, and both can be had."""
    for name in ("calibrate", "evaluate", "export", "shrink"):
        room = importlib.import_module(f"secateur.{name}")
        assert inspect.ismodule(room)
        assert inspect.isfunction(getattr(secateur, name))
        assert getattr(secateur, name).__module__ == "secateur.api"


def test_every_error_is_public() -> None:
    """Whoever calls the API can catch each of its errors by name."""
    kinds = [*SecateurError.__subclasses__(), *ExportError.__subclasses__()]
    errors = {error.__name__ for error in kinds if error.__module__ == "secateur.errors"}
    assert errors | {"SecateurError"} <= set(secateur.__all__)


def test_other_names_are_refused_as_in_any_module() -> None:
    """A typo is an AttributeError that names module and attribute."""
    with pytest.raises(AttributeError, match="module 'secateur' has no attribute 'prune'"):
        _ = secateur.prune


def test_the_version_is_the_packages() -> None:
    """One version number, in the code and in the package's metadata."""
    assert secateur.__version__ == importlib.metadata.version("secateur")
