"""Chosen documents packed anew: the same pieces, in the order given, numbered by it."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from secateur.corpus.packing import PackedBlocks, load_split, restrict
from secateur.corpus.pieces import Piece
from secateur.corpus.resegment import resegment
from secateur.corpus.split import document_hash
from secateur.errors import CorpusError

BLOCK = 12
WORDS = "the patient was given ten milligrams of a drug and naïve 東京 effects every morning".split()
TEXTS = [
    " ".join(WORDS[(number * 7 + step) % len(WORDS)] for step in range(1 + (5 * number) % 23)) + f" {number}"
    for number in range(60)
]


@pytest.fixture
def blocks(bos_tokenizer: Any) -> PackedBlocks:
    """All calibration text, with its texts kept."""
    return load_split(TEXTS, "calibration", bos_tokenizer, block_size=BLOCK, max_tokens=None, keep_text=True)


def document_pieces(blocks: PackedBlocks) -> dict[int, list[Piece]]:
    """Return each document's pieces in the order of their spans."""
    found: dict[int, list[Piece]] = {}
    for block in blocks.blocks:
        for piece in block:
            found.setdefault(piece.document, []).append(piece)
    for pieces in found.values():
        pieces.sort(key=lambda piece: piece.span.start if piece.span else 0)
    return found


def assert_same_piece(left: Piece, right: Piece) -> None:
    assert left.ids.tolist() == right.ids.tolist()
    assert (left.num_bytes, left.num_prefix, left.num_context, left.span) == (
        right.num_bytes,
        right.num_prefix,
        right.num_context,
        right.span,
    )


def test_chosen_documents_keep_their_pieces_and_are_renumbered(blocks: PackedBlocks) -> None:
    """Hashes, texts, ids, bytes and spans follow their document to its new index; nothing else is there."""
    wanted = random.Random(0).sample(range(blocks.num_documents), 11)
    chosen = restrict(blocks, wanted)
    before, after = document_pieces(blocks), document_pieces(chosen)
    assert chosen.documents.tolist() == [int(blocks.documents[document]) for document in wanted]
    assert [document_hash(text) for text in chosen.texts] == chosen.documents.tolist()
    assert sorted(after) == list(range(11))
    for place, document in enumerate(wanted):
        for left, right in zip(before[document], after[place], strict=True):
            assert_same_piece(left, right)
    assert chosen.num_tokens == sum(int(blocks.document_lengths()[document]) for document in wanted)
    assert chosen.num_blocks == len(chosen.blocks) == sum(len(b.input_ids) for b in chosen.batches(3))
    assert all(sum(len(piece.ids) for piece in block) <= BLOCK for block in chosen.blocks)
    (batch,) = chosen.batches(chosen.num_blocks)
    assert torch.equal(torch.bincount(batch.document[batch.valid]), chosen.document_lengths())


def test_all_documents_in_order_are_the_same_blocks(blocks: PackedBlocks, bos_tokenizer: Any) -> None:
    """Without spans too, the pieces of a document are found in the order of its text."""
    plain = load_split(TEXTS, "calibration", bos_tokenizer, block_size=BLOCK, max_tokens=None)
    for given in (blocks, plain):
        same = restrict(given, range(given.num_documents))
        assert same.num_blocks == given.num_blocks
        for left, right in zip(given.batches(1), same.batches(1), strict=True):
            assert torch.equal(left.input_ids, right.input_ids)
            assert torch.equal(left.document, right.document)
            assert left.piece_bytes == right.piece_bytes


def test_a_limit_takes_whole_pieces_from_the_start(blocks: PackedBlocks, bos_tokenizer: Any) -> None:
    """As many pieces of the order given as fit; the last document may be cut, later ones are gone.

    Blocks without spans lose the same pieces: the order within a document is known there too.
    """
    plain = load_split(TEXTS, "calibration", bos_tokenizer, block_size=BLOCK, max_tokens=None)
    wanted = random.Random(1).sample(range(blocks.num_documents), 12)
    in_order = [(place, p) for place, document in enumerate(wanted) for p in document_pieces(blocks)[document]]
    reached = np.cumsum([len(piece.ids) for _, piece in in_order])
    for limit in [*range(BLOCK, 120, 9), 10**6]:
        assert (
            restrict(plain, wanted, limit).document_lengths().equal(restrict(blocks, wanted, limit).document_lengths())
        )
        fitting = int((reached <= limit).sum())
        chosen = restrict(blocks, wanted, limit)
        assert chosen.num_tokens == reached[fitting - 1] <= limit
        assert chosen.num_documents == len(chosen.texts) == len({place for place, _ in in_order[:fitting]})
        found = [(place, piece) for place, ps in sorted(document_pieces(chosen).items()) for piece in ps]
        for (place, left), (index, right) in zip(in_order[:fitting], found, strict=True):
            assert place == index
            assert_same_piece(left, right)


def test_the_fingerprint_tells_choices_apart(blocks: PackedBlocks) -> None:
    """Which documents, their order and how much of them decide it, and nothing else."""
    prints = {
        blocks.fingerprint,
        restrict(blocks, [1, 2, 3]).fingerprint,
        restrict(blocks, [1, 3, 2]).fingerprint,
        restrict(blocks, [1, 2]).fingerprint,
        restrict(blocks, [1, 2, 3], BLOCK).fingerprint,
    }
    assert len(prints) == 5
    assert restrict(blocks, [1, 2, 3]).fingerprint == restrict(blocks, [1, 2, 3], 10**6).fingerprint


def test_restricted_text_can_be_tokenized_again(blocks: PackedBlocks, bos_tokenizer: Any) -> None:
    """Under the same tokenizer the pieces are the same, a cut last document included."""
    chosen = restrict(blocks, [7, 3, 5, 2], 40)
    again = resegment(chosen, bos_tokenizer)
    assert again.num_blocks == chosen.num_blocks
    for left, right in zip(chosen.batches(1), again.batches(1), strict=True):
        assert torch.equal(left.input_ids, right.input_ids)


def test_impossible_choices_are_refused(blocks: PackedBlocks) -> None:
    for wanted in ([0, 0], [-1], [blocks.num_documents]):
        with pytest.raises(CorpusError, match=r"different indices below"):
            restrict(blocks, wanted)
    for wanted, limit in (([], None), ([0], 1)):
        with pytest.raises(CorpusError, match=r"nothing of the calibration text .* is left"):
            restrict(blocks, wanted, limit)
