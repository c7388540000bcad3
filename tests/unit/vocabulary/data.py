"""The smallest tokenizer.json data of each kind, by hand."""

from __future__ import annotations

from typing import Any


def bpe_data(**changes: Any) -> dict[str, Any]:
    """Return a BPE tokenizer that spells "abcd" over "ab" and "abc"; ``changes`` replace keys of its model."""
    vocab = ["<s>", "a", "b", "c", "d", "ab", "bc", "abc", "abcd", "cab"]
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": {token: id for id, token in enumerate(vocab)},
        "merges": [["a", "b"], ["b", "c"], ["ab", "c"], ["a", "bc"], ["abc", "d"]],
    }
    return tokenizer_json(model | changes, [(0, "<s>"), (10, "<end>")])


def unigram_data(**changes: Any) -> dict[str, Any]:
    """Return a Unigram tokenizer whose lowest score is that of "xyz"; ``changes`` replace keys of its model."""
    vocab = [["<unk>", 0.0], ["a", -2.0], ["b", -3.0], ["ab", -4.0], ["xyz", -9.0], ["ba", -2.5], ["x", -5.0]]
    vocab += [["y", -5.5], ["z", -6.0]]
    model = {"type": "Unigram", "unk_id": 0, "vocab": vocab, "byte_fallback": False}
    return tokenizer_json(model | changes, [(0, "<unk>"), (9, "<end>")])


def tokenizer_json(model: dict[str, Any], added: list[tuple[int, str]]) -> dict[str, Any]:
    """Return the data around a model, with its added tokens as special ones."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, "content": content, **flags} for id, content in added],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": model,
    }
