"""Token blocks: what the corpus room hands to every stage that runs a model.

A block is a row of exactly ``seq`` tokens holding whole pieces of documents one after another. Positions restart at
every piece and attention never crosses from one piece to another, so a document's numbers do not depend on its
neighbours, on the batch size or on the order of blocks. Padding is a piece of its own that nobody counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Bool, Int64
from torch import Tensor


@dataclass(frozen=True, slots=True)
class BlockBatch:
    """A batch of packed blocks.

    Attributes:
        input_ids: token ids; padding holds an arbitrary valid id.
        position_ids: position within the piece, from 0; restarts mark piece boundaries.
        valid: False on padding.
        document: index of the piece's document within the run of blocks; -1 on padding.
        predicted: which tokens' losses count: real ones that are not context. The first token of a piece never is,
            because nothing comes before it.
        piece_bytes: for each piece in turn, (document, UTF-8 bytes of the piece's predicted text).
    """

    input_ids: Int64[Tensor, "batch seq"]
    position_ids: Int64[Tensor, "batch seq"]
    valid: Bool[Tensor, "batch seq"]
    document: Int64[Tensor, "batch seq"]
    predicted: Bool[Tensor, "batch seq"]
    piece_bytes: tuple[tuple[int, int], ...]

    @property
    def num_tokens(self) -> int:
        """Real tokens in the batch."""
        return int(self.valid.sum())


@runtime_checkable
class TokenBlocks(Protocol):
    """A split of a corpus, tokenized and packed; iterating runs over it once, from the start."""

    fingerprint: str
    """Identifies the text and the tokenizer."""
    documents: Int64[Tensor, " documents"]
    """63-bit hashes of its documents, in document-index order."""
    num_tokens: int
    """Real tokens in total."""
    num_blocks: int
    """Blocks in total."""

    def batches(self, batch_size: int) -> Iterator[BlockBatch]:
        """Yield batches of at most ``batch_size`` blocks."""
