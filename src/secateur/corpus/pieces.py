"""Pieces, runs of tokens of one document: how documents are cut into them and which block each goes to; pure."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int32

from secateur.corpus.places import TextSpan

MIN_PIECE_TOKENS = 2
"""A piece of one token predicts nothing, and its end would not show in the positions."""

OPEN_BLOCKS = 64
"""Blocks that may still take a piece while packing."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A run of tokens that is placed as a whole.

    Attributes:
        ids: token ids, the prefix included.
        document: index of its document.
        num_bytes: UTF-8 bytes of the text that its predicted tokens cover.
        num_prefix: leading ids that are not tokens of its own text.
        num_context: leading ids that are not predicted; at least 1.
        span: the text it covers, where that was kept.
        first_position: position of its first id; above 0 only for a branch, which reads the piece before it up to
            there and then goes on (``corpus.choices``).
    """

    ids: Int32[np.ndarray, " tokens"]
    document: int
    num_bytes: int
    num_prefix: int
    num_context: int
    span: TextSpan | None = None
    first_position: int = 0

    @property
    def own_ids(self) -> Int32[np.ndarray, " own"]:
        """The tokens of its own text."""
        return self.ids[self.num_prefix :]


def cut_document(num_tokens: int, num_prefix: int, block_size: int, max_tokens: int | None) -> list[tuple[int, int]]:
    """Return the (start, stop) of the pieces of a document, in its own tokens, without prefix.

    Args:
        num_tokens: tokens of the document.
        num_prefix: tokens put before every piece.
        block_size: most tokens of a piece, prefix included.
        max_tokens: most tokens of all pieces together, prefixes included; None for no limit.

    Returns:
        Pieces from the start of the document, without gaps; a last piece under ``MIN_PIECE_TOKENS`` is left out.
    """
    left = max_tokens
    pieces: list[tuple[int, int]] = []
    for start in range(0, num_tokens, block_size - num_prefix):
        room = block_size if left is None else min(block_size, left)
        stop = min(num_tokens, start + room - num_prefix)
        length = num_prefix + stop - start
        if stop <= start or length < MIN_PIECE_TOKENS:
            break
        pieces.append((start, stop))
        left = None if left is None else left - length
    return pieces


class Placement:
    """Lays pieces into blocks one by one: online best fit over a bounded number of open blocks.

    A piece goes to the open block it fills best, the oldest of equals, or opens one; when too many are open, the
    fullest is closed.

    Args:
        block_size: tokens of a block.
        most_open: most blocks that stay open.
    """

    def __init__(self, block_size: int, most_open: int = OPEN_BLOCKS) -> None:
        self.num_blocks = 0
        self._block_size = block_size
        self._most_open = most_open
        self._room: dict[int, int] = {}  # of the open blocks, oldest first; min() therefore breaks ties by age

    def place(self, length: int) -> tuple[int, int | None]:
        """Return the block of the next piece, and the block, if any, that takes no other from now on."""
        room = self._room
        fitting = [block for block, tokens in room.items() if tokens >= length]
        if fitting:
            block = min(fitting, key=room.__getitem__)
        else:
            block, self.num_blocks = self.num_blocks, self.num_blocks + 1
            room[block] = self._block_size
        room[block] -= length
        closed = None
        if room[block] < MIN_PIECE_TOKENS:
            closed = block
        elif len(room) > self._most_open:
            closed = min(room, key=room.__getitem__)
        if closed is not None:
            del room[closed]
        return block, closed

    def open_blocks(self) -> Collection[int]:
        """Return the blocks that may still take a piece."""
        return self._room.keys()


def place_pieces(lengths: Sequence[int], block_size: int, open_blocks: int = OPEN_BLOCKS) -> list[list[int]]:
    """Return for each block the indices of its pieces, laid by ``Placement``.

    Args:
        lengths: tokens of each piece, at most ``block_size``.
        block_size: tokens of a block.
        open_blocks: most blocks that stay open.
    """
    placement = Placement(block_size, open_blocks)
    blocks: list[list[int]] = []
    for piece, length in enumerate(lengths):
        block, _ = placement.place(length)
        if block == len(blocks):
            blocks.append([])
        blocks[block].append(piece)
    return blocks
