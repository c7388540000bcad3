"""Token blocks laid by hand: what the corpus room would hand over, without files or a tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.records.blocks import BlockBatch


@dataclass
class HandMadeBlocks:
    """A ``TokenBlocks`` of given documents in given blocks.

    Attributes:
        texts: token ids of every document.
        rows: per block, the indices of the documents it holds, in order; they fit into ``block_size`` tokens.
        block_size: tokens per block; the rest of a row is padding.
        fingerprint: identifies the text.
    """

    texts: Sequence[Sequence[int]]
    rows: Sequence[Sequence[int]]
    block_size: int
    fingerprint: str = "hand-made"

    @property
    def documents(self) -> Tensor:
        """One made-up hash per document that is in a block."""
        return torch.tensor([1000 + document for document in sorted({d for row in self.rows for d in row})])

    @property
    def num_tokens(self) -> int:
        """Real tokens."""
        return sum(len(self.texts[document]) for row in self.rows for document in row)

    @property
    def num_blocks(self) -> int:
        """Blocks."""
        return len(self.rows)

    def batches(self, batch_size: int) -> Iterator[BlockBatch]:
        """Yield batches of at most ``batch_size`` blocks."""
        for first in range(0, len(self.rows), batch_size):
            yield lay_blocks(self.texts, self.rows[first : first + batch_size], self.block_size)


def lay_blocks(
    texts: Sequence[Sequence[int]], rows: Sequence[Sequence[int]], block_size: int, padding_id: int = 0
) -> BlockBatch:
    """Return one batch: each row's documents one after another, then padding as a run of its own."""
    shape = (len(rows), block_size)
    input_ids, positions = torch.full(shape, padding_id), torch.zeros(shape, dtype=torch.int64)
    document = torch.full(shape, -1)
    piece_bytes = []
    for row, indices in enumerate(rows):
        start = 0
        for index in indices:
            stop = start + len(texts[index])
            input_ids[row, start:stop] = torch.tensor(list(texts[index]))
            positions[row, start:stop] = torch.arange(stop - start)
            document[row, start:stop] = index
            piece_bytes.append((index, stop - start - 1))
            start = stop
        assert start <= block_size, "the documents of a row do not fit"
        positions[row, start:] = torch.arange(block_size - start)
    valid = document >= 0
    return BlockBatch(input_ids, positions, valid, document, valid & (positions > 0), tuple(piece_bytes))


def random_documents(lengths: Sequence[int], vocab_size: int = 97, seed: int = 0) -> list[list[int]]:
    """Return documents of random token ids, of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, vocab_size, (length,), generator=generator).tolist() for length in lengths]


def hand_made_blocks(vocab_size: int = 97, seed: int = 0) -> HandMadeBlocks:
    """Return seven documents in four blocks of 16 tokens, some padded, one full, one holding a single document."""
    texts = random_documents([5, 9, 16, 3, 4, 6, 7], vocab_size, seed)
    return HandMadeBlocks(texts, [[0, 1], [2], [3, 4, 5], [6]], 16)
