"""Configurations that older transformers read right: what they looked for elsewhere is written there too.

Before version 5 there was no ``rope_parameters``; a reader that does not find ``rope_theta`` takes a default without a
word, and computes something else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from secateur.families.schema import Family


def older_keys(config: Mapping[str, Any], family: Family) -> dict[str, Any]:
    """Return the keys to add to a configuration for readers older than transformers 5.

    Newer readers prefer ``rope_scaling`` to ``rope_parameters``, so it says the same.
    """
    keys = {older: config[newer] for older, newer in family.older_names.items() if newer in config}
    rope, names = config.get("rope_parameters"), family.older_rope
    if not isinstance(rope, Mapping):
        return keys
    found = {key: _at(rope, path) for key, path in names.keys.items()}
    keys |= {key: value for key, value in found.items() if value is not None}
    scaling = _at(rope, names.scaling) if names.scaling else rope
    if isinstance(scaling, Mapping) and scaling.get("rope_type", "default") != "default":
        full = {**scaling, "type": scaling["rope_type"]}
        keys["rope_scaling"] = {key: full[key] for key in names.scaling_keys or scaling}
    return keys


def _at(data: Mapping[str, Any], path: str) -> Any:
    """Return what is at a dotted path, or None."""
    found: Any = data
    for part in path.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found
