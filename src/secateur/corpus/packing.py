"""A split of a corpus as packed token blocks: tokenize, cut into pieces, lay the pieces into blocks.

A piece is a run of tokens of one document; it is never longer than a block, never parted, and its positions start at
0, which is how ``transformers`` tells pieces apart. Padding is such a run of its own. Nothing here runs a model.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from jaxtyping import Int32, Int64
from torch import Tensor

from secateur.corpus.places import TEXT_START, TextSpan, places_after, token_places
from secateur.corpus.readers import open_source, require_documents
from secateur.corpus.split import Selection, Split, select_documents
from secateur.corpus.tokenizing import leading_special_ids, require_fast, tokenize_with_offsets
from secateur.errors import CorpusError
from secateur.recipe import CorpusSpec
from secateur.records.blocks import BlockBatch

BYTES_PER_TOKEN = 16
"""More text than any tokenizer needs per token: how much is read for a given number of tokens."""

MIN_PIECE_TOKENS = 2
"""A piece of one token predicts nothing, and its end would not show in the positions."""

OPEN_BLOCKS = 64
"""Blocks that may still take a piece while packing."""

PADDING_ID = 0
"""Token id on padding: any id will do, and this one every vocabulary has (a ``pad_token_id`` may lie outside)."""


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


@dataclass(slots=True, eq=False)
class PackedBlocks:
    """Implements ``TokenBlocks`` for text in memory; build it with ``load_split``.

    It is not frozen only because the protocol's attributes are plain; nothing changes it.

    Attributes:
        name: of the corpus, for messages and manifests.
        split: which split it is.
        fingerprint: identifies the documents, their tokens and the tokenizer.
        documents: 63-bit hashes of the documents, ascending unless ``restrict`` put them in another order; a document's
            index is its place here.
        num_tokens: real tokens.
        num_blocks: blocks.
        num_duplicates: copies of chosen documents that were dropped.
        num_excluded: documents that were dropped because the caller excluded them.
        block_size: tokens per block, padding included.
        blocks: for each block its pieces, in order; together never longer than a block.
        texts: the documents as they were tokenized, by index; empty unless they were to be kept.
    """

    name: str
    split: Split
    fingerprint: str
    documents: Int64[Tensor, " documents"]
    num_tokens: int
    num_blocks: int
    num_duplicates: int
    num_excluded: int
    block_size: int
    blocks: list[list[Piece]]
    texts: tuple[str, ...] = field(repr=False, default=())

    @property
    def num_documents(self) -> int:
        """Documents that have at least one token in a block."""
        return len(self.documents)

    def document_lengths(self) -> Int64[Tensor, " documents"]:
        """Return how many tokens each document has in the blocks, prefixes included."""
        lengths = torch.zeros(self.num_documents, dtype=torch.int64)
        for piece in chain.from_iterable(self.blocks):
            lengths[piece.document] += len(piece.ids)
        return lengths

    def batches(self, batch_size: int) -> Iterator[BlockBatch]:
        """Yield batches of at most ``batch_size`` blocks, in a fixed order, every one ``block_size`` wide.

        Raises:
            CorpusError: the batch size is below 1.
        """
        if batch_size < 1:
            raise CorpusError(f"batch size {batch_size} is too small; it must be at least 1.")
        for first in range(0, self.num_blocks, batch_size):
            yield _batch(self.blocks[first : first + batch_size], self.block_size)

    def describe(self) -> dict[str, Any]:
        """Return what a manifest records of this split: names and counts, no text."""
        return {
            "name": self.name,
            "split": self.split,
            "fingerprint": self.fingerprint,
            "block_size": self.block_size,
            "num_blocks": self.num_blocks,
            "num_tokens": self.num_tokens,
            "num_documents": self.num_documents,
            "num_duplicates": self.num_duplicates,
            "num_excluded": self.num_excluded,
        }


def load_split(
    source: CorpusSpec | Sequence[str],
    split: Split,
    tokenizer: Any,
    *,
    block_size: int,
    max_tokens: int | None,
    exclude: Collection[int] = (),
    name: str = "corpus",
    keep_text: bool = False,
) -> PackedBlocks:
    """Return a split of a corpus as packed blocks.

    Documents are taken in ascending order of hash until ``max_tokens``; the last one is cut short. Where the
    tokenizer itself puts tokens such as a BOS before a text, every piece begins with them.

    Args:
        source: a corpus spec, or documents in memory (split by hash with the default shares).
        split: the one wanted.
        tokenizer: a fast ``transformers`` tokenizer.
        block_size: tokens per block.
        max_tokens: most tokens to take, prefixes included; None for all.
        exclude: hashes of documents that must not be taken, such as those of another bucket.
        name: of the corpus, for messages.
        keep_text: keeps the documents' text in memory, and which part of it each piece covers, for ``resegment``.

    Raises:
        CorpusError: the text cannot be read, there is too little of it, or the tokenizer is not a fast one.
        UnavailableError: a hub data set could not be had.
    """
    require_fast(tokenizer)
    prefix = leading_special_ids(tokenizer)
    _check_sizes(block_size, max_tokens, len(prefix), split)
    selection = _select(source, split, max_tokens, exclude, name)
    pieces, documents, texts = _take_pieces(selection, tokenizer, prefix, block_size, max_tokens, keep_text)
    num_tokens = sum(len(piece.ids) for piece in pieces)
    limit_met = max_tokens is not None and max_tokens - num_tokens < _shortest_piece(len(prefix))
    if num_tokens < block_size and not limit_met:
        raise CorpusError(
            f"{split} text of corpus {name!r} has {num_tokens} tokens; one block needs {block_size}: give more text "
            "or lower calibrate.block_size."
        )
    placed = place_pieces([len(piece.ids) for piece in pieces], block_size)
    return PackedBlocks(
        name=name,
        split=split,
        fingerprint=_fingerprint(split, documents, pieces, block_size, tokenizer),
        documents=torch.tensor(documents, dtype=torch.int64),
        num_tokens=num_tokens,
        num_blocks=len(placed),
        num_duplicates=selection.num_duplicates,
        num_excluded=selection.num_excluded,
        block_size=block_size,
        blocks=[[pieces[piece] for piece in block] for block in placed],
        texts=tuple(texts),
    )


def restrict(blocks: PackedBlocks, documents: Sequence[int], max_tokens: int | None = None) -> PackedBlocks:
    """Return the pieces of some documents, packed anew in the order given.

    The chosen documents are numbered by their place in that order; their pieces, bytes and text stay as they are.

    Args:
        blocks: which to take from.
        documents: indices of the documents wanted, each once.
        max_tokens: whole pieces are taken from the start for as long as they have no more tokens than this together,
            so the last document may be cut short; None takes all.

    Raises:
        CorpusError: an index is not of a document or is there twice, or the first piece has more tokens than allowed.
    """
    _require_documents_once(documents, blocks)
    by_document = _pieces_by_document(blocks)
    chosen: list[Piece] = []
    num_tokens, taken = 0, 0
    for document in documents:
        whole = by_document[document]
        fitting = _pieces_within(whole, None if max_tokens is None else max_tokens - num_tokens)
        chosen += [replace(piece, document=taken) for piece in whole[:fitting]]
        num_tokens += sum(len(piece.ids) for piece in whole[:fitting])
        taken += fitting > 0
        if fitting < len(whole):
            break
    if not chosen:
        raise CorpusError(
            f"nothing of the {blocks.split} text of corpus {blocks.name!r} is left: {len(documents)} documents were "
            f"chosen and max_tokens is {max_tokens}. Choose documents, or raise it to {blocks.block_size} or more."
        )
    placed = place_pieces([len(piece.ids) for piece in chosen], blocks.block_size)
    kept = list(documents[:taken])
    hashes = blocks.documents[torch.tensor(kept)]
    return replace(
        blocks,
        fingerprint=digest_pieces([blocks.fingerprint, hashes.tolist()], chosen),
        documents=hashes,
        num_tokens=num_tokens,
        num_blocks=len(placed),
        blocks=[[chosen[piece] for piece in block] for block in placed],
        texts=tuple(blocks.texts[document] for document in kept) if blocks.texts else (),
    )


def _require_documents_once(documents: Sequence[int], blocks: PackedBlocks) -> None:
    if len(set(documents)) != len(documents) or not all(0 <= index < blocks.num_documents for index in documents):
        raise CorpusError(
            f"documents to keep of corpus {blocks.name!r} must be different indices below {blocks.num_documents}; got "
            f"{list(documents)[:8]}{' ...' if len(documents) > 8 else ''}. Number them as blocks.documents does."
        )


def _pieces_by_document(blocks: PackedBlocks) -> dict[int, list[Piece]]:
    """Return each document's pieces in the order of its text.

    Without spans the order follows from how documents are cut and placed: all pieces but the last fill a block each,
    and full blocks are in order.
    """
    found: defaultdict[int, list[Piece]] = defaultdict(list)
    for piece in chain.from_iterable(blocks.blocks):
        found[piece.document].append(piece)
    return {
        document: sorted(pieces, key=lambda piece: piece.span.start if piece.span else -len(piece.ids))
        for document, pieces in found.items()
    }


def _pieces_within(pieces: Sequence[Piece], max_tokens: int | None) -> int:
    """Return how many of the pieces, from the first, have no more tokens together than the limit."""
    if max_tokens is None:
        return len(pieces)
    return int(np.searchsorted(np.cumsum([len(piece.ids) for piece in pieces]), max_tokens, side="right"))


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


def place_pieces(lengths: Sequence[int], block_size: int, open_blocks: int = OPEN_BLOCKS) -> list[list[int]]:
    """Return for each block the indices of its pieces: online best fit over a bounded number of open blocks.

    A piece goes to the open block it fills best, the oldest of equals, or opens one; when too many are open, the
    fullest is closed.

    Args:
        lengths: tokens of each piece, at most ``block_size``.
        block_size: tokens of a block.
        open_blocks: most blocks that stay open.
    """
    blocks: list[list[int]] = []
    room: dict[int, int] = {}  # of the open blocks, oldest first; min() therefore breaks ties by age
    for piece, length in enumerate(lengths):
        fitting = [block for block, tokens in room.items() if tokens >= length]
        if fitting:
            block = min(fitting, key=room.__getitem__)
        else:
            block = len(blocks)
            blocks.append([])
            room[block] = block_size
        blocks[block].append(piece)
        room[block] -= length
        if room[block] < MIN_PIECE_TOKENS:
            del room[block]
        elif len(room) > open_blocks:
            del room[min(room, key=room.__getitem__)]
    return blocks


def covered_bytes(text: str, offsets: Sequence[tuple[int, int]]) -> Int64[np.ndarray, " ends"]:
    """Return how many UTF-8 bytes of the text lie before the end of each token, with a leading 0.

    The difference of two entries is what the tokens between them cover. It never decreases, so that a character
    shared by two tokens counts once, with the first, and white space that no token covers counts with the next.

    Args:
        text: the document.
        offsets: start and end of each token in characters.
    """
    ends = np.zeros(len(offsets) + 1, dtype=np.int64)
    ends[1:] = [end for _, end in offsets]
    ends = np.minimum(np.maximum.accumulate(ends), len(text))
    if text.isascii():
        return ends
    points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + (points >= 0x80).astype(np.int64) + (points >= 0x800) + (points >= 0x10000)
    return np.concatenate(([0], np.cumsum(widths)))[ends]


def _shortest_piece(num_prefix: int) -> int:
    return max(MIN_PIECE_TOKENS, num_prefix + 1)


def _check_sizes(block_size: int, max_tokens: int | None, num_prefix: int, split: Split) -> None:
    smallest = _shortest_piece(num_prefix)
    if block_size < smallest:
        raise CorpusError(f"a block of {block_size} tokens is too small for this tokenizer; give at least {smallest}.")
    if max_tokens is not None and max_tokens < block_size:
        stage = "calibrate" if split == "calibration" else "evaluate"
        raise CorpusError(
            f"max_tokens {max_tokens} is less than one block of {block_size} tokens: raise {stage}.max_tokens or lower "
            "calibrate.block_size."
        )


def _select(
    source: CorpusSpec | Sequence[str], split: Split, max_tokens: int | None, exclude: Collection[int], name: str
) -> Selection:
    documents, ratios = open_source(source, split, name)
    max_bytes = None if max_tokens is None else max_tokens * BYTES_PER_TOKEN
    selection = select_documents(documents, split=split, ratios=ratios, max_bytes=max_bytes, exclude=exclude)
    require_documents(selection.num_seen, len(selection.texts), selection.num_excluded, split, name)
    return selection


def _take_pieces(
    selection: Selection,
    tokenizer: Any,
    prefix: list[int],
    block_size: int,
    max_tokens: int | None,
    keep_text: bool,
) -> tuple[list[Piece], list[int], list[str]]:
    """Return the pieces in document order, and the hashes and (if kept) texts of the documents that have any.

    A text far over the limit is cut before it is tokenized.
    """
    pieces: list[Piece] = []
    documents: list[int] = []
    kept: list[str] = []
    max_characters = None if max_tokens is None else max_tokens * BYTES_PER_TOKEN
    texts = (text[:max_characters] for text in selection.texts)
    left = max_tokens
    for digest, (text, ids, offsets) in zip(selection.hashes, tokenize_with_offsets(texts, tokenizer), strict=True):
        cuts = cut_document(len(ids), len(prefix), block_size, left)
        if cuts:
            spans = _spans(text, offsets, cuts, bool(prefix)) if keep_text else [None] * len(cuts)
            pieces += _document_pieces(text, ids, offsets, cuts, spans, prefix, len(documents))
            documents.append(digest)
            kept += [text] if keep_text else []
        if left is not None:
            left -= sum(len(prefix) + stop - start for start, stop in cuts)
            if left < _shortest_piece(len(prefix)):
                break
    return pieces, documents, kept


def _spans(
    text: str, offsets: list[tuple[int, int]], cuts: list[tuple[int, int]], has_prefix: bool
) -> list[TextSpan | None]:
    """Return the text that each piece covers; without a prefix what its first token covers is context."""
    after = places_after(token_places(offsets, len(text)), len(text))
    spans: list[TextSpan | None] = []
    for start, stop in cuts:
        begin = int(after[start - 1]) if start else TEXT_START
        spans.append(TextSpan(begin, int(after[stop - 1]), begin if has_prefix else int(after[start])))
    return spans


def _document_pieces(
    text: str,
    ids: list[int],
    offsets: list[tuple[int, int]],
    cuts: list[tuple[int, int]],
    spans: Sequence[TextSpan | None],
    prefix: list[int],
    document: int,
) -> list[Piece]:
    """Return a document's pieces; without a prefix a piece's first token is context only, and its bytes not counted."""
    reach = covered_bytes(text, offsets)
    context = 0 if prefix else 1
    return [
        Piece(
            ids=np.array(prefix + ids[start:stop], dtype=np.int32),
            document=document,
            num_bytes=int(reach[stop] - reach[start + context]),
            num_prefix=len(prefix),
            num_context=len(prefix) + context,
            span=span,
        )
        for (start, stop), span in zip(cuts, spans, strict=True)
    ]


def _batch(blocks: Sequence[Sequence[Piece]], block_size: int) -> BlockBatch:
    shape = (len(blocks), block_size)
    input_ids = np.full(shape, PADDING_ID, dtype=np.int64)
    position_ids = np.zeros(shape, dtype=np.int64)
    document = np.full(shape, -1, dtype=np.int64)
    predicted = np.zeros(shape, dtype=np.bool_)
    for row, pieces in enumerate(blocks):
        start = 0
        for piece in pieces:
            stop = start + len(piece.ids)
            input_ids[row, start:stop] = piece.ids
            position_ids[row, start:stop] = np.arange(piece.first_position, piece.first_position + stop - start)
            document[row, start:stop] = piece.document
            predicted[row, start + piece.num_context : stop] = True
            start = stop
        position_ids[row, start:] = np.arange(block_size - start)
    return BlockBatch(
        input_ids=torch.from_numpy(input_ids),
        position_ids=torch.from_numpy(position_ids),
        valid=torch.from_numpy(document >= 0),
        document=torch.from_numpy(document),
        predicted=torch.from_numpy(predicted),
        piece_bytes=tuple((piece.document, piece.num_bytes) for pieces in blocks for piece in pieces),
    )


def _fingerprint(
    split: Split, documents: Sequence[int], pieces: Iterable[Piece], block_size: int, tokenizer: Any
) -> str:
    """Return a hex digest of all that decides the blocks.

    The tokens are in it because a document's hash ignores spacing. The tokenizer's own JSON would also hold padding
    and truncation, but tokenizing has just switched both off.
    """
    header = [split, block_size, list(documents), len(tokenizer), tokenizer.backend_tokenizer.to_str()]
    return digest_pieces(header, pieces)


def digest_pieces(header: Sequence[Any], pieces: Iterable[Piece]) -> str:
    """Return a hex digest of plain data and of the pieces' tokens."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(list(header)).encode())
    for piece in pieces:
        digest.update(len(piece.ids).to_bytes(8, "little"))
        digest.update(piece.ids.astype("<i4").tobytes())
    return digest.hexdigest()
