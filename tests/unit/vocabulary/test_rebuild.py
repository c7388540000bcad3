from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from secateur.errors import TokenizerError
from secateur.vocabulary import read_tokenizer, rebuild_tokenizer
from tests.tiny_tokenizers import KINDS, tokenizer_data, training_texts
from tests.unit.vocabulary.data import bpe_data, unigram_data

BASE = [0, 1, 2, 3, 4]
"""Ids of <s>, a, b, c and d."""


def load(data: dict[str, Any]) -> Tokenizer:
    return Tokenizer.from_str(json.dumps(data))


def test_merges_stay_where_all_three_tokens_do() -> None:
    """In their order and their form, and the input is not changed."""
    for merges in ([["a", "b"], ["b", "c"], ["ab", "c"], ["a", "bc"]], ["a b", "b c", "ab c", "a bc"]):
        data = bpe_data(merges=merges)
        rebuilt = rebuild_tokenizer(data, [*BASE, 5, 7, 10])
        assert rebuilt["model"]["vocab"] == {"<s>": 0, "a": 1, "b": 2, "c": 3, "d": 4, "ab": 5, "abc": 6}
        assert rebuilt["model"]["merges"] == [merges[0], merges[2]]
        assert [(token["id"], token["content"]) for token in rebuilt["added_tokens"]] == [(0, "<s>"), (7, "<end>")]
        assert data == bpe_data(merges=merges)
        assert load(rebuilt).encode("abcd").tokens == ["abc", "d"]


def test_everything_else_of_the_file_stays() -> None:
    """Flags, normalizer, truncation and keys we do not know."""
    data = bpe_data(fuse_unk=True, ignore_merges=True, novelty=[1]) | {
        "truncation": {"max_length": 9},
        "extra": {"id": 8},
    }
    rebuilt = rebuild_tokenizer(data, [*BASE, 10])
    for key in ("fuse_unk", "ignore_merges", "novelty", "type"):
        assert rebuilt["model"][key] == data["model"][key]
    for key in ("truncation", "extra", "normalizer", "decoder", "version"):
        assert rebuilt[key] == data[key]
    assert list(rebuilt) == list(data)


def test_rows_without_a_token_stay_rows() -> None:
    """Padded embedding rows have ids beyond the tokenizer's, and the tokenizer does not change for them."""
    assert rebuild_tokenizer(bpe_data(), [*BASE, 10, 11, 15]) == rebuild_tokenizer(bpe_data(), [*BASE, 10])
    assert rebuild_tokenizer(unigram_data(), [*range(10), 12]) == unigram_data()


def test_a_gap_that_would_move_added_tokens_is_refused() -> None:
    """The library gives added tokens ids of its own, so a file with a gap before them would load otherwise."""
    data = bpe_data(vocab={"<s>": 0, "a": 1, "b": 2, "ab": 5}, merges=[["a", "b"]])
    data["added_tokens"][1]["id"] = 4
    assert rebuild_tokenizer(data, [0, 1, 2, 3, 4, 5]) == data
    assert rebuild_tokenizer(data, [0, 1, 2, 4])["added_tokens"][1]["id"] == 3
    with pytest.raises(TokenizerError, match=r"'<end>' has id 4 in .*, but loads with id 3"):
        rebuild_tokenizer(data, [0, 1, 2, 3, 4])


def test_unknown_characters_of_unigram_score_as_before() -> None:
    """The token with the lowest score must stay: an unknown character scores 10 less than it."""
    vocab = [["<unk>", 0.0], ["a", -15.0], ["b", -16.0], ["b?", -30.0], ["ab", -1.0], ["aa", -17.0], ["abab", -200.0]]
    data = unigram_data(vocab=vocab) | {"added_tokens": []}
    rebuilt = load(rebuild_tokenizer(data, [0, 1, 2, 3, 4, 6]))
    for text in ("ab?", "?", "a?b", "abab?"):
        assert rebuilt.encode(text).tokens == load(data).encode(text).tokens
    without = load(unigram_data(vocab=vocab[:6]) | {"added_tokens": []})
    assert (rebuilt.encode("ab?").tokens, without.encode("ab?").tokens) == (["a", "b?"], ["ab", "?"])
    with pytest.raises(TokenizerError, match=r"would go: 'abab' \(id 6\)"):
        rebuild_tokenizer(data, range(6))


def test_the_unknown_token_of_unigram_is_renumbered() -> None:
    """Also where it is not the first."""
    vocab = [["a", -2.0], ["aa", -3.0], ["b", -4.0], ["<unk>", 0.0], ["bb", -3.0]]
    data = unigram_data(vocab=vocab, unk_id=3) | {"added_tokens": []}
    rebuilt = rebuild_tokenizer(data, [0, 2, 3])
    assert rebuilt["model"]["unk_id"] == 2
    assert rebuilt["model"]["vocab"] == [["a", -2.0], ["b", -4.0], ["<unk>", 0.0]]
    assert load(rebuilt).encode("a?").ids == [0, 2]
    assert (
        rebuild_tokenizer(unigram_data(vocab=vocab, unk_id=None) | {"added_tokens": []}, range(5))["model"]["unk_id"]
        is None
    )


