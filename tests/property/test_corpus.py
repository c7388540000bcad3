"""Properties of the corpus room: splits never overlap, samples ignore order, packing loses and invents nothing."""

from __future__ import annotations

from functools import cache
from itertools import accumulate, pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from secateur.corpus import count_split_tokens, document_hash, load_split, resegment, select_documents
from secateur.corpus.packing import PackedBlocks, covered_bytes
from secateur.corpus.pieces import MIN_PIECE_TOKENS, Piece, cut_document, place_pieces
from secateur.corpus.places import TEXT_START, count_covering, count_until, places_after, token_places
from secateur.corpus.split import SPLITS, assign_split
from secateur.errors import CorpusError
from secateur.recipe import SplitRatios
from secateur.records.token_counts import merge_token_counts

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


BYTES = {letter: byte for byte, letter in bytes_to_unicode().items()}
MERGES = [("a", "b"), ("b", "c"), ("a", "bc"), ("ab", "c"), ("Ġ", "a"), ("æ", "Ŀ"), ("Ŀ", "±"), ("c", "æ"), ("±", "a")]
"""Some overlap, so that taking one away lets another happen; some join a letter and part of the character 東."""

segmentations = st.tuples(*[st.booleans()] * len(MERGES))
mixed = st.lists(st.text(alphabet="abc 東é😀", min_size=1, max_size=24), min_size=1, max_size=8)


@cache
def byte_tokenizer(bos: bool, chosen: tuple[bool, ...] = ()) -> PreTrainedTokenizerFast:
    """Return a tokenizer of single bytes, so that characters are split over tokens, and of the chosen merges."""
    vocabulary = {"<s>": 0} | {letter: id for id, letter in enumerate(sorted(BYTES), 1)}
    merges = []
    for pair, is_chosen in zip(MERGES, chosen, strict=False):
        if is_chosen and set(pair) <= vocabulary.keys():
            merges.append(pair)
            vocabulary.setdefault("".join(pair), len(vocabulary))
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
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


@ci
@given(st.integers(0, 20), st.lists(st.tuples(st.integers(0, 20), st.integers(0, 3)), max_size=12))
def test_a_cut_behind_a_token_leaves_the_later_ones(length: int, found: list[tuple[int, int]]) -> None:
    """Whatever a tokenizer says, places ascend and its own cuts are where its tokens end."""
    places = token_places([(start, start + width) for start, width in found], length)
    assert all(first < second for first, second in pairwise([TEXT_START, *places.tolist()]))
    for index, cut in enumerate(places_after(places, length).tolist(), start=1):
        assert count_until(places, cut) == count_covering(places, cut) == index


def document_pieces(blocks: PackedBlocks) -> list[list[Piece]]:
    """Return the pieces of each document in text order."""
    found: list[list[Piece]] = [[] for _ in range(blocks.num_documents)]
    for piece in (piece for block in blocks.blocks for piece in block):
        found[piece.document].append(piece)
    return [sorted(pieces, key=lambda piece: piece.span.start) for pieces in found]  # type: ignore[union-attr]


def follows(pieces: list[Piece], tokenizer: PreTrainedTokenizerFast, text: str) -> bool:
    """Return whether the pieces' own tokens, joined, begin the text."""
    letters = "".join(letter for piece in pieces for letter in tokenizer.convert_ids_to_tokens(piece.own_ids.tolist()))
    return text.encode().startswith(bytes(BYTES[letter] for letter in letters))


def times_predicted(pieces: list[Piece], tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Return how often each byte of a document is predicted, following the bytes of its pieces' own tokens."""
    raw, times, position = text.encode(), [0] * len(text.encode()), 0
    for piece in pieces:
        tokens = tokenizer.convert_ids_to_tokens(piece.own_ids.tolist())
        for place, token in enumerate(tokens, start=piece.num_prefix):
            assert raw[position : position + len(token)] == bytes(BYTES[letter] for letter in token)
            for at in range(position, position + len(token)):
                times[at] += place >= piece.num_context
            position += len(token)
    return times


@ci
@given(mixed, st.booleans(), segmentations, segmentations, st.integers(2, 9), st.none() | st.integers(9, 40))
def test_another_tokenizer_measures_the_same_text(
    documents: list[str],
    bos: bool,
    first: tuple[bool, ...],
    second: tuple[bool, ...],
    block_size: int,
    max_tokens: int | None,
) -> None:
    """Every character that was scored is predicted, once; bytes stay; under the same tokenizer all does."""
    old, new = byte_tokenizer(bos, first), byte_tokenizer(bos, second)
    try:
        blocks = load_split(documents, "calibration", old, block_size=block_size, max_tokens=max_tokens, keep_text=True)
    except CorpusError:
        return
    other = resegment(blocks, new)
    assert torch.equal(other.documents, blocks.documents)
    for before, after, text in zip(document_pieces(blocks), document_pieces(other), blocks.texts, strict=True):
        starts = list(accumulate((len(character.encode()) for character in text), initial=0))[:-1]
        assert sum(piece.num_bytes for piece in after) == sum(piece.num_bytes for piece in before)
        if len(after) < len(before) and not follows(after, new, text):
            continue  # a piece that had nothing but context left is gone, and its tokens with it
        was, now = times_predicted(before, old, text), times_predicted(after, new, text)
        assert max(was) <= 1
        assert max(now, default=0) <= 1
        assert all(now[start] for start in starts if was[start])
    again = resegment(blocks, old)
    assert [[piece.ids.tolist() for piece in block] for block in again.blocks] == [
        [piece.ids.tolist() for piece in block] for block in blocks.blocks
    ]
    for same, batch in zip(again.batches(2), blocks.batches(2), strict=True):
        assert torch.equal(same.predicted, batch.predicted)
        assert same.piece_bytes == batch.piece_bytes


@ci
@given(texts, st.booleans(), st.integers(0, 25))
def test_counts_of_shards_add_up(documents: list[str], bos: bool, cut: int) -> None:
    """Two shards of different documents together count what the whole does."""
    documents = list({document_hash(text): text for text in documents}.values())
    tokenizer = byte_tokenizer(bos)
    try:
        whole, *shards = (
            count_split_tokens(part, "calibration", tokenizer, num_ids=len(tokenizer))
            for part in (documents, documents[:cut], documents[cut:])
        )
    except CorpusError:
        return
    merged = merge_token_counts(*shards)
    assert torch.equal(merged.counts, whole.counts)
    assert torch.equal(merged.documents, whole.documents)
    assert (merged.num_tokens, merged.num_bytes) == (whole.num_tokens, whole.num_bytes)
    assert whole.num_tokens == whole.num_bytes == int(whole.counts.sum())
