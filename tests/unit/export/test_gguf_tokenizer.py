"""Tokenizers as GGUF metadata: the tokens llama.cpp's rules give are those of the tokenizer, or it is refused."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from gguf import TokenType
from tokenizers import Tokenizer

from secateur.errors import ExportError
from secateur.export import gguf_tokenizer
from secateur.export.gguf_tokenizer import missing_bytes, plan_tokenizer
from secateur.store.tokenizers import smaller_tokenizer
from secateur.store.tokenizers import tokenizer_data as data_of
from tests.tiny_tokenizers import BYTE_TOKENS, DOMAIN_TOKEN, SPACE, tiny_tokenizer, tokenizer_data, training_texts
from tests.unit.store.test_tokenizers import dense_tokenizer, ids_to_keep

IDS = {"bos": 1, "eos": 2}
TEXTS = training_texts()[:40]


def rows(data: dict[str, Any]) -> int:
    """Return how many ids a tokenizer has."""
    vocab = data["model"]["vocab"]
    ids = vocab.values() if isinstance(vocab, dict) else range(len(vocab))
    return 1 + max([*ids, *(token["id"] for token in data["added_tokens"])])


def plan(data: dict[str, Any], ids: dict[str, int] | None = None, spare: int = 0) -> dict[str, Any]:
    """Return a tokenizer's metadata; the ids of its first and last token are found by name."""
    found = {token["content"]: token["id"] for token in data["added_tokens"]}
    return plan_tokenizer(data, ids or {"bos": found["<s>"], "eos": found["</s>"]}, rows(data) + spare).metadata


def trimmed(kind: str) -> dict[str, Any]:
    """Return a tokenizer without the tokens that some texts do not need."""
    dense = dense_tokenizer(kind)
    return data_of(smaller_tokenizer(dense, ids_to_keep(dense, TEXTS)))


def merged_by_score(text: str, metadata: dict[str, Any]) -> list[str]:
    """Return the pieces that SentencePiece makes: the neighbours whose token has the best score are joined first."""
    scores = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"], strict=True))
    pieces = list((SPACE if metadata["tokenizer.ggml.add_space_prefix"] else "") + text.replace(" ", SPACE))
    while True:
        found = [(scores[a + b], -i) for i, (a, b) in enumerate(pairwise(pieces)) if a + b in scores]
        if not found:
            break
        place = -max(found)[1]
        pieces[place : place + 2] = ["".join(pieces[place : place + 2])]
    return [part for piece in pieces for part in ([piece] if piece in scores else bytes_of(piece))]


def bytes_of(text: str) -> list[str]:
    """Return the byte tokens of a text."""
    return [f"<0x{byte:02X}>" for byte in text.encode()]


@pytest.mark.parametrize("small", [False, True])
def test_sentencepiece_scores_merge_as_the_merges_do(small: bool) -> None:
    """Also after tokens and merges went; bytes, unknown, special and user tokens have the types llama.cpp knows."""
    data = trimmed("sentencepiece_bpe") if small else tokenizer_data("sentencepiece_bpe")
    metadata = plan(data)
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.add_bos_token"] is True and metadata["tokenizer.ggml.add_eos_token"] is False
    assert metadata["tokenizer.ggml.add_space_prefix"] is True
    backend = Tokenizer.from_str(json.dumps(data))
    for text in (*TEXTS, "naïve 漢 £"):
        assert merged_by_score(text, metadata) == backend.encode(text, add_special_tokens=False).tokens
    kinds = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True))
    assert {kinds[token] for token in BYTE_TOKENS} == {TokenType.BYTE}
    assert kinds["<unk>"] == TokenType.UNKNOWN
    assert kinds["<s>"] == TokenType.CONTROL
    assert kinds[DOMAIN_TOKEN] == TokenType.USER_DEFINED


@pytest.mark.parametrize("small", [False, True])
def test_byte_level_tokens_and_merges_are_carried_over(small: bool) -> None:
    """In order; ids that no token has are placeholders."""
    data = trimmed("byte_level") if small else tokenizer_data("byte_level")
    metadata = plan(data, spare=2)
    tokens = metadata["tokenizer.ggml.tokens"]
    assert metadata["tokenizer.ggml.model"] == "gpt2" and metadata["tokenizer.ggml.pre"] == "gpt-2"
    assert {token: number for number, token in enumerate(tokens[:-2])} == {
        **data["model"]["vocab"],
        **{token["content"]: token["id"] for token in data["added_tokens"]},
    }
    assert tokens[-2:] == [f"[PAD{len(tokens) - 2}]", f"[PAD{len(tokens) - 1}]"]
    assert metadata["tokenizer.ggml.token_type"][-2:] == [TokenType.UNUSED] * 2
    assert [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]] == [
        tuple(merge) for merge in data["model"]["merges"]
    ]


def split_by(expression: str, whole_words: bool = False, **step: Any) -> dict[str, Any]:
    """Return a byte-level tokenizer that cuts text by an expression."""
    data = tokenizer_data("byte_level")
    data["model"]["ignore_merges"] = whole_words
    cut = {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False, **step}
    tail = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [cut, tail]}
    return data