def test_post_processors_and_padding_are_renumbered() -> None:
    """Each of the library's kinds, also inside sequences, and it loads and puts the same tokens."""
    template = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<end>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<end>": {"id": "<end>", "ids": [10, 0], "tokens": ["<end>", "<s>"]}},
    }
    byte_level = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True}
    ends = {"sep": ["<end>", 10], "cls": ["<s>", 0]}
    roberta = {"type": "RobertaProcessing", **ends, "trim_offsets": True, "add_prefix_space": False}
    padding = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 10, "pad_type_id": 0, "pad_token": "<end>"}
    for processor in (
        template,
        roberta,
        {"type": "BertProcessing", **ends},
        {"type": "Sequence", "processors": [byte_level, {"type": "Sequence", "processors": [template]}]},
        byte_level,
    ):
        data = bpe_data() | {"post_processor": processor, "padding": padding}
        rebuilt = rebuild_tokenizer(data, [*BASE, 6, 10])
        assert json.dumps(rebuilt["post_processor"]) == json.dumps(processor).replace("10", "6")
        assert rebuilt["padding"] == padding | {"pad_id": 6}
        assert load(rebuilt).encode("bcd").tokens == load(data).encode("bcd").tokens


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ([0, 1, 2, 3, 4], r"1 added tokens would go: '<end>' \(id 10\). Keep them."),
        ([0, 1, 4, 10], r"2 tokens that no smaller ones can spell would go: 'b' \(id 2\), 'c' \(id 3\)"),
        ([10], r"5 tokens that no|1 added tokens"),
        (
            [*BASE, 8, 10],
            r"1 kept tokens are made of tokens that would go: 'abcd' \(id 8\) lacks 'ab', 'abc'. Keep these",
        ),
        ([*BASE, 7, 8, 10], r"2 kept tokens .*: 'abc' \(id 7\) lacks 'ab'; 'abcd' \(id 8\) lacks 'ab'"),
        ([0, 2, 1, 3, 4, 10], "must ascend from 0 on, but 1 comes after 2"),
        ([0, 1, 1, 2, 3, 4, 10], "but 1 comes after 1"),
        ([-1, *BASE, 10], "but -1 comes after -1"),
    ],
)
def test_keeping_too_little_is_refused(keep: list[int], message: str) -> None:
    """The message names the tokens and what they lack."""
    with pytest.raises(TokenizerError, match=message):
        rebuild_tokenizer(bpe_data(), keep)


def test_dropping_the_unknown_or_lowest_token_is_refused() -> None:
    """Unigram cannot do without either."""
    with pytest.raises(TokenizerError, match=r"would go: 'xyz' \(id 4\)"):
        rebuild_tokenizer(unigram_data(), [0, 1, 2, 3, 6, 7, 8, 9])
    with pytest.raises(TokenizerError, match=r"would go: '<unk>' \(id 0\)"):
        rebuild_tokenizer(unigram_data() | {"added_tokens": []}, range(1, 9))


def test_an_id_that_padding_names_must_be_kept() -> None:
    """Even where the tokenizer has no such token."""
    data = bpe_data() | {"padding": {"pad_id": 12, "pad_token": "[PAD]"}}
    with pytest.raises(
        TokenizerError, match=r"1 ids that the post-processor or the padding names .*'no token' \(id 12\)"
    ):
        rebuild_tokenizer(data, range(11))
    assert rebuild_tokenizer(data, [*BASE, 10, 12])["padding"]["pad_id"] == 6


@pytest.mark.parametrize("kind", KINDS)
def test_it_saves_and_reloads_with_transformers(kind: str, tmp_path: Path) -> None:
    """A folder with nothing but the tokenizer's files gives the same ids."""
    data = tokenizer_data(kind)
    graph = read_tokenizer(data)
    keep = sorted(graph.closed({*range(0, graph.num_ids, 2), *graph.alphabet, *graph.added}))
    small = load(rebuild_tokenizer(data, keep))
    PreTrainedTokenizerFast(tokenizer_object=small, bos_token="<s>", eos_token="</s>").save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert len(again) == len(keep)
    for text in (*training_texts()[:5], "<s> 🙂 <|dose|>\x04"):
        ids = small.encode(text).ids
        assert again(text)["input_ids"] == ids
        assert again.decode(ids) == small.decode(ids, skip_special_tokens=False)
