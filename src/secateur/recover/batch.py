"""What an objective is given: a batch of training blocks, and which of their tokens are learned.

Dims: ``batch`` blocks, ``seq`` tokens per block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Bool, Float, Int64
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """A batch of packed training blocks, on the model's device.

    Attributes:
        input_ids: token ids; padding holds an arbitrary valid id.
        position_ids: position within the piece, from 0; restarts mark piece boundaries, as in ``BlockBatch``.
        learned: which tokens are learned, each from the position before it; never the first of a piece.
        index: place of each block among all training blocks, the same in every epoch.
    """

    input_ids: Int64[Tensor, "batch seq"]
    position_ids: Int64[Tensor, "batch seq"]
    learned: Bool[Tensor, "batch seq"]
    index: Int64[Tensor, " batch"]

    @property
    def num_learned(self) -> int:
        """Learned tokens in the batch."""
        return int(self.learned.sum())


@runtime_checkable
class Objective(Protocol):
    """What a training lowers."""

    name: str
    """For records and messages."""

    def __call__(self, model: Any, batch: TrainingBatch) -> Float[Tensor, ""]:
        """Return the loss summed over the batch's learned tokens, in float32 and with its graph."""
