"""The same text under another tokenizer: the same documents, cuts and bytes, and nothing scored goes unpredicted."""

from __future__ import annotations

from functools import cache
from itertools import accumulate
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from secateur.corpus.packing import PackedBlocks, load_split
from secateur.corpus.pieces import Piece
from secateur.corpus.resegment import resegment, segmentation_change
from secateur.corpus.split import assign_split, document_hash
from secateur.errors import CorpusError
from secateur.recipe import SplitRatios

from .conftest import build_sentencepiece, build_tokenizer

WORDS = "the patient was given ten milligrams of the drug and naïve 東京 😀😀 effects  every morning\n".split(" ")
TEXTS = [
    " ".join(WORDS[(number * 7 + step) % len(WORDS)] for step in range(1 + number % 14)) + f" {number}"
    for number in range(28)
]
"""Some of one piece, many of several; characters of one to four bytes."""

BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}


@cache
def tokenizer_of(kind: str, many: bool, bos: bool) -> PreTrainedTokenizerFast:
    """Return a tokenizer with many tokens or with few."""
    if kind == "byte-level":
        return build_tokenizer(bos=bos, num_merges=61 if many else 12)
    return build_sentencepiece(bos=bos, vocab_size=340 if many else 50)


def word_tokenizer(*words: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of single bytes and these words, wherever they are in a text."""
    vocabulary = {letter: id for id, letter in enumerate(sorted(BYTES))}
    merges = [(word[:end], word[end]) for word in words for end in range(1, len(word))]
    for first, second in merges:
        vocabulary.setdefault(first + second, len(vocabulary))
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def load(tokenizer: Any, texts: list[str] = TEXTS, **options: Any) -> PackedBlocks:
    """Return texts as packed blocks with their text kept: a split of many, a single one whole."""
    split = "calibration"
    if len(texts) == 1:
        split = assign_split(document_hash(texts[0]), SplitRatios())
    options = {"block_size": 12, "max_tokens": None, "keep_text": True, **options}
    return load_split(texts, split, tokenizer, **options)


def document_pieces(blocks: PackedBlocks) -> list[list[Piece]]:
    """Return the pieces of each document in text order."""
    found: list[list[Piece]] = [[] for _ in range(blocks.num_documents)]
    for piece in (piece for block in blocks.blocks for piece in block):
        found[piece.document].append(piece)
    return [sorted(pieces, key=lambda piece: piece.span.start) for pieces in found]  # type: ignore[union-attr]


def document_bytes(blocks: PackedBlocks) -> list[int]:
    """Return the bytes each document is divided by."""
    return [sum(piece.num_bytes for piece in pieces) for pieces in document_pieces(blocks)]


def shown(blocks: PackedBlocks, tokenizer: PreTrainedTokenizerFast) -> list[tuple[str, int, int]]:
    """Return the tokens of each piece of a single document, how many are context, and the piece's bytes."""
    (pieces,) = document_pieces(blocks)
    tokens = [" ".join(tokenizer.convert_ids_to_tokens(piece.ids.tolist())) for piece in pieces]
    return [(text, piece.num_context, piece.num_bytes) for text, piece in zip(tokens, pieces, strict=True)]


def token_bytes(tokenizer: PreTrainedTokenizerFast, id: int) -> bytes:
    """Return the bytes of text that a token stands for."""
    token = tokenizer.convert_ids_to_tokens(id)
    if tokenizer.decoder is not None:
        return bytes(BYTES[letter] for letter in token)
    return bytes([int(token[3:5], 16)]) if token.startswith("<0x") else token.replace("▁", " ").encode()


def predicted_characters(
    pieces: list[Piece], tokenizer: PreTrainedTokenizerFast, text: str
) -> tuple[list[int], set[int]]:
    """Return how often each of the text's bytes is predicted, and the characters whose first byte is."""
    lead = 0 if tokenizer.decoder is not None else 1  # SentencePiece writes a space before the text
    raw = b" " * lead + text.encode()
    predicted = [0] * len(raw)
    position = 0
    for piece in pieces:
        assert piece.num_context >= max(1, piece.num_prefix)
        for place, id in enumerate(piece.own_ids.tolist(), start=piece.num_prefix):
            value = token_bytes(tokenizer, id)
            assert raw[position : position + len(value)] == value
            for at in range(position, position + len(value)):
                predicted[at] += place >= piece.num_context
            position += len(value)
    predicted = predicted[lead:]
    starts = accumulate((len(character.encode()) for character in text), initial=0)
    return predicted, {index for index, start in zip(range(len(text)), starts, strict=False) if predicted[start]}


def batches(blocks: PackedBlocks) -> list[tuple[Any, ...]]:
    """Return everything that a model would be given."""
    return [
        (b.input_ids.tolist(), b.position_ids.tolist(), b.document.tolist(), b.predicted.tolist(), b.piece_bytes)
        for b in blocks.batches(3)
    ]


CASES = [("byte-level", False), ("byte-level", True), ("sentencepiece", False), ("sentencepiece", True)]


@pytest.mark.parametrize(("kind", "bos"), CASES)
@pytest.mark.parametrize("many", [True, False])
@pytest.mark.parametrize(("block_size", "max_tokens"), [(12, None), (3, 200), (7, 101)])
def test_the_same_tokenizer_changes_nothing(
    kind: str, bos: bool, many: bool, block_size: int, max_tokens: int | None
) -> None:
    """The same tokens in the same blocks, predicted at the same positions, with the same bytes."""
    tokenizer = tokenizer_of(kind, many, bos)
    blocks = load(tokenizer, block_size=block_size, max_tokens=max_tokens)
    again = resegment(blocks, tokenizer)
    assert batches(again) == batches(blocks)
    assert again.describe() == blocks.describe()


@pytest.mark.parametrize("block_size", [3, 4, 5, 6, 7])
@pytest.mark.parametrize("bos", [True, False])
def test_cuts_inside_a_character_stay_there(bos: bool, block_size: int) -> None:
    """Where a character is several tokens, a piece may end between them; the same tokenizer finds the same place."""
    tokenizer = tokenizer_of("byte-level", False, bos)
    blocks = load(tokenizer, ["😀東é😀😀東x" * number for number in range(1, 8)], block_size=block_size)
    assert batches(resegment(blocks, tokenizer)) == batches(blocks)


@pytest.mark.parametrize(("kind", "bos"), [case for case in CASES if case != ("sentencepiece", False)])
@pytest.mark.parametrize("many", [True, False])
@pytest.mark.parametrize(("block_size", "max_tokens"), [(12, None), (3, 200), (7, 101), (64, 300)])
def test_all_scored_text_is_predicted_once(
    kind: str, bos: bool, many: bool, block_size: int, max_tokens: int | None
) -> None:
    """From many tokens to few and back: what was predicted is predicted, nothing is twice, and bytes are the same."""
    first, second = tokenizer_of(kind, many, bos), tokenizer_of(kind, not many, bos)
    blocks = load(first, block_size=block_size, max_tokens=max_tokens)
    other = resegment(blocks, second)
    sizes = document_bytes(blocks)
    assert document_bytes(other) == sizes
    for old, new, text, size in zip(document_pieces(blocks), document_pieces(other), blocks.texts, sizes, strict=True):
        before, scored = predicted_characters(old, first, text)
        after, covered = predicted_characters(new, second, text)
        assert scored <= covered
        assert sum(len(text[index].encode()) for index in scored) == size
        assert max(before) == max(after) == 1


@pytest.mark.parametrize(("kind", "bos"), CASES)
@pytest.mark.parametrize("many", [True, False])
def test_documents_are_tokenized_in_context(kind: str, bos: bool, many: bool) -> None:
    """A document's pieces, joined, are the tokens of the whole document, but for a start that must be cut in two."""
    blocks, tokenizer = load(tokenizer_of(kind, many, bos), block_size=9), tokenizer_of(kind, not many, bos)
    other = resegment(blocks, tokenizer)
    same = 0
    for pieces, text in zip(document_pieces(other), blocks.texts, strict=True):
        joined = [id for piece in pieces for id in piece.own_ids.tolist()]
        whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        same += joined == whole[: len(joined)] and len(whole) - len(joined) <= 1
    assert same == blocks.num_documents if bos or many else 0 < same < blocks.num_documents


@pytest.mark.parametrize(("kind", "bos"), CASES)
def test_it_stays_the_same_text(kind: str, bos: bool) -> None:
    """Documents, counts of dropped ones and fingerprint stay; tokens and blocks are counted anew."""
    texts = [*TEXTS, *TEXTS[:7]]
    excluded = [document_hash(text) for text in TEXTS[:5]]
    blocks = load(tokenizer_of(kind, True, bos), texts, exclude=excluded)
    other = resegment(blocks, tokenizer_of(kind, False, bos))
    assert blocks.num_duplicates + blocks.num_excluded > 0
    for name in ("name", "split", "fingerprint", "num_documents", "num_duplicates", "num_excluded"):
        assert other.describe()[name] == blocks.describe()[name]
    assert torch.equal(other.documents, blocks.documents)
    assert other.texts == ()
    (batch,) = other.batches(other.num_blocks)
    assert batch.num_tokens == other.num_tokens > blocks.num_tokens
    assert batch.input_ids.shape == (other.num_blocks, other.block_size)
    assert not batch.predicted[:, 0].any()
    assert not (batch.predicted & (batch.position_ids == 0)).any()
    assert not (batch.predicted & ~batch.valid).any()


def test_a_token_over_the_end_of_a_piece_is_predicted_there() -> None:
    """It is context of the next piece, where it predicts but is not predicted."""
    blocks = load(word_tokenizer(), ["xdrugxdrugx"], block_size=4)
    assert shown(blocks, word_tokenizer()) == [("x d r u", 1, 3), ("g x d r", 1, 3), ("u g x", 1, 2)]
    words = word_tokenizer("drug")
    assert shown(resegment(blocks, words), words) == [("x drug", 1, 3), ("drug x drug", 1, 3), ("drug x", 1, 2)]


def test_a_piece_inside_a_token_goes_to_the_one_before() -> None:
    """The piece before predicts the token, so it takes the bytes; the piece itself would have nothing to predict."""
    blocks = load(word_tokenizer(), ["xdrugx"], block_size=2)
    assert shown(blocks, word_tokenizer()) == [("x d", 1, 1), ("r u", 1, 1), ("g x", 1, 1)]
    words = word_tokenizer("drug")
    assert shown(resegment(blocks, words), words) == [("x drug", 1, 2), ("drug x", 1, 1)]


def test_the_first_token_does_not_swallow_scored_text() -> None:
    """Without a prefix, text that was scored stays so although the new first token would hold it."""
    words = word_tokenizer("drug")
    blocks = load(word_tokenizer(), ["drugdrug"], block_size=8)
    assert shown(resegment(blocks, words), words) == [("d r u g drug", 1, 7)]


def test_what_was_context_is_not_predicted() -> None:
    """Without a prefix the tokens that make up the former first token are context, all of them."""
    blocks = load(word_tokenizer("drug"), ["drugxdrugx"], block_size=2)
    letters = word_tokenizer()
    assert shown(resegment(blocks, letters), letters) == [("d r u g x", 4, 1), ("d r u g x", 4, 1)]


def test_a_new_prefix_is_context() -> None:
    """Where only the new tokenizer has a BOS, what was context before stays context behind it."""
    plain, bos = tokenizer_of("byte-level", True, False), tokenizer_of("byte-level", True, True)
    blocks = load(plain)
    other = resegment(blocks, bos)
    assert document_bytes(other) == document_bytes(blocks)
    for old, new in zip(document_pieces(blocks), document_pieces(other), strict=True):
        for before, after in zip(old, new, strict=True):
            assert after.ids.tolist() == [1, *before.ids.tolist()]
            assert (after.num_prefix, after.num_context) == (1, 2)
    with pytest.raises(CorpusError, match="puts no token before a text, and the first one does"):
        resegment(load(bos), plain)


def test_a_prefix_of_two_is_context() -> None:
    """Neither token of a longer prefix is predicted, before or after."""
    tokenizer = build_tokenizer(bos=False)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> <unk> $A", special_tokens=[("<s>", 1), ("<unk>", 0)]
    )
    blocks = load(tokenizer)
    for found in (blocks, resegment(blocks, tokenizer)):
        (batch,) = found.batches(found.num_blocks)
        assert torch.equal(batch.predicted, batch.valid & (batch.position_ids > 1))
        assert sum(size for _, size in batch.piece_bytes) == sum(len(text.encode()) for text in blocks.texts)


