"""One of several processes that do a piece of work together: its number, how many there are, and what they tell.

Nothing here starts or connects processes; whoever does hands a ``Ranks`` to the work, and ``ALONE`` is one process.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Ranks(Protocol):
    """The processes of a run, seen from one of them."""

    @property
    def rank(self) -> int:
        """The number of this process, from 0; process 0 is the one that writes."""

    @property
    def world_size(self) -> int:
        """How many processes there are."""

    def exchange(self, value: Any) -> list[Any]:
        """Return what every process gave, in their order; all of them must call it, and it waits for them."""


@dataclass(frozen=True, slots=True)
class Alone:
    """A process by itself."""

    rank: int = 0
    world_size: int = 1

    def exchange(self, value: Any) -> list[Any]:
        """Return the value alone."""
        return [value]


ALONE = Alone()
