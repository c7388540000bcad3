"""Tells a training that went wrong from one that is merely noisy, by its loss at every step; pure."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

WINDOW = 8
"""Steps whose median loss is compared; the median lets single hard batches pass."""
TIMES = 3.0
NATS = 2.0
"""A training has exploded where the median is both this many times and this many nats above the first steps' median.

A loss in nats per token starts at a few and is bounded in practice by that of guessing, about 11; a distillation loss
starts below one. Both conditions together leave out the small loss that triples and the large one that rises by two.
"""


class LossMonitor:
    """Watches the loss per learned token."""

    def __init__(self, first: Sequence[float] = (), recent: Sequence[float] = ()) -> None:
        self._first, self._recent = [*first], [*recent]

    def add(self, loss: float) -> str | None:
        """Take in one step's loss and return what is wrong with the training, or None."""
        if not math.isfinite(loss):
            return f"the training loss is {loss}"
        if len(self._first) < WINDOW:
            self._first.append(loss)
        self._recent = [*self._recent, loss][-WINDOW:]
        begun, now = statistics.median(self._first), statistics.median(self._recent)
        if len(self._recent) == WINDOW and now > TIMES * begun and now > begun + NATS:
            return f"the training loss rose from {begun:.3f} to {now:.3f} nats per token"
        return None

    def to_dict(self) -> dict[str, Any]:
        """Return what it has seen as plain data."""
        return {"first": self._first, "recent": self._recent}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LossMonitor:
        """Return the monitor that ``to_dict`` wrote."""
        return cls(data["first"], data["recent"])
