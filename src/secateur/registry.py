"""Names to objects, with refusals a person can act on; not a plugin system and not a cache."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Generic, TypeVar

from secateur.errors import ConfigError, SecateurError

T = TypeVar("T")


def unknown_name(kind: str, name: object, known: Iterable[str]) -> str:
    """Return the message for a name that is not known: the nearest one, then all of them."""
    names = sorted(known)
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"unknown {kind} {name!r}.{hint} Known: {', '.join(names)}."


class Registry(Mapping[str, T], Generic[T]):
    """A mapping that refuses duplicates and, for unknown names, lists and suggests the known ones.

    Args:
        kind: what the objects are, for messages ("method").
        error: the exception raised for an unknown name.
    """

    def __init__(self, kind: str, error: type[SecateurError] = ConfigError) -> None:
        self.kind = kind
        self._error = error
        self._items: dict[str, T] = {}

    def add(self, name: str, item: T) -> T:
        """Store ``item`` under ``name`` and return it; a name taken twice is our own bug."""
        if name in self._items:
            raise ValueError(f"{self.kind} {name!r} is registered twice")
        self._items[name] = item
        return item

    def __getitem__(self, name: str) -> T:
        try:
            return self._items[name]
        except KeyError:
            raise self._error(unknown_name(self.kind, name, self._items)) from None

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._items))

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, name: object) -> bool:
        return name in self._items
