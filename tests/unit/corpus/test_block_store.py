"""Blocks in a file are the blocks that stay in memory."""

from __future__ import annotations

import errno

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from secateur.corpus import PackedBlocks, load_split, spill
from secateur.corpus.block_store import StoredBlocks, take_blocks
from secateur.corpus.packing import digest_pieces
from secateur.corpus.pieces import Piece
from secateur.errors import CorpusError
from secateur.pipeline.sharding import first_blocks, share_of

TEXTS = [f"document {number} of the drug " + "every morning " * (number % 17) for number in range(120)]


def load(tokenizer: PreTrainedTokenizerFast, memory_bytes: int, *, keep_text: bool = True) -> PackedBlocks:
    """Return the calibration split in blocks of sixteen tokens."""
    return load_split(
        TEXTS,
        "calibration",
        tokenizer,
        block_size=16,
        max_tokens=None,
        keep_text=keep_text,
        memory_bytes=memory_bytes,
    )


def plain(pieces: list[Piece]) -> list[tuple[object, ...]]:
    """Return pieces as data that compares."""
    return [
        (p.ids.tolist(), p.document, p.num_bytes, p.num_prefix, p.num_context, p.span, p.first_position) for p in pieces
    ]


@pytest.mark.parametrize("memory_bytes", [1, 9000, 40_000])
def test_stored_blocks_are_the_blocks(bos_tokenizer: PreTrainedTokenizerFast, memory_bytes: int) -> None:
    """The same pieces in the same blocks, whether the file begins with the first of them or in the middle."""
    whole, stored = load(bos_tokenizer, 1 << 40), load(bos_tokenizer, memory_bytes)
    assert isinstance(whole.blocks, list) and isinstance(stored.blocks, StoredBlocks)
    assert [plain(block) for block in stored.blocks] == [plain(block) for block in whole.blocks]
    assert stored.describe() == whole.describe() and torch.equal(stored.documents, whole.documents)
    assert stored.texts == whole.texts
    for first, second in zip(whole.batches(3), stored.batches(3), strict=True):
        assert torch.equal(first.input_ids, second.input_ids) and torch.equal(first.document, second.document)
        assert first.piece_bytes == second.piece_bytes
    assert plain(stored.blocks[-1]) == plain(whole.blocks[-1])
    with pytest.raises(IndexError):
        stored.blocks[len(whole.blocks)]


def test_parts_of_stored_blocks_stay_in_the_file(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    """A process's share, the first blocks and any others are those of memory."""
    whole, stored = load(plain_tokenizer, 1 << 40), load(plain_tokenizer, 1)
    parts = [
        (share_of(whole, 1, 3), share_of(stored, 1, 3)),
        (first_blocks(whole, 100), first_blocks(stored, 100)),
    ]
    for first, second in parts:
        assert isinstance(second.blocks, StoredBlocks)
        assert [plain(block) for block in second.blocks] == [plain(block) for block in first.blocks]
        assert second.num_tokens == first.num_tokens
    some = take_blocks(stored.blocks, [3, 0])
    assert [plain(block) for block in some] == [plain(whole.blocks[3]), plain(whole.blocks[0])]


@pytest.mark.parametrize("memory_bytes", [1, 1 << 40])
def test_fingerprint_is_that_of_header_and_pieces(plain_tokenizer: PreTrainedTokenizerFast, memory_bytes: int) -> None:
    """It never changes with how text is kept: split, block size, documents and tokenizer as JSON, then the tokens."""
    blocks = load(plain_tokenizer, memory_bytes, keep_text=False)
    pieces = sorted((piece for block in blocks.blocks for piece in block), key=lambda piece: piece.document)
    in_order = sorted(pieces, key=lambda piece: (piece.document, -len(piece.ids)))
    tokenizer = [len(plain_tokenizer), plain_tokenizer.backend_tokenizer.to_str()]
    header = ["calibration", 16, blocks.documents.tolist(), *tokenizer]
    assert blocks.fingerprint == digest_pieces(header, in_order)


def test_a_full_disk_is_said(plain_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text whose tokens find no room is refused in words."""

    def full(**_: object) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(spill.tempfile, "TemporaryFile", full)
    with pytest.raises(CorpusError, match=r"needs room in .*and it is full .*TMPDIR"):
        load(plain_tokenizer, 1)
