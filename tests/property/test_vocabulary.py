"""Properties of a cut vocabulary, held against the tokenizers library.

No text is lost, and a text whose tokens all stay is spelt as before.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from secateur.errors import TokenizerError
from secateur.vocabulary import TokenGraph, read_tokenizer, rebuild_tokenizer
from tests.tiny_tokenizers import DOMAIN_TOKEN, KINDS, SPECIALS, tiny_tokenizer, tokenizer_data, training_texts

SHARES = (0.0, 0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98)
"""Shares of the vocabulary that are drawn before closing; the place is the seed."""

FALLBACK_KINDS = ("sentencepiece_bpe", "gemma", "unigram_fallback")
BPE_KINDS = tuple(kind for kind in KINDS if not kind.startswith("unigram"))
ODD = (
    "👩‍⚕️",
    "e\u0301",
    "\u202eabc",
    "\x00\x04\x7f",
    "\u2581",
    "  ",
    "    ",
    "\n\n\n\n",
    "<0x41>",
    "\ufffd",
    "\U0010ffff",
)

ci = settings(max_examples=40)
seeds = st.integers(0, len(SHARES) - 1)
words = st.sampled_from(sorted({word for text in training_texts() for word in text.split()}))
characters = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
pieces = characters | words | words.map(" {}".format) | st.sampled_from([*ODD, *SPECIALS, DOMAIN_TOKEN])
texts = st.lists(pieces, max_size=8).map("".join)
every_kind = pytest.mark.parametrize("kind", KINDS)


@dataclass(frozen=True, slots=True)
class Cut:
    """A tokenizer, the ids that were kept, and the tokenizer that was rebuilt from them."""

    full: Tokenizer
    keep: tuple[int, ...]
    small: Tokenizer

    def keeps(self, text: str) -> bool:
        """Return whether all tokens of a text were kept."""
        return set(ids_of(self.full, text)) <= set(self.keep)

    def expected(self, text: str) -> list[int]:
        """Return the new ids of a text's old tokens, which were all kept."""
        places = {id: place for place, id in enumerate(self.keep)}
        return [places[id] for id in ids_of(self.full, text)]


def load(data: dict[str, Any]) -> Tokenizer:
    """Return the library's tokenizer of a tokenizer.json."""
    return Tokenizer.from_str(json.dumps(data))


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a text, without what the post-processor puts."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids


@cache
def graph_of(kind: str) -> TokenGraph:
    """Return the token graph of a tiny tokenizer."""
    return read_tokenizer(tokenizer_data(kind))


def draw_keep(graph: TokenGraph, seed: int, give_up: bool = False) -> list[int]:
    """Return random ids with all that they need, and with all or only the needed single characters."""
    draw = random.Random(seed)
    drawn = {id for id in range(graph.num_ids) if draw.random() < SHARES[seed]}
    fixed = graph.alphabet | graph.added
    if give_up:
        drawn, fixed = drawn - graph.characters, fixed - graph.characters
    return sorted(graph.closed(drawn | fixed))


@cache
def cut(kind: str, seed: int, give_up: bool = False) -> Cut:
    """Return a tiny tokenizer cut down to random tokens."""
    keep = draw_keep(graph_of(kind), seed, give_up)
    return Cut(tiny_tokenizer(kind), tuple(keep), load(rebuild_tokenizer(tokenizer_data(kind), keep)))


@cache
def kept_sentences(kind: str, seed: int) -> list[str]:
    """Return words, alone and after a space, whose tokens were all kept."""
    found = cut(kind, seed)
    every = {word for text in training_texts() for word in text.split()}
    return sorted(word for word in every if found.keeps(word) and found.keeps(f"a {word}"))


def naive_cut(data: dict[str, Any], keep: Sequence[int]) -> Tokenizer:
    """Return a BPE tokenizer cut without a closure: merges stay where their tokens do."""
    model = data["model"]
    places = {id: place for place, id in enumerate(keep)}
    model["vocab"] = {piece: places[id] for piece, id in model["vocab"].items() if id in places}
    model["merges"] = [
        [left, right] for left, right in model["merges"] if {left, right, left + right} <= model["vocab"].keys()
    ]
    return load(data | {"added_tokens": [], "post_processor": None})


@every_kind
@ci
@given(texts, seeds)
def test_any_text_comes_back_as_from_the_full_tokenizer(kind: str, text: str, seed: int) -> None:
    """Encoding and decoding gives the same text as before the cut, special tokens shown or not."""
    found = cut(kind, seed)
    before, after = ids_of(found.full, text), ids_of(found.small, text)
    assert found.small.decode(after) == found.full.decode(before)
    assert found.small.decode(after, skip_special_tokens=False) == found.full.decode(before, skip_special_tokens=False)