def test_blocks_grow_with_the_longest_piece() -> None:
    """Pieces that no longer fit widen the blocks; with a limit they are refused, and the message says what will do."""
    many, few = tokenizer_of("byte-level", True, True), tokenizer_of("byte-level", False, True)
    blocks = load(many)
    other = resegment(blocks, few)
    longest = max(len(piece.ids) for block in other.blocks for piece in block)
    assert other.block_size == longest > blocks.block_size
    assert resegment(blocks, few, max_block_size=longest).block_size == longest
    with pytest.raises(CorpusError) as caught:
        resegment(blocks, few, max_block_size=longest - 1)
    assert str(caught.value) == (
        f"a piece of calibration text of corpus 'corpus' has {longest} tokens under the new tokenizer, more than the "
        f"{longest - 1} that fit: lower calibrate.block_size from 12 to {12 * (longest - 1) // longest}."
    )
    assert resegment(load(few), many).block_size == 12


def test_text_must_have_been_kept() -> None:
    """Without the text there is nothing to tokenize."""
    tokenizer = tokenizer_of("byte-level", True, True)
    blocks = load(tokenizer, keep_text=False)
    assert blocks.texts == ()
    for found in (blocks, resegment(load(tokenizer), tokenizer)):
        with pytest.raises(CorpusError, match=r"calibration blocks of corpus 'corpus' hold no text .* keep_text=True"):
            resegment(found, tokenizer)
    with pytest.raises(CorpusError, match="tokenizer object is not a fast one"):
        resegment(load(tokenizer), object())