@pytest.mark.parametrize(
    ("data", "name"),
    [
        (split_by(gguf_tokenizer._LLAMA3, True), "llama-bpe"),
        (split_by(gguf_tokenizer._LLAMA3, False), "smaug-bpe"),
        (split_by(gguf_tokenizer._QWEN2), "qwen2"),
        (split_by(gguf_tokenizer._TEKKEN, True), "tekken"),
    ],
)
def test_a_split_is_known_by_its_expression(data: dict[str, Any], name: str) -> None:
    """Whole words that are looked up before merging make another name."""
    assert plan(data)["tokenizer.ggml.pre"] == name


def test_single_digits_are_smollm() -> None:
    """And without composing accents there is nothing to note; with it there is."""
    data = tokenizer_data("byte_level")
    digits = {"type": "Digits", "individual_digits": True}
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [digits, data["pre_tokenizer"]]}
    layout = plan_tokenizer(data, IDS, rows(data))
    assert (layout.metadata["tokenizer.ggml.pre"], layout.notes) == ("smollm", ())
    noted = plan_tokenizer({**data, "normalizer": {"type": "NFC"}}, IDS, rows(data))
    assert "give it composed text" in noted.notes[0]


def test_a_space_in_front_only_where_there_is_none_is_noted() -> None:
    """Which is how newer SentencePiece tokenizers are written; older ones put it everywhere."""
    data = tokenizer_data("sentencepiece_bpe") | {"normalizer": None}
    layouts = {}
    for scheme in ("always", "first", "never"):
        step = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": scheme, "split": False}
        layouts[scheme] = plan_tokenizer({**data, "pre_tokenizer": step}, IDS, rows(data))
    assert [layout.metadata["tokenizer.ggml.add_space_prefix"] for layout in layouts.values()] == [True, True, False]
    assert [len(layout.notes) for layout in layouts.values()] == [1, 1, 0]
    step = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": True}
    with pytest.raises(ExportError, match=r"cuts text by .*Metaspace"):
        plan({**data, "pre_tokenizer": step})


def test_missing_bytes_are_found_and_noted() -> None:
    """Those that no token stands for, of those that text can have."""
    assert missing_bytes(tokenizer_data("byte_level")) == set()
    data = tokenizer_data("byte_level_partial")
    assert 0x07 in missing_bytes(data) and ord("a") not in missing_bytes(data) and 0xFF not in missing_bytes(data)
    layout = plan_tokenizer(data, IDS, rows(data))
    assert "has no token for" in layout.notes[0]


def changed(kind: str, **parts: Any) -> dict[str, Any]:
    """Return a tokenizer with other parts."""
    return {**tokenizer_data(kind), **parts}


PREFIX = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (tokenizer_data("unigram"), "type Unigram cannot be written as GGUF"),
        (tokenizer_data("llama3"), "no name for how this tokenizer cuts text.*known: gpt-2, smollm, llama-bpe"),
        (split_by(gguf_tokenizer._QWEN2, True), "ignore_merges True"),
        (split_by(gguf_tokenizer._QWEN2, behavior="Removed"), "no name for how"),
        (changed("byte_level", pre_tokenizer=PREFIX), "no name for how"),
        (changed("byte_level", pre_tokenizer=None), "no name for how"),
        (changed("byte_level", normalizer={"type": "Lowercase"}), "normalises text by Lowercase"),
        (changed("sentencepiece_bpe", normalizer={"type": "NFKC"}), "normalises text by .*NFKC"),
        (changed("sentencepiece_bpe", normalizer=None), "does not write spaces as"),
        (changed("sentencepiece_bpe", pre_tokenizer={"type": "Whitespace"}), "cuts text by .*Whitespace"),
        (tokenizer_data("gemma"), "never merges .* and llama.cpp's SentencePiece tokenizer always would"),
    ],
)
def test_what_the_engine_would_cut_otherwise_is_refused(data: dict[str, Any], words: str) -> None:
    """A name that is nearly right would change the tokens without a word."""
    with pytest.raises(ExportError, match=words):
        plan(data)


def test_merges_that_scores_cannot_say_are_refused() -> None:
    """One token, made at two ranks with another between; and a byte that has no token."""
    data = tokenizer_data("sentencepiece_bpe")
    merges = data["model"]["merges"]
    results = ["".join(merge) for merge in merges]
    place = next(i for i, result in enumerate(results) if results.count(result) > 1)
    merges.append(merges.pop(place))
    with pytest.raises(ExportError, match="at two ranks"):
        plan(data)
    data = tokenizer_data("sentencepiece_bpe")
    data["model"]["vocab"]["<0xAA>x"] = data["model"]["vocab"].pop("<0xAA>")
    with pytest.raises(ExportError, match="lacks <0xAA>"):
        plan(data)


def test_what_is_put_around_a_text_must_be_the_first_and_last_token() -> None:
    """Anything else cannot be said, and ids must have a row."""
    data = tokenizer_data("byte_level")
    with pytest.raises(ExportError, match=r"can only put the first token \(id 2\)"):
        plan(data, {"bos": 2, "eos": 1})
    assert plan(changed("byte_level", post_processor=None))["tokenizer.ggml.add_bos_token"] is False
    with pytest.raises(ExportError, match="and the model's embedding 7 rows"):
        plan_tokenizer(data, IDS, 7)
    assert tiny_tokenizer("byte_level").token_to_id("<s>") == 1
