"""Texts become the tokenizer's own tokens, whatever padding and truncation it was left with."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from secateur.corpus.tokenizing import leading_special_ids, require_fast, tokenize, tokenize_with_offsets
from secateur.errors import CorpusError

from .conftest import build_tokenizer

TEXTS = ["the patient", "", "naïve 東京 <s> and more", *(f"given {number} milligrams" for number in range(90))]


def test_leading_special_ids(plain_tokenizer: PreTrainedTokenizerFast, bos_tokenizer: PreTrainedTokenizerFast) -> None:
    """Only what the tokenizer puts before a text by itself."""
    assert leading_special_ids(plain_tokenizer) == []
    assert leading_special_ids(bos_tokenizer) == [1]


@pytest.mark.parametrize("split_special_tokens", [False, True])
def test_both_ways_give_the_tokenizers_own_tokens(split_special_tokens: bool) -> None:
    """With and without offsets the ids are those of one call per text, without special tokens around it."""
    tokenizer = build_tokenizer(bos=True)
    tokenizer.split_special_tokens = split_special_tokens
    expected = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in TEXTS]
    assert (1 in expected[2]) is not split_special_tokens
    for prepare in (_leave_padding, lambda tokenizer: None):
        prepare(tokenizer)
        assert tokenize(TEXTS, tokenizer) == expected
        prepare(tokenizer)
        found = list(tokenize_with_offsets(iter(TEXTS), tokenizer))
        assert [(text, ids) for text, ids, _ in found] == list(zip(TEXTS, expected, strict=True))
        assert [len(offsets) for _, _, offsets in found] == [len(ids) for ids in expected]


def _leave_padding(tokenizer: PreTrainedTokenizerFast) -> None:
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=30)
    tokenizer.backend_tokenizer.encode_special_tokens = not tokenizer.split_special_tokens


def test_no_text_is_no_token(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    """Nothing in, nothing out."""
    assert tokenize([], plain_tokenizer) == []
    assert list(tokenize_with_offsets([], plain_tokenizer)) == []


def test_slow_tokenizers_are_refused(plain_tokenizer: PreTrainedTokenizerFast) -> None:
    """A tokenizer that cannot say what its tokens cover is refused by name."""

    class Slow:
        is_fast = False

    require_fast(plain_tokenizer)
    for tokenizer, name in ((Slow(), "Slow"), (object(), "object")):
        with pytest.raises(CorpusError, match=f"tokenizer {name} is not a fast one"):
            require_fast(tokenizer)