def test_a_document_that_can_no_longer_be_measured_is_refused() -> None:
    """A tokenizer that passes over the text leaves nothing to predict."""
    deaf = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[])))
    blocks = load(word_tokenizer(), ["cdefghijklmnop"])
    with pytest.raises(CorpusError, match=f"calibration document of corpus 'corpus' with hash {blocks.documents[0]}"):
        resegment(blocks, deaf)


@pytest.mark.parametrize(("kind", "bos"), CASES)
def test_a_change_of_segmentation_is_counted(kind: str, bos: bool) -> None:
    """Tokens before and after without prefixes, tokens whose id is gone, and the documents that hold one."""
    many, few = tokenizer_of(kind, True, bos), tokenizer_of(kind, False, bos)
    blocks = load(many, block_size=16)
    other = resegment(blocks, few)
    keep = sorted({many.convert_tokens_to_ids(token) for token in few.get_vocab() if token in many.get_vocab()})
    own = [[id for piece in pieces for id in piece.ids.tolist() if id > 2] for pieces in document_pieces(blocks)]
    for given in (keep, torch.tensor(keep)):
        change = segmentation_change(blocks, other, given)
        assert change.tokens_before == sum(map(len, own)) == blocks.num_tokens - bos * sum(map(len, blocks.blocks))
        assert change.tokens_lost == sum(id not in keep for ids in own for id in ids)
        assert change.documents_touched == sum(any(id not in keep for id in ids) for ids in own)
        assert change.num_documents == blocks.num_documents
        assert change.tokens_after > change.tokens_before
    if bos:
        assert change.tokens_after == other.num_tokens - sum(map(len, other.blocks))
    assert 0 < change.tokens_lost < change.tokens_before
    everything = segmentation_change(blocks, blocks, range(len(many)))
    assert everything.tokens_after == everything.tokens_before
    assert (everything.tokens_lost, everything.documents_touched) == (0, 0)
