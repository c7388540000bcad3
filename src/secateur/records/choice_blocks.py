"""Multiple-choice questions as token blocks: what the corpus room hands over to be measured.

A row is a prompt and one choice after it, and counts as a document: ``BlockBatch.document`` is its index, and only the
tokens of the choice are predicted. Choices that differ in their last token alone share a row, because what comes before
that token is all that the model needs to read: "A", "B", "C" and "D" cost one row.

Rows of one question may be branches: then the prompt's tokens but the last lie before them once, as a document of their
own whose index is beyond those of rows, and a row is its prompt's last token and the choice, at their positions in the
whole. A row's first token at a position above 0 says so.

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

    @property
    def choice_starts(self) -> Int64[Tensor, " rows"]:
        """For each row, the position of its choice's first token."""

    @property
    def scores_whole(self) -> bool:
        """Whether the prompts' tokens are predicted too; then rows are not branches."""

    @property
    def overlaps(self) -> Sequence[float]:
        """For each question, how likely whoever goes by words in common with it is right."""

    @property
    def subjects(self) -> Sequence[str]:
        """For each question, its subject; empty where none has one."""
