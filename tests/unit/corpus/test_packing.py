"""Packed blocks hold whole pieces, each as if it were alone, and count tokens and bytes exactly."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from secateur.corpus.packing import PackedBlocks, covered_bytes, load_split
from secateur.corpus.pieces import cut_document, place_pieces
from secateur.corpus.places import TEXT_START
from secateur.corpus.split import document_hash, select_documents
from secateur.errors import CorpusError
from secateur.recipe import CorpusSpec, SplitRatios
from secateur.records.blocks import BlockBatch, TokenBlocks

from .conftest import build_tokenizer

BLOCK = 12
WORDS = "the patient was given ten milligrams of a drug and naïve 東京 effects every morning".split()
TEXTS = [
    " ".join(WORDS[(number * 7 + step) % len(WORDS)] for step in range(1 + number % 9)) + f" {number}"
    for number in range(60)
]


def load(tokenizer: Any, texts: list[str] = TEXTS, **options: Any) -> PackedBlocks:
    """Return the calibration split of the texts, all of its tokens unless the options say otherwise."""
    return load_split(texts, "calibration", tokenizer, **{"block_size": BLOCK, "max_tokens": None, **options})


def pieces(batch: BlockBatch) -> Iterator[tuple[int, int, int]]:
    """Yield (row, start, stop) of every piece, found as a model finds them: by positions that restart."""
    for row, positions in enumerate(batch.position_ids):
        starts = torch.nonzero(torch.diff(positions, prepend=positions[:1] - 2) != 1).flatten().tolist()
        for start, stop in zip(starts, [*starts[1:], len(positions)], strict=True):
            if batch.valid[row, start]:
                yield row, start, stop


def whole(blocks: PackedBlocks) -> BlockBatch:
    """Return all blocks as one batch."""
    (batch,) = blocks.batches(blocks.num_blocks)
    return batch


@pytest.fixture(params=["plain", "bos"])
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    """Both kinds of tokenizer."""
    return request.getfixturevalue(f"{request.param}_tokenizer")


def test_piece_logits_equal_those_of_the_piece_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    """A packed model sees every piece as if nothing else were in its block, padding included."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).double().eval()
    batch = whole(load(tokenizer, TEXTS[:25], max_tokens=100))
    assert not batch.valid.all()
    compared = 0
    with torch.no_grad():
        packed = model(input_ids=batch.input_ids, position_ids=batch.position_ids).logits
        for row, start, stop in pieces(batch):
            alone = model(input_ids=batch.input_ids[row : row + 1, start:stop]).logits[0]
            torch.testing.assert_close(packed[row, start:stop], alone, rtol=1e-9, atol=1e-9)
            compared += 1
    assert compared == len(batch.piece_bytes) > batch.input_ids.shape[0]