@pytest.mark.parametrize("kind", FALLBACK_KINDS)
@ci
@given(texts, seeds)
def test_characters_that_are_given_up_come_back_from_bytes(kind: str, text: str, seed: int) -> None:
    """Where bytes spell unknown characters, the single-character tokens may go too."""
    found = cut(kind, seed, give_up=True)
    before, after = ids_of(found.full, text), ids_of(found.small, text)
    assert found.small.decode(after, skip_special_tokens=False) == found.full.decode(before, skip_special_tokens=False)
    if found.keeps(text):
        assert after == found.expected(text)


@every_kind
@ci
@given(texts, seeds)
def test_text_whose_tokens_all_stay_is_segmented_as_before(kind: str, text: str, seed: int) -> None:
    """The new ids are the places of the old ones, whatever the text is."""
    found = cut(kind, seed)
    if found.keeps(text):
        assert ids_of(found.small, text) == found.expected(text)


@every_kind
@ci
@given(st.data(), seeds)
def test_sentences_of_kept_words_are_segmented_as_before(kind: str, data: st.DataObject, seed: int) -> None:
    """The same for text made of words that stay, so that whole words are met and not only bytes."""
    found = cut(kind, seed)
    known = kept_sentences(kind, seed)
    text = " ".join(data.draw(st.lists(st.sampled_from(known), max_size=12))) if known else ""
    assert found.keeps(text)
    assert ids_of(found.small, text) == found.expected(text)
    assert found.small.encode(text).ids[0] == found.keep.index(found.full.encode(text).ids[0])


@every_kind
@ci
@given(texts, seeds)
def test_every_new_id_is_a_kept_token_with_its_old_string(kind: str, text: str, seed: int) -> None:
    """Ids are in range, and a token keeps its string."""
    found = cut(kind, seed)
    for id in found.small.encode(text).ids:
        assert found.small.id_to_token(id) == found.full.id_to_token(found.keep[id])


@every_kind
@settings(max_examples=len(SHARES))
@given(seeds)
def test_only_the_kept_tokens_are_in_the_rebuilt_tokenizer(kind: str, seed: int) -> None:
    """All kept tokens are there, under their places, and no others."""
    found = cut(kind, seed)
    places = {id: place for place, id in enumerate(found.keep)}
    tokens = {token: places[id] for token, id in found.full.get_vocab().items() if id in places}
    assert found.small.get_vocab() == tokens


@every_kind
@settings(max_examples=6)
@given(seeds, seeds)
def test_cutting_twice_is_cutting_once(kind: str, first: int, second: int) -> None:
    """Two cuts are the cut to the tokens that both keep."""
    data = tokenizer_data(kind)
    kept = draw_keep(graph_of(kind), first)
    once = rebuild_tokenizer(data, kept)
    again = draw_keep(read_tokenizer(once), second)
    assert rebuild_tokenizer(once, again) == rebuild_tokenizer(data, [kept[place] for place in again])
    assert data == tokenizer_data(kind)


@every_kind
def test_keeping_everything_changes_nothing(kind: str) -> None:
    """With all ids kept the content is the same, also where the model has rows beyond the tokenizer's ids."""
    data, size = tokenizer_data(kind), graph_of(kind).num_ids
    assert rebuild_tokenizer(data, range(size)) == data
    assert rebuild_tokenizer(data, range(size + 7)) == data


@pytest.mark.parametrize("kind", BPE_KINDS)
def test_a_derivation_is_closed_and_made_of_parts(kind: str) -> None:
    """What a token needs lies inside it and needs nothing outside of that; closing twice adds nothing."""
    graph = graph_of(kind)
    for token in range(graph.num_ids):
        needed = graph.needs(token)
        assert all(graph.piece(part) in graph.piece(token) for part in needed)
        assert graph.closed(needed) == needed
        assert not needed or graph.is_reachable(token)


@pytest.mark.parametrize("kind", BPE_KINDS)
def test_without_the_closure_the_segmentation_changes(kind: str) -> None:
    """Kept words whose parts went are spelt otherwise, so the closure is needed, and rebuilding asks for it."""
    full, graph, data = tiny_tokenizer(kind), graph_of(kind), tokenizer_data(kind)
    drawn = draw_keep(graph, 4)
    parts = frozenset[int]().union(*map(graph.needs, drawn))
    keep = sorted({*set(drawn) - parts, *graph.alphabet, *graph.added} & set(graph.symbols.values()))
    cut_open = naive_cut(data, keep)
    changed = 0
    for word in sorted({word for text in training_texts() for word in text.split()}):
        ids = ids_of(full, word)
        if set(ids) <= set(keep):
            changed += [keep.index(id) for id in ids] != ids_of(cut_open, word)
    assert changed
    with pytest.raises(TokenizerError, match="made of tokens that would go"):
        rebuild_tokenizer(tokenizer_data(kind), sorted({*keep, *graph.added}))
