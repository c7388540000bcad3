"""Every way to call a registered method, read from its signature."""

from __future__ import annotations

import inspect
from itertools import product
from typing import Any, Literal, get_args, get_origin, get_type_hints

from secateur.score import METHODS


def variants(name: str) -> list[dict[str, Any]]:
    """Return every combination of a method's options whose values are listed in its signature."""
    function = METHODS[name].function
    hints = get_type_hints(function)
    options = [p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]
    listed = {option: get_args(hints[option]) for option in options if get_origin(hints[option]) is Literal}
    return [dict(zip(listed, values, strict=True)) for values in product(*listed.values())]
