"""Properties of the corpus room: splits never overlap, samples ignore order, packing loses and invents nothing."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from secateur.corpus import document_hash, load_split, select_documents
from secateur.corpus.packing import MIN_PIECE_TOKENS, covered_bytes, cut_document, place_pieces
from secateur.corpus.split import SPLITS, assign_split
from secateur.errors import CorpusError
from secateur.recipe import SplitRatios

ci = settings(deadline=None, derandomize=True)
texts = st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30), max_size=25)
spaced = st.lists(st.sampled_from(["a b", "a  b", " a b", "c", "c ", "dé", "de\u0301", "f" * 9]), max_size=25)
limits = st.none() | st.integers(1, 60)


@st.composite
def split_ratios(draw: st.DrawFn) -> SplitRatios:
    """Return any three shares that add up to one."""
    parts = draw(st.tuples(*[st.integers(1, 1000)] * 3))
    calibration, validation = parts[0] / sum(parts), parts[1] / sum(parts)
    return SplitRatios(calibration=calibration, validation=validation, test=1.0 - calibration - validation)


@cache
def byte_tokenizer(bos: bool) -> PreTrainedTokenizerFast:
    """Return a tokenizer of single bytes, so that characters are split over tokens; with or without a BOS."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={"<s>": 0} | {letter: id for id, letter in enumerate(letters, 1)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>")


@ci
@given(texts, split_ratios())
def test_splits_never_overlap_and_lose_nothing(documents: list[str], ratios: SplitRatios) -> None:
    """Every document with text is in exactly one split."""
    hashes = [
        digest
        for split in SPLITS
        for digest in select_documents(documents, split=split, ratios=ratios, max_bytes=None).hashes
    ]
    assert len(hashes) == len(set(hashes))
    assert set(hashes) == {document_hash(text) for text in documents if text.strip()}


@ci
@given(st.integers(0, 2**63 - 1), split_ratios())
def test_every_hash_has_a_split(digest: int, ratios: SplitRatios) -> None:
    """The split depends on the hash alone, and every hash has one."""
    assert assign_split(digest, ratios) == assign_split(digest, ratios)
    assert assign_split(digest, ratios) in SPLITS


@ci
@given(spaced | texts, limits, st.data())
def test_selection_ignores_order_and_copies(documents: list[str], max_bytes: int | None, data: st.DataObject) -> None:
    """Reordering changes nothing at all; adding copies changes only the counts of what was seen and dropped."""
    reference = select_documents(documents, split="test", ratios=None, max_bytes=max_bytes)
    shuffled = data.draw(st.permutations(documents))
    assert select_documents(shuffled, split="test", ratios=None, max_bytes=max_bytes) == reference
    copies = data.draw(st.lists(st.sampled_from(documents), max_size=5)) if documents else []
    more = select_documents(copies + shuffled, split="test", ratios=None, max_bytes=max_bytes)
    assert (more.texts, more.hashes) == (reference.texts, reference.hashes)


@ci
@given(texts, st.integers(1, 60), split_ratios())
def test_sample_is_a_prefix_of_the_split(documents: list[str], max_bytes: int, ratios: SplitRatios) -> None:
    """A limit takes the first documents of the whole split, and the last one taken was needed to reach it."""
    everything = select_documents(documents, split="calibration", ratios=ratios, max_bytes=None)
    sample = select_documents(documents, split="calibration", ratios=ratios, max_bytes=max_bytes)
    assert sample.texts == everything.texts[: len(sample.texts)]
    sizes = [len(text.encode()) for text in sample.texts]
    assert sum(sizes[:-1]) < max_bytes
    assert sum(sizes) >= max_bytes or sample.texts == everything.texts


@ci
@given(st.integers(0, 200), st.integers(0, 3), st.integers(0, 20), st.none() | st.integers(0, 100))
def test_cutting_keeps_tokens(num_tokens: int, num_prefix: int, extra: int, max_tokens: int | None) -> None:
    """Pieces run on from the start, fit block and limit, and leave out nothing but what cannot be a piece."""
    block_size = max(MIN_PIECE_TOKENS, num_prefix + 1) + extra
    cuts = cut_document(num_tokens, num_prefix, block_size, max_tokens)
    lengths = [num_prefix + stop - start for start, stop in cuts]
    assert all(stop == start for (_, stop), (start, _) in pairwise([(0, 0), *cuts]))
    assert all(MIN_PIECE_TOKENS <= length <= block_size for length in lengths)
    if max_tokens is not None:
        assert sum(lengths) <= max_tokens
    else:
        left_out = num_tokens - (cuts[-1][1] if cuts else 0)
        assert left_out <= (0 if num_prefix else 1)


@ci
@given(st.lists(st.integers(2, 16), max_size=120), st.integers(1, 8))
def test_placing_conserves_pieces(lengths: list[int], open_blocks: int) -> None:
    """Every piece is in exactly one block, and no block is too full."""
    blocks = place_pieces(lengths, 16, open_blocks)
    assert sorted(piece for block in blocks for piece in block) == list(range(len(lengths)))
    assert all(0 < sum(lengths[piece] for piece in block) <= 16 for block in blocks)


@ci
@given(st.text(st.characters(exclude_categories=["Cs"])), st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40))))
def test_covered_bytes_never_fall_nor_exceed_the_text(text: str, offsets: list[tuple[int, int]]) -> None:
    """Whatever a tokenizer says, bytes are counted at most once."""
    covered = covered_bytes(text, offsets).tolist()
    assert all(0 <= first <= second for first, second in pairwise(covered))
    assert covered[0] == 0
    assert covered[-1] <= len(text.encode())


@ci
@given(texts, st.booleans(), st.integers(2, 12), st.none() | st.integers(12, 80), st.integers(1, 5))
def test_packing_conserves_tokens_and_bytes(
    documents: list[str], bos: bool, block_size: int, max_tokens: int | None, batch_size: int
) -> None:
    """Blocks hold the promised tokens, pieces of one document each, and never more bytes than their texts."""
    tokenizer = byte_tokenizer(bos)
    sizes: dict[int, int] = {}
    for text in documents:
        sizes[document_hash(text)] = max(sizes.get(document_hash(text), 0), len(text.encode()))
    try:
        blocks = load_split(documents, "calibration", tokenizer, block_size=block_size, max_tokens=max_tokens)
    except CorpusError:
        return
    batches = list(blocks.batches(batch_size))
    assert sum(batch.num_tokens for batch in batches) == blocks.num_tokens >= block_size - 1
    assert sum(len(batch.input_ids) for batch in batches) == blocks.num_blocks
    if max_tokens is not None:
        assert blocks.num_tokens <= max_tokens
    totals = [0] * blocks.num_documents
    for batch in batches:
        assert batch.input_ids.shape[1] == block_size
        starts = batch.position_ids == 0
        assert starts[:, 0].all()
        assert int((starts & batch.valid).sum()) == len(batch.piece_bytes)
        inside = ~starts[:, 1:]
        assert torch.equal(batch.document[:, 1:][inside], batch.document[:, :-1][inside])
        for document, num_bytes in batch.piece_bytes:
            assert num_bytes >= 0
            totals[document] += num_bytes
    for total, digest in zip(totals, blocks.documents.tolist(), strict=True):
        assert total <= sizes[digest]
        if bos and max_tokens is None:
            assert total == sizes[digest]