def test_pieces_restore_the_documents(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    """Each selected document is there, cut every ``BLOCK`` tokens from its start, and nothing else is."""
    blocks = load(plain_tokenizer)
    selection = select_documents(TEXTS, split="calibration", ratios=SplitRatios(), max_bytes=None)
    assert blocks.documents.tolist() == list(selection.hashes)
    batch = whole(blocks)
    found = [
        (int(batch.document[row, start]), batch.input_ids[row, start:stop].tolist())
        for row, start, stop in pieces(batch)
    ]
    expected = [
        (document, ids[start : start + BLOCK])
        for document, ids in enumerate(plain_tokenizer(list(selection.texts), verbose=False)["input_ids"])
        for start in range(0, len(ids) - 1, BLOCK)  # not a last piece of one token
    ]
    assert sorted(found) == sorted(expected)


def test_bos_begins_every_piece(bos_tokenizer: PreTrainedTokenizerFast) -> None:
    """Every piece starts with the BOS, holds it once, and no piece ends with the EOS."""
    batch = whole(load(bos_tokenizer))
    for row, start, stop in pieces(batch):
        ids = batch.input_ids[row, start:stop].tolist()
        assert ids[0] == 1
        assert not {1, 2} & set(ids[1:])


def test_blocks_are_well_formed(tokenizer: PreTrainedTokenizerFast) -> None:
    """Real tokens come first, one document per piece, at least two tokens each; padding is marked in every field."""
    blocks = load(tokenizer)
    batch = whole(blocks)
    for row, start, stop in pieces(batch):
        assert stop - start >= 2
        assert batch.valid[row, start:stop].all()
        assert len(batch.document[row, start:stop].unique()) == 1
    for row, valid in enumerate(batch.valid):
        used = int(valid.sum())
        assert valid[:used].all()
        assert batch.position_ids[row, used:].tolist() == list(range(BLOCK - used))
    assert (batch.document[~batch.valid] == -1).all()
    assert (batch.input_ids[~batch.valid] == 0).all()
    assert sorted(set(batch.document[batch.valid].tolist())) == list(range(blocks.num_documents))
    assert batch.num_tokens == blocks.num_tokens


def test_all_but_the_first_of_a_piece_is_predicted(tokenizer: PreTrainedTokenizerFast) -> None:
    """A BOS, or without one the first token of the text, is context; padding is not predicted either."""
    batch = whole(load(tokenizer))
    assert torch.equal(batch.predicted, batch.valid & (batch.position_ids > 0))


def test_keeping_the_text_changes_nothing_else(tokenizer: PreTrainedTokenizerFast) -> None:
    """With the text come spans that follow one another; tokens, bytes and fingerprint stay as they are."""
    without, blocks = load(tokenizer, max_tokens=200), load(tokenizer, max_tokens=200, keep_text=True)
    assert blocks.describe() == without.describe()
    assert torch.equal(whole(blocks).input_ids, whole(without).input_ids)
    assert [document_hash(text) for text in blocks.texts] == blocks.documents.tolist()
    assert without.texts == ()
    assert {piece.span for block in without.blocks for piece in block} == {None}
    reached = dict.fromkeys(range(blocks.num_documents), TEXT_START)
    spans = [(piece.document, piece.span) for block in blocks.blocks for piece in block if piece.span]
    assert len(spans) == sum(map(len, blocks.blocks))
    for document, span in sorted(spans, key=lambda entry: entry[1].start):
        assert span.start == reached[document]
        assert span.start <= span.scored_from < span.end
        reached[document] = span.end


def test_the_own_tokens_of_a_piece_are_without_the_prefix(bos_tokenizer: PreTrainedTokenizerFast) -> None:
    """What the tokenizer puts before a text by itself is no token of the text."""
    for piece in (piece for block in load(bos_tokenizer).blocks for piece in block):
        assert (piece.num_prefix, piece.num_context) == (1, 1)
        assert piece.own_ids.tolist() == piece.ids.tolist()[1:]


@pytest.mark.parametrize("batch_size", [1, 3, 1000])
def test_batching_changes_nothing(tokenizer: PreTrainedTokenizerFast, batch_size: int) -> None:
    """Batches of any size, joined, are the same blocks; iterating again gives them again."""
    blocks = load(tokenizer)
    reference = whole(blocks)
    for _ in range(2):
        parts = list(blocks.batches(batch_size))
        assert all(1 <= len(part.input_ids) <= batch_size for part in parts)
        for field in ("input_ids", "position_ids", "valid", "document", "predicted"):
            joined = torch.cat([getattr(part, field) for part in parts])
            assert torch.equal(joined, getattr(reference, field))
        assert sum((part.piece_bytes for part in parts), ()) == reference.piece_bytes


def test_batch_size_below_one_is_refused(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    """A batch must hold a block."""
    with pytest.raises(CorpusError, match="batch size 0 is too small"):
        next(load(plain_tokenizer).batches(0))


@pytest.mark.parametrize("max_tokens", [12, 13, 47, 100, 101, 102, 103])
def test_token_limit_is_met(tokenizer: PreTrainedTokenizerFast, max_tokens: int) -> None:
    """The total never exceeds the limit, and falls short by one token at most: a piece of one is not made."""
    blocks = load(tokenizer, max_tokens=max_tokens)
    assert max_tokens - 1 <= blocks.num_tokens <= max_tokens
    assert blocks.num_documents < load(tokenizer).num_documents


def test_a_limit_of_one_block_may_fall_a_token_short(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    """A block that lacks one token only because the limit allows no further piece is no lack of text."""
    first = load(plain_tokenizer, block_size=64).blocks[0][0]
    size = len(first.ids) + 1
    assert load(plain_tokenizer, block_size=size, max_tokens=size).num_tokens == size - 1


def test_a_limit_shortens_the_same_sample(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    """Fewer tokens take the first of the documents that more tokens take."""
    few, more = load(plain_tokenizer, max_tokens=50), load(plain_tokenizer, max_tokens=150)
    assert more.documents[: few.num_documents].tolist() == few.documents.tolist()


def test_long_texts_are_cut_before_tokenizing(
    plain_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A document of any length costs no more than the tokens asked for."""
    lengths: list[int] = []
    encode = PreTrainedTokenizerFast._encode_plus

    def spy(self: PreTrainedTokenizerFast, text: Any, **options: Any) -> Any:
        lengths.extend(map(len, [text] if isinstance(text, str) else text))
        return encode(self, text, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "_encode_plus", spy)
    assert load(plain_tokenizer, ["the patient " * 5000], max_tokens=24).num_tokens == 24
    assert max(lengths) == 24 * 16


def test_long_texts_give_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    """A document longer than the model's length is normal here and logs nothing."""
    logger = logging.getLogger("transformers.tokenization_utils_base")
    logger.addHandler(caplog.handler)
    try:
        load(build_tokenizer(bos=False), ["the patient " * 50])
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.records == []


def test_bytes_of_a_document_add_up(bos_tokenizer: PreTrainedTokenizerFast) -> None:
    """With a BOS every byte of every text is predicted once."""
    blocks = load(bos_tokenizer)
    sizes = {document_hash(text): len(text.encode()) for text in TEXTS}
    totals = [0] * blocks.num_documents
    for document, num_bytes in whole(blocks).piece_bytes:
        totals[document] += num_bytes
    assert totals == [sizes[digest] for digest in blocks.documents.tolist()]


def test_bytes_without_bos_leave_out_the_context_token(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    """Without a BOS a piece's first token predicts but is not predicted; its bytes do not count."""
    batch = whole(load(plain_tokenizer))
    for (row, start, stop), (document, num_bytes) in zip(pieces(batch), batch.piece_bytes, strict=True):
        assert batch.document[row, start] == document
        text = plain_tokenizer.decode(batch.input_ids[row, start + 1 : stop].tolist())
        if "\ufffd" not in text:
            assert num_bytes == len(text.encode())


def test_duplicates_and_exclusions_are_counted(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    """Copies and excluded documents are dropped, counted, and shown by ``describe``."""
    excluded = load(plain_tokenizer).documents[:3].tolist()
    blocks = load(plain_tokenizer, TEXTS + TEXTS, exclude=excluded, name="medical")
    assert not set(blocks.documents.tolist()) & set(excluded)
    assert (blocks.num_excluded, blocks.num_duplicates) == (3, blocks.num_documents)
    assert blocks.describe() == {
        "name": "medical",
        "split": "calibration",
        "fingerprint": blocks.fingerprint,
        "block_size": BLOCK,
        "num_blocks": blocks.num_blocks,
        "num_tokens": blocks.num_tokens,
        "num_documents": blocks.num_documents,
        "num_duplicates": blocks.num_duplicates,
        "num_excluded": 3,
    }
    json.dumps(blocks.describe())


def test_fingerprint_is_stable(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    """The same text gives the same blocks in any order, whatever padding and truncation the tokenizer was left with."""
    first = load(plain_tokenizer)
    plain_tokenizer.backend_tokenizer.enable_truncation(4)
    plain_tokenizer.backend_tokenizer.enable_padding(length=30)
    second = load(plain_tokenizer, TEXTS[::-1] + TEXTS[:3])
    assert second.fingerprint == first.fingerprint
    assert torch.equal(whole(second).input_ids, whole(first).input_ids)


def test_fingerprint_tells_inputs_apart(
    plain_tokenizer: PreTrainedTokenizerFast, bos_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Another split, text, spacing, block size, limit or tokenizer gives another fingerprint."""
    prints = {
        load(plain_tokenizer).fingerprint,
        load(bos_tokenizer).fingerprint,
        load(plain_tokenizer, TEXTS[:-5]).fingerprint,
        load(plain_tokenizer, [text.replace(" ", "  ") for text in TEXTS]).fingerprint,
        load(plain_tokenizer, block_size=BLOCK + 1).fingerprint,
        load(plain_tokenizer, max_tokens=50).fingerprint,
        load_split(TEXTS, "test", plain_tokenizer, block_size=BLOCK, max_tokens=None).fingerprint,
    }
    assert len(prints) == 7


def test_implements_the_protocol(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    """What the stages need is there, with the right types."""
    blocks: TokenBlocks = load(plain_tokenizer)
    assert blocks.documents.dtype == torch.int64
    assert blocks.documents.tolist() == sorted(blocks.documents.tolist())
    assert {field.name for field in dataclasses.fields(blocks)} >= {
        "fingerprint",
        "documents",
        "num_tokens",
        "num_blocks",
    }  # type: ignore[arg-type]


def test_splits_of_a_spec(plain_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """A spec's text is split by its ratios; explicit files are taken whole."""
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(TEXTS))
    whole_file = CorpusSpec(calibration=str(path), test=str(path))
    by_hash = CorpusSpec(path=str(path), splits=SplitRatios(calibration=0.4, validation=0.3, test=0.3))

    def documents(spec: CorpusSpec, split: Any) -> set[int]:
        return set(load_split(spec, split, plain_tokenizer, block_size=8, max_tokens=None).documents.tolist())

    everything = {document_hash(text) for text in TEXTS}
    assert documents(whole_file, "calibration") == documents(whole_file, "test") == everything
    parts = [documents(by_hash, split) for split in ("calibration", "validation", "test")]
    assert set.union(*parts) == everything
    assert sum(map(len, parts)) == len(everything)


def test_slow_tokenizers_are_refused() -> None:
    """A tokenizer that cannot say what its tokens cover is refused by name."""

    class Slow:
        is_fast = False

    with pytest.raises(CorpusError, match="tokenizer Slow is not a fast one"):
        load(Slow())


def test_too_little_text_is_refused(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    """Less than a block is refused with corpus, split, tokens and both remedies."""
    with pytest.raises(CorpusError) as caught:
        load(plain_tokenizer, TEXTS[:8], block_size=512, name="medical")
    total = load(plain_tokenizer, TEXTS[:8]).num_tokens
    assert str(caught.value) == (
        f"calibration text of corpus 'medical' has {total} tokens; one block needs 512: give more text or lower "
        "calibrate.block_size."
    )


def test_empty_corpus_is_refused(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    """No documents, or only blank ones, is an error of its own."""
    for texts in ([], ["", " \n"]):
        with pytest.raises(CorpusError, match="corpus 'corpus' is empty: no record holds any text"):
            load(plain_tokenizer, texts)


def test_a_split_without_documents_is_refused(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    """The message gives how many documents there were; exclusions are mentioned if there are any."""
    only = next(
        text for text in TEXTS if select_documents([text], split="test", ratios=SplitRatios(), max_bytes=None).texts
    )
    with pytest.raises(CorpusError, match="1 documents gave 0 for split calibration; give more text or set splits"):
        load(plain_tokenizer, [only])
    with pytest.raises(CorpusError, match=r"gave 0 for split test \(1 were excluded\); give more text"):
        load_split([only], "test", plain_tokenizer, block_size=BLOCK, max_tokens=None, exclude=[document_hash(only)])


@pytest.mark.parametrize(("split", "stage"), [("calibration", "calibrate"), ("test", "evaluate")])
def test_a_limit_below_a_block_is_refused(plain_tokenizer: PreTrainedTokenizerFast, split: Any, stage: str) -> None:
    """When the limit is the reason, the message names the limit of that stage and not the text."""
    with pytest.raises(
        CorpusError, match=rf"max_tokens 11 is less than one block of 12 tokens: raise {stage}\.max_tokens"
    ):
        load_split(TEXTS, split, plain_tokenizer, block_size=12, max_tokens=11)


def test_a_block_must_hold_a_piece(tokenizer: PreTrainedTokenizerFast) -> None:
    """A block of one token cannot be."""
    with pytest.raises(CorpusError, match="a block of 1 tokens is too small for this tokenizer; give at least 2"):
        load(tokenizer, block_size=1)


def test_one_string_is_no_list_of_documents(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    """A string in place of a list is refused: its letters are no documents."""
    with pytest.raises(CorpusError, match="corpus 'corpus' is one string"):
        load(plain_tokenizer, "some text")  # type: ignore[arg-type]


def test_documents_in_memory_must_be_text(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    """A document that UTF-8 cannot express is refused by its number."""
    with pytest.raises(CorpusError, match=r"document 2 of corpus 'corpus' holds half a surrogate pair, U\+DC00"):
        load(plain_tokenizer, ["a", "b\udc00"])


def test_documents_without_tokens_are_left_out() -> None:
    """A text that gives no token is no document of the blocks."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[])))
    texts = ["a" * number + "b" for number in range(1, 10)]
    blocks = load(tokenizer, [*texts, *"cdefghijkl"])
    assert blocks.documents.tolist() == load(tokenizer, texts).documents.tolist()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((10, 0, 4, None), [(0, 4), (4, 8), (8, 10)]),
        ((9, 0, 4, None), [(0, 4), (4, 8)]),
        ((7, 1, 4, None), [(0, 3), (3, 6), (6, 7)]),
        ((10, 0, 4, 7), [(0, 4), (4, 7)]),
        ((10, 0, 4, 5), [(0, 4)]),
        ((10, 1, 4, 6), [(0, 3), (3, 4)]),
        ((10, 1, 4, 5), [(0, 3)]),
        ((10, 3, 5, 3), []),
        ((1, 0, 4, None), []),
        ((1, 1, 4, None), [(0, 1)]),
        ((0, 1, 4, None), []),
    ],
)
def test_cut_document(arguments: tuple[int, int, int, int | None], expected: list[tuple[int, int]]) -> None:
    """Pieces fill blocks and the limit, and none is shorter than two tokens."""
    assert cut_document(*arguments) == expected


@pytest.mark.parametrize(
    ("lengths", "open_blocks", "expected"),
    [
        ([10], 4, [[0]]),
        ([6, 7, 3, 4], 4, [[0, 3], [1, 2]]),
        ([6, 6, 4, 4], 4, [[0, 2], [1, 3]]),
        ([9, 1], 4, [[0], [1]]),
        ([5, 6, 7, 5], 2, [[0, 3], [1], [2]]),
        ([], 4, []),
    ],
)
def test_place_pieces(lengths: list[int], open_blocks: int, expected: list[list[int]]) -> None:
    """Best fit, the oldest of equals; with too many open blocks the fullest closes; no room for two tokens closes."""
    assert place_pieces(lengths, 10, open_blocks) == expected


@pytest.mark.parametrize(
    ("text", "offsets", "expected"),
    [
        ("abc", [(0, 1), (1, 3)], [0, 1, 3]),
        ("é東😀x", [(0, 1), (1, 2), (2, 3), (3, 4)], [0, 2, 5, 9, 10]),
        ("東x", [(0, 1), (0, 1), (0, 1), (1, 2)], [0, 3, 3, 3, 4]),
        ("a b", [(0, 1), (2, 3)], [0, 1, 3]),
        ("ab", [(0, 2), (0, 0), (0, 9)], [0, 2, 2, 2]),
        ("", [], [0]),
    ],
)
def test_covered_bytes(text: str, offsets: list[tuple[int, int]], expected: list[int]) -> None:
    """Bytes before each token's end, never falling; a shared character counts once, gaps count with what follows."""
    np.testing.assert_array_equal(covered_bytes(text, offsets), expected)
