"""Reads the family files once and answers which family a configuration belongs to."""

from __future__ import annotations

import sys
from functools import cache
from importlib import resources

from pydantic import ValidationError

from secateur.errors import FamilyError
from secateur.families.schema import Family
from secateur.registry import Registry, unknown_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

UNEVEN_PREFIX = "pruned_"
"""``model_type`` of a model with per-layer widths is this prefix and the dense family's model type."""


def parse_family(text: str, source: str) -> Family:
    """Return the family that a TOML text describes.

    Raises:
        FamilyError: not TOML, a key nobody reads, or a contradiction; the message names ``source``.
    """
    try:
        return Family.model_validate(tomllib.loads(text))
    except (tomllib.TOMLDecodeError, ValidationError) as error:
        raise FamilyError(f"family file {source}: {error}") from None


@cache
def families() -> Registry[Family]:
    """Return every family by name."""
    registry: Registry[Family] = Registry("model family", FamilyError)
    folder = resources.files("secateur.families") / "data"
    for entry in sorted(folder.iterdir(), key=lambda item: item.name):
        if entry.name.endswith(".toml"):
            family = parse_family(entry.read_text(encoding="utf-8"), entry.name)
            registry.add(family.name, family)
    return registry


def dense_model_type(model_type: str) -> str:
    """Return the stock model type behind one of our uneven ones; others pass through."""
    return model_type.removeprefix(UNEVEN_PREFIX)


def is_supported(model_type: str) -> bool:
    """Return whether a family covers a configuration's ``model_type``."""
    return any(dense_model_type(model_type) in family.model_types for family in families().values())


def family_of(model_type: str) -> Family:
    """Return the family of a configuration's ``model_type``.

    Raises:
        FamilyError: no family covers it; the supported model types are listed.
    """
    by_type = {name: family for family in families().values() for name in family.model_types}
    dense = dense_model_type(model_type)
    if dense not in by_type:
        raise FamilyError(unknown_name("model type", model_type, by_type) + " A family is one TOML file: see docs.")
    return by_type[dense]
