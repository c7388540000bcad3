"""The same text under another tokenizer: what a model with a smaller vocabulary reads in place of the dense one's.

Documents are cut where they were cut before and divided by the same bytes. A piece predicts every token that covers
text it scored before. A token that reaches over the end of a piece is predicted there, and not again in the next piece:
the losses may be of a little more text than the bytes, never of less.

Where the tokenizer puts nothing before a text, a document's first token cannot be predicted. Should that token now
reach into text that was scored before, the document is tokenized in two parts, so that it does not.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int32, Int64
from torch import Tensor

from secateur.corpus.packing import PackedBlocks
from secateur.corpus.pieces import Piece, place_pieces
from secateur.corpus.places import TextSpan, characters_before, count_covering, count_until, token_places
from secateur.corpus.tokenizing import leading_special_ids, require_fast, tokenize_with_offsets
from secateur.errors import CorpusError
from secateur.records.evaluation import SegmentationChange


def resegment(blocks: PackedBlocks, tokenizer: Any, *, max_block_size: int | None = None) -> PackedBlocks:
    """Return the same text under another tokenizer, packed anew.

    Documents are tokenized whole and cut where they were cut before, to within a token. A document keeps its bytes, and
    the blocks keep documents, counts of dropped documents and fingerprint: they say which text it is. Under the
    tokenizer that made ``blocks`` the pieces are exactly the same.

    Args:
        blocks: made by ``load_split`` with ``keep_text=True``.
        tokenizer: the other tokenizer, a fast one.
        max_block_size: most tokens of a piece, such as a model has positions; None for no limit.

    Returns:
        Blocks without the text, as wide as before or as the longest piece now, whichever is more.

    Raises:
        CorpusError: the blocks hold no text, the tokenizer is not a fast one or puts nothing before a text where the
            other did, a piece is longer than the limit, or a document has nothing left that can be predicted.
    """
    require_fast(tokenizer)
    if not blocks.texts:
        raise CorpusError(
            f"{blocks.split} blocks of corpus {blocks.name!r} hold no text to tokenize again. Load them with "
            "keep_text=True."
        )
    prefix = leading_special_ids(tokenizer)
    pieces_before: defaultdict[int, list[tuple[TextSpan, Piece]]] = defaultdict(list)
    for block in blocks.blocks:
        for piece in block:
            assert piece.span is not None, "text is kept with spans"
            pieces_before[piece.document].append((piece.span, piece))
            if piece.num_prefix and not prefix:
                raise CorpusError(
                    "the other tokenizer puts no token before a text, and the first one does, so that the start of a "
                    "text would no longer be predicted. Give both the same special tokens."
                )
    pieces: list[Piece] = []
    for document, (text, ids, offsets) in enumerate(tokenize_with_offsets(blocks.texts, tokenizer)):
        before = sorted(pieces_before[document], key=lambda entry: entry[0].start)
        tokens, context = _tokens(ids, offsets, len(text)), before[0][0].scored_from
        if not prefix and not count_until(tokens.places, context):
            tokens = _tokens_in_two_parts(text, context, tokenizer)
        found, unplaced_bytes = _document_pieces(before, tokens, prefix)
        if unplaced_bytes:
            raise CorpusError(
                f"the new tokenizer leaves nothing to predict in the {blocks.split} document of corpus {blocks.name!r} "
                f"with hash {int(blocks.documents[document])}. Exclude that document, or keep more of the vocabulary."
            )
        pieces += found
    longest = max((len(piece.ids) for piece in pieces), default=0)
    if max_block_size is not None and longest > max_block_size:
        raise CorpusError(
            f"a piece of {blocks.split} text of corpus {blocks.name!r} has {longest} tokens under the new tokenizer, "
            f"more than the {max_block_size} that fit: lower calibrate.block_size from {blocks.block_size} to "
            f"{blocks.block_size * max_block_size // longest}."
        )
    block_size = max(blocks.block_size, longest)
    placed = place_pieces([len(piece.ids) for piece in pieces], block_size)
    return replace(
        blocks,
        num_tokens=sum(len(piece.ids) for piece in pieces),
        num_blocks=len(placed),
        block_size=block_size,
        blocks=[[pieces[piece] for piece in block] for block in placed],
        texts=(),
    )


def segmentation_change(
    before: PackedBlocks, after: PackedBlocks, keep: Sequence[int] | Int64[Tensor, " kept"]
) -> SegmentationChange:
    """Return what resegmenting did to a text.

    Args:
        before: the text under the first tokenizer.
        after: what ``resegment`` made of it.
        keep: ids of the first tokenizer that are still in the vocabulary.
    """
    pieces = [piece for block in before.blocks for piece in block]
    ids = np.concatenate([piece.own_ids for piece in pieces])
    document = np.repeat([piece.document for piece in pieces], [len(piece.own_ids) for piece in pieces])
    is_lost = ~np.isin(ids, torch.as_tensor(keep).cpu().numpy())
    return SegmentationChange(
        tokens_before=len(ids),
        tokens_after=sum(len(piece.own_ids) for block in after.blocks for piece in block),
        tokens_lost=int(is_lost.sum()),
        documents_touched=len(np.unique(document[is_lost])),
        num_documents=before.num_documents,
    )


@dataclass(frozen=True, slots=True)
class _Tokens:
    """A document's tokens and the places where they end."""

    ids: Int32[np.ndarray, " tokens"]
    places: Int64[np.ndarray, " tokens"]


def _tokens(ids: Sequence[int], offsets: Sequence[tuple[int, int]], num_characters: int) -> _Tokens:
    return _Tokens(np.array(ids, dtype=np.int32), token_places(offsets, num_characters))


def _tokens_in_two_parts(text: str, place: int, tokenizer: Any) -> _Tokens:
    """Return the tokens of the text before a place and of the text after it, so that none reaches over it."""
    split = characters_before(place)
    before, after = tokenize_with_offsets([text[:split], text[split:]], tokenizer)
    shifted = [(start + split, end + split) for start, end in after[2]]
    return _tokens([*before[1], *after[1]], [*before[2], *shifted], len(text))


def _document_pieces(
    before: Sequence[tuple[TextSpan, Piece]], tokens: _Tokens, prefix: list[int]
) -> tuple[list[Piece], int]:
    """Return the pieces of a document, and how many bytes have none.

    A piece that has nothing left to predict is left out and its bytes go to the one before, which predicts the token
    that covers its text. (There may be none before only where the tokenizer passes over text.)
    """
    pieces: list[Piece] = []
    num_bytes = 0
    stop = 0
    for span, piece in before:
        first = max(count_until(tokens.places, span.start), stop)
        scored = max(count_until(tokens.places, span.scored_from), first)
        stop = max(count_covering(tokens.places, span.end), first)
        num_bytes += piece.num_bytes
        lead = prefix
        if not prefix and scored == first:  # no token of its own is context
            lead = [int(tokens.ids[first - 1])] if first else []
            scored = max(scored, 1)
        if stop > scored:
            ids = np.concatenate([np.array(lead, dtype=np.int32), tokens.ids[first:stop]])
            pieces.append(Piece(ids, piece.document, num_bytes, len(lead), len(lead) + scored - first, span))
            num_bytes = 0
        elif pieces:
            pieces[-1] = replace(pieces[-1], num_bytes=pieces[-1].num_bytes + num_bytes)
            num_bytes = 0
    return pieces, num_bytes
