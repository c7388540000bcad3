"""Blocks of pieces as they are packed: in memory while they are few, then in a temporary file, closed block by block.

So the memory of a text does not grow with its tokens; only where each block lies is kept, 16 bytes a block. Blocks are
read with ``pread``, not mapped, so that what was read does not count as memory of the process.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

import numpy as np
from jaxtyping import Int64

from secateur.corpus.pieces import Piece, Placement
from secateur.corpus.places import TextSpan
from secateur.corpus.spill import SpillFile, room_for

_BYTES_PER_PIECE = 400
"""Of Python's objects beside the tokens of a piece in memory, measured."""

_COLUMNS = 10
_NO_SPAN = (0, 0, 0, 0)
_BUFFER_BYTES = 1 << 20


class StoredBlocks(Sequence[list[Piece]]):
    """Blocks in a file; each is read when it is asked for, and forgotten.

    Args:
        file: what ``BlockStore`` wrote.
        places: of each block its offset, and its number of pieces.
    """

    def __init__(self, file: SpillFile, places: Int64[np.ndarray, "blocks 2"]) -> None:
        self._file = file
        self._places = places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> list[Piece]: ...

    @overload
    def __getitem__(self, index: slice) -> StoredBlocks: ...

    def __getitem__(self, index: int | slice) -> list[Piece] | StoredBlocks:
        if isinstance(index, slice):
            return StoredBlocks(self._file, self._places[index])
        offset, num_pieces = self._places[index].tolist()
        return _read_block(self._file.stream.fileno(), offset, num_pieces)

    def take(self, indices: Sequence[int]) -> StoredBlocks:
        """Return some of the blocks, in the order of the indices."""
        return StoredBlocks(self._file, self._places[np.array(indices, dtype=np.int64)])


def take_blocks(blocks: Sequence[list[Piece]], indices: Sequence[int]) -> Sequence[list[Piece]]:
    """Return some of the blocks, in the order of the indices; those in a file stay there."""
    return blocks.take(indices) if isinstance(blocks, StoredBlocks) else [blocks[index] for index in indices]


class BlockStore:
    """Lays pieces into blocks as they come, and keeps what is needed for their fingerprint.

    Args:
        block_size: tokens of a block.
        memory_bytes: what may stay in memory.

    Attributes:
        num_tokens: of all pieces.
        num_pieces: laid so far.

    Raises:
        CorpusError: by any method: there is no room on the disk for what memory does not hold.
    """

    def __init__(self, block_size: int, memory_bytes: int) -> None:
        self.num_tokens = self.num_pieces = 0
        self._placement = Placement(block_size)
        self._memory_bytes = memory_bytes
        self._blocks: dict[int, list[Piece]] = {}
        self._file: SpillFile | None = None
        self._offsets, self._counts = array("q"), array("q")
        self._digested = SpillFile(memory_bytes)

    def add(self, piece: Piece) -> None:
        """Lay a piece."""
        block, closed = self._placement.place(len(piece.ids))
        self._blocks.setdefault(block, []).append(piece)
        self.num_tokens += len(piece.ids)
        self.num_pieces += 1
        with room_for("packing the tokens of a corpus"):
            self._digested.stream.write(digested(piece))
            if self._file is None and 4 * self.num_tokens + _BYTES_PER_PIECE * self.num_pieces > self._memory_bytes:
                self._file = SpillFile()
                still_open = self._placement.open_blocks()
                for done in [number for number in self._blocks if number not in still_open]:
                    self._write(done)
            elif self._file is not None and closed is not None:
                self._write(closed)

    def finish(self) -> Sequence[list[Piece]]:
        """Return the blocks in the order in which they were opened."""
        if self._file is None:
            return [self._blocks[number] for number in range(len(self._blocks))]
        with room_for("packing the tokens of a corpus"):
            for number in list(self._blocks):
                self._write(number)
            self._file.stream.flush()
        return StoredBlocks(self._file, np.array([self._offsets, self._counts], dtype=np.int64).T)

    def fingerprint(self, header: Iterable[bytes]) -> str:
        """Return a hex digest of some bytes and then of the pieces in the order in which they came."""
        digest = hashlib.blake2b(digest_size=16)
        for part in header:
            digest.update(part)
        self._digested.stream.seek(0)
        while part := self._digested.stream.read(_BUFFER_BYTES):
            digest.update(part)
        return digest.hexdigest()

    def _write(self, number: int) -> None:
        assert self._file is not None, "there is a file once memory is full"
        pieces = self._blocks.pop(number)
        missing = number + 1 - len(self._offsets)
        self._offsets.extend([-1] * missing)
        self._counts.extend([0] * missing)
        self._offsets[number], self._counts[number] = self._file.stream.tell(), len(pieces)
        self._file.stream.write(np.array([_row(piece) for piece in pieces], dtype=np.int64).tobytes())
        self._file.stream.write(np.concatenate([piece.ids for piece in pieces]).astype(np.int32, copy=False).tobytes())


def digested(piece: Piece) -> bytes:
    """Return what a fingerprint holds of a piece: how many tokens, and which."""
    return len(piece.ids).to_bytes(8, "little") + piece.ids.astype("<i4").tobytes()


def _row(piece: Piece) -> tuple[int, ...]:
    span = _NO_SPAN if piece.span is None else (1, piece.span.start, piece.span.end, piece.span.scored_from)
    return (
        len(piece.ids),
        piece.document,
        piece.num_bytes,
        piece.num_prefix,
        piece.num_context,
        piece.first_position,
        *span,
    )


def _read_block(descriptor: int, offset: int, num_pieces: int) -> list[Piece]:
    size = 8 * _COLUMNS * num_pieces
    rows = np.frombuffer(os.pread(descriptor, size, offset), dtype=np.int64).reshape(num_pieces, _COLUMNS)
    num_ids = int(rows[:, 0].sum())
    ids = np.frombuffer(os.pread(descriptor, 4 * num_ids, offset + size), dtype=np.int32)
    return list(_pieces(rows.tolist(), ids))


def _pieces(rows: Sequence[Sequence[int]], ids: np.ndarray) -> Iterator[Piece]:
    start = 0
    for length, document, num_bytes, num_prefix, num_context, first_position, has_span, *span in rows:
        yield Piece(
            ids[start : start + length],
            document,
            num_bytes,
            num_prefix,
            num_context,
            TextSpan(*span) if has_span else None,
            first_position,
        )
        start += length
