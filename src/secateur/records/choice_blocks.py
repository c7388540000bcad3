"""Multiple-choice questions as token blocks: what the corpus room hands over to be measured.

A row is a prompt and one choice after it, and counts as a document: ``BlockBatch.document`` is its index, and only the
tokens of the choice are predicted. Choices that differ in their last token alone share a row, because what comes before
that token is all that the model needs to read: "A", "B", "C" and "D" cost one row.

Dims: ``rows`` rows; ``endings`` most choices that share a row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from jaxtyping import Int64
from torch import Tensor

from secateur.records.blocks import TokenBlocks


@runtime_checkable
class ChoiceBlocks(TokenBlocks, Protocol):
    """A set of multiple-choice questions, tokenized and packed; its documents are rows."""

    @property
    def last_ids(self) -> Int64[Tensor, "rows endings"]:
        """The last token of each choice of a row; the first is the one in the block, and fills up what is left."""

    @property
    def places(self) -> Sequence[Sequence[tuple[int, int]]]:
        """For each question and each of its choices, (row, column of ``last_ids``)."""

    @property
    def answers(self) -> Sequence[int]:
        """For each question, which choice is right."""

    @property
    def choice_bytes(self) -> Sequence[Sequence[int]]:
        """For each question, the UTF-8 bytes of each choice's text."""

    @property
    def num_truncated(self) -> int:
        """Questions whose prompt was cut at its start to fit."""
