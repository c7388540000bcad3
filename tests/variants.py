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
    listed = {option: values for option in options if (values := _values(hints[option]))}
    return [dict(zip(listed, chosen, strict=True)) for chosen in product(*listed.values())]


def _values(hint: Any) -> tuple[Any, ...]:
    """Return the values that an annotation lists; both for a flag."""
    if hint is bool:
        return (False, True)
    return get_args(hint) if get_origin(hint) is Literal else ()
