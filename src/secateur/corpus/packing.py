"""A split of a corpus as packed token blocks: tokenize, cut into pieces, lay the pieces into blocks.

A piece is a run of tokens of one document; it is never longer than a block, never parted, and its positions start at
0, which is how ``transformers`` tells pieces apart. Padding is such a run of its own. Nothing here runs a model.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, tee
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from secateur.corpus.block_store import BlockStore, digested
from secateur.corpus.gathering import MEMORY_BYTES, Gathered
from secateur.corpus.pieces import MIN_PIECE_TOKENS, Piece, cut_document, place_pieces
from secateur.corpus.places import TEXT_START, TextSpan, places_after, token_places
from secateur.corpus.readers import open_source, require_documents
from secateur.corpus.split import GatheredSplit, Split, gather_documents
from secateur.corpus.tokenizing import leading_special_ids, require_fast, tokenize_with_offsets
from secateur.errors import CorpusError
from secateur.recipe import CorpusSpec
from secateur.records.blocks import BlockBatch

BYTES_PER_TOKEN = 16
"""More text than any tokenizer needs per token: how much is read for a given number of tokens."""

_HASHES_AT_ONCE = 4096

PADDING_ID = 0
"""Token id on padding: any id will do, and this one every vocabulary has (a ``pad_token_id`` may lie outside)."""


@dataclass(slots=True, eq=False)
class PackedBlocks:
    """Implements ``TokenBlocks`` for packed text; build it with ``load_split``.

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
        blocks: for each block its pieces, in order; together never longer than a block. Large ones lie on disk.
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
    blocks: Sequence[list[Piece]]
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
    memory_bytes: int = MEMORY_BYTES,
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
        memory_bytes: of text, and of blocks, that stay in memory; more goes to temporary files.

    Raises:
        CorpusError: the text cannot be read, there is too little of it, the tokenizer is not a fast one, or there is no
            room for temporary files.
        UnavailableError: a hub data set could not be had.
    """
    require_fast(tokenizer)
    prefix = leading_special_ids(tokenizer)
    _check_sizes(block_size, max_tokens, len(prefix), split)
    selection = _select(source, split, max_tokens, exclude, name, memory_bytes)
    taking = _Taking(tokenizer, prefix, block_size, max_tokens, keep_text)
    store = BlockStore(block_size, memory_bytes)
    for piece in taking.pieces(selection.documents):
        store.add(piece)
    limit_met = max_tokens is not None and max_tokens - store.num_tokens < _shortest_piece(len(prefix))
    if store.num_tokens < block_size and not limit_met:
        raise CorpusError(
            f"{split} text of corpus {name!r} has {store.num_tokens} tokens; one block needs {block_size}: give more "
            "text or lower calibrate.block_size."
        )
    blocks = store.finish()
    documents = np.frombuffer(taking.documents, dtype=np.int64)
    return PackedBlocks(
        name=name,
        split=split,
        fingerprint=store.fingerprint(_header(split, block_size, documents, tokenizer)),
        documents=torch.from_numpy(documents),
        num_tokens=store.num_tokens,
        num_blocks=len(blocks),
        num_duplicates=selection.num_duplicates,
        num_excluded=selection.num_excluded,
        block_size=block_size,
        blocks=blocks,
        texts=tuple(taking.texts),
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
    source: CorpusSpec | Sequence[str],
    split: Split,
    max_tokens: int | None,
    exclude: Collection[int],
    name: str,
    memory_bytes: int,
) -> GatheredSplit:
    documents, ratios = open_source(source, split, name)
    max_bytes = None if max_tokens is None else max_tokens * BYTES_PER_TOKEN
    found = gather_documents(
        documents, split=split, ratios=ratios, max_bytes=max_bytes, exclude=exclude, memory_bytes=memory_bytes
    )
    require_documents(found.num_seen, found.num_documents, found.num_excluded, split, name)
    return found


class _Taking:
    """Cuts documents into pieces until there are enough; remembers which documents gave any.

    Attributes:
        documents: their hashes.
        texts: their texts, where those are to be kept.
    """

    def __init__(
        self, tokenizer: Any, prefix: list[int], block_size: int, max_tokens: int | None, keep_text: bool
    ) -> None:
        self.documents = array("q")
        self.texts: list[str] = []
        self._tokenizer = tokenizer
        self._prefix = prefix
        self._block_size = block_size
        self._max_tokens = max_tokens
        self._keep_text = keep_text

    def pieces(self, selected: Iterable[Gathered]) -> Iterator[Piece]:
        """Yield the pieces in document order; a text far over the limit is cut before it is tokenized."""
        left, prefix = self._max_tokens, self._prefix
        max_characters = None if left is None else left * BYTES_PER_TOKEN
        ahead, selected = tee(selected)  # by no more than a batch of the tokenizer
        texts = (document.text[:max_characters] for document in ahead)
        tokenized = tokenize_with_offsets(texts, self._tokenizer)
        for document, (text, ids, offsets) in zip(selected, tokenized, strict=False):
            cuts = cut_document(len(ids), len(prefix), self._block_size, left)
            if cuts:
                spans = _spans(text, offsets, cuts, bool(prefix)) if self._keep_text else [None] * len(cuts)
                yield from _document_pieces(text, ids, offsets, cuts, spans, prefix, len(self.documents))
                self.documents.append(document.digest)
                self.texts += [text] if self._keep_text else []
            if left is not None:
                left -= sum(len(prefix) + stop - start for start, stop in cuts)
                if left < _shortest_piece(len(prefix)):
                    return


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


def _header(
    split: Split, block_size: int, documents: Int64[np.ndarray, " documents"], tokenizer: Any
) -> Iterator[bytes]:
    """Yield, as JSON, all that decides the blocks beside the tokens, which a document's hash says without spacing.

    The tokenizer's own JSON would also hold padding and truncation, but tokenizing has just switched both off.
    """
    yield f"{json.dumps([split, block_size])[:-1]}, [".encode()
    for first in range(0, len(documents), _HASHES_AT_ONCE):
        some = ", ".join(map(str, documents[first : first + _HASHES_AT_ONCE].tolist()))
        yield f"{', ' if first else ''}{some}".encode()
    yield f"], {json.dumps([len(tokenizer), tokenizer.backend_tokenizer.to_str()])[1:]}".encode()


def digest_pieces(header: Sequence[Any], pieces: Iterable[Piece]) -> str:
    """Return a hex digest of plain data and of the pieces' tokens."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(list(header)).encode())
    for piece in pieces:
        digest.update(digested(piece))
    return digest.hexdigest()
