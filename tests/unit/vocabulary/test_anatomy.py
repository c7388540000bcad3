from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer

from secateur.errors import TokenizerError
from secateur.vocabulary import TokenGraph, read_tokenizer
from tests.tiny_tokenizers import BYTE_TOKENS, DOMAIN_TOKEN, KINDS, SPECIALS, tiny_tokenizer, tokenizer_data
from tests.unit.vocabulary.data import bpe_data, unigram_data


def strings(graph: TokenGraph, ids: frozenset[int]) -> set[str]:
    return {graph.piece(id) for id in ids}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("byte_level", "byte-level BPE"),
        ("byte_level_partial", "byte-level BPE"),
        ("llama3", "byte-level BPE"),
        ("sentencepiece_bpe", "BPE with byte fallback"),
        ("gemma", "BPE with byte fallback"),
        ("unigram", "Unigram"),
        ("unigram_fallback", "Unigram"),
    ],
)
def test_the_kind_is_named(kind: str, name: str) -> None:
    """The kind is what a reader of a report would call it."""
    assert read_tokenizer(tokenizer_data(kind)).kind == name
    assert read_tokenizer(bpe_data()).kind == "BPE"


@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_strings_are_those_of_the_library(kind: str) -> None:
    """Every id has the library's string, and there are no others."""
    graph, tokenizer = read_tokenizer(tokenizer_data(kind)), tiny_tokenizer(kind)
    assert {graph.piece(id): id for id in graph.pieces} == tokenizer.get_vocab(with_added_tokens=True)
    assert graph.num_ids == max(tokenizer.get_vocab().values()) + 1
    assert strings(graph, graph.added) >= {*SPECIALS, DOMAIN_TOKEN}


@pytest.mark.parametrize("kind", KINDS)
def test_derivations_are_what_the_library_merges(kind: str) -> None:
    """A token is reachable exactly where the library spells its own string as that one token by merging."""
    data = tokenizer_data(kind)
    graph = read_tokenizer(data)
    if graph.kind == "Unigram":
        assert all(graph.is_reachable(id) for id in graph.symbols.values())
        assert not any(graph.needs(id) for id in range(graph.num_ids))
        return
    model = Tokenizer.from_str(json.dumps(data | {"model": data["model"] | {"ignore_merges": False}})).model
    made = {id: [token.id for token in model.tokenize(piece)] == [id] for piece, id in graph.symbols.items()}
    assert {id: graph.is_reachable(id) for id in made} == made
    assert {id for id in made if graph.needs(id)} == {id for id in made if made[id] and len(graph.piece(id)) > 1}


def test_a_token_needs_the_parts_of_its_own_derivation_only() -> None:
    """The first merge by rank decides between two ways to the same string."""
    graph = read_tokenizer(bpe_data())
    assert strings(graph, graph.needs(8)) == {"a", "b", "c", "d", "ab", "abc"}
    assert strings(graph, graph.needs(6)) == {"b", "c"}
    assert graph.needs(1) == graph.needs(0) == graph.needs(10) == graph.needs(99) == frozenset()
    assert strings(graph, graph.closed([7, 10])) == {"a", "b", "c", "ab", "abc", "<end>"}
    assert graph.closed([99]) == {99}


def test_a_token_that_merging_never_makes_needs_nothing() -> None:
    """It is legal: ``ignore_merges`` may produce it."""
    graph = read_tokenizer(bpe_data())
    assert not graph.needs(9)
    assert [graph.piece(id) for id in range(graph.num_ids) if not graph.is_reachable(id)] == ["<s>", "cab", "<end>"]
    assert not graph.is_reachable(99)


def test_an_added_token_that_merging_makes_has_a_derivation() -> None:
    """It may be met without the added-token matcher, as runs of spaces are after a normalizer."""
    graph = read_tokenizer(tokenizer_data("gemma"))
    ids = {graph.piece(id): id for id in graph.pieces}
    assert ids["\u2581" * 4] in graph.added
    assert graph.needs(ids["\u2581" * 4]) == {ids["\u2581" * 2], ids["\u2581"]}


def test_merges_may_be_written_as_one_string() -> None:
    """Both forms of the file give the same graph."""
    merges = ["a b", "b c", "ab c", "a bc", "abc d"]
    assert read_tokenizer(bpe_data(merges=merges)).merges == read_tokenizer(bpe_data()).merges


def test_a_repeated_merge_has_its_last_rank() -> None:
    """As the library reads it."""
    graph = read_tokenizer(bpe_data(merges=[["a", "b"], ["b", "c"], ["ab", "c"], ["a", "bc"], ["a", "b"]]))
    assert strings(graph, graph.needs(7)) == {"a", "b", "c", "bc"}


def test_the_alphabet_is_what_cannot_be_spelt_smaller() -> None:
    """Single characters, bytes and the unknown token; for Unigram also the token with the lowest score."""
    graph = read_tokenizer(bpe_data(unk_token="cab"))
    assert strings(graph, graph.alphabet) == {"a", "b", "c", "d", "cab"}
    assert not graph.characters
    graph = read_tokenizer(unigram_data())
    assert strings(graph, graph.alphabet) == {"<unk>", "a", "b", "x", "y", "z", "xyz"}
    graph = read_tokenizer(tokenizer_data("byte_level"))
    assert len(graph.alphabet) == 256 + 1, "the bytes, and <s> for the post-processor"
    assert not graph.characters


def test_a_token_with_a_character_of_its_own_belongs_to_the_alphabet() -> None:
    """Nothing else spells it, where it can be produced at all."""
    vocab = unigram_data()["model"]["vocab"]
    graph = read_tokenizer(unigram_data(vocab=[*vocab, ["né", -3.0]]) | {"added_tokens": []})
    assert "né" in strings(graph, graph.alphabet)
    tokens = bpe_data()["model"]["vocab"] | {"né": 10}
    for ignore_merges in (False, True):
        graph = read_tokenizer(bpe_data(vocab=tokens, ignore_merges=ignore_merges) | {"added_tokens": []})
        assert ("né" in strings(graph, graph.alphabet)) == ignore_merges


@pytest.mark.parametrize("kind", ["sentencepiece_bpe", "gemma", "unigram_fallback"])
def test_characters_are_those_that_bytes_can_spell(kind: str) -> None:
    """All single characters but the space sign, which the decoder looks for, and what must not move."""
    graph = read_tokenizer(tokenizer_data(kind))
    singles = {piece for piece in graph.symbols if len(piece) == 1}
    assert strings(graph, graph.characters) >= singles - {"\u2581"} - strings(graph, graph.added) - {_lowest(kind)}
    assert "\u2581" not in strings(graph, graph.characters)
    assert strings(graph, graph.alphabet) >= {*singles, *BYTE_TOKENS, "<unk>"}


def test_without_all_byte_tokens_no_character_may_go() -> None:
    """A byte that has no token cannot spell."""
    data = tokenizer_data("sentencepiece_bpe")
    data["model"]["vocab"]["<0xff>"] = data["model"]["vocab"].pop("<0xFF>")
    graph = read_tokenizer(data)
    assert not graph.characters
    assert strings(graph, graph.alphabet) >= set(BYTE_TOKENS) - {"<0xFF>"}


def test_what_the_post_processor_and_the_padding_name_belongs_to_the_alphabet() -> None:
    """They would be wrong without it; an id that no token has is not a token."""
    data = bpe_data() | {
        "post_processor": {"type": "RobertaProcessing", "sep": ["abcd", 8], "cls": ["<s>", 0]},
        "padding": {"strategy": "BatchLongest", "pad_id": 7, "pad_token": "abc"},
    }
    assert read_tokenizer(data).alphabet == {0, 1, 2, 3, 4, 7, 8}
    data["padding"]["pad_id"] = 40
    assert read_tokenizer(data).alphabet == {0, 1, 2, 3, 4, 8}


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece_bpe", "unigram"])
def test_text_is_what_a_token_stands_for(kind: str) -> None:
    """Whole words with their space, in any script; added tokens as they are written."""
    graph = read_tokenizer(tokenizer_data(kind))
    texts = {graph.text(id) for id in graph.pieces}
    assert {" the", " ", "é", "患者", " па", DOMAIN_TOKEN, "<s>"} <= texts


def test_text_of_parts_of_characters_is_none() -> None:
    """Neither half a character nor an id without a token is text; an ASCII byte is."""
    graph = read_tokenizer(tokenizer_data("byte_level"))
    ids = {graph.piece(id): id for id in graph.pieces}
    assert (graph.text(ids["Ġ"]), graph.text(ids["Ċ"]), graph.text(ids["Ã"])) == (" ", "\n", None)
    assert graph.text(graph.num_ids) is None
    graph = read_tokenizer(tokenizer_data("sentencepiece_bpe"))
    ids = {graph.piece(id): id for id in graph.pieces}
    assert (graph.text(ids["<0x0A>"]), graph.text(ids["<0xE2>"])) == ("\n", None)
    with pytest.raises(TokenizerError, match="no token has id 1102; its ids end at 1101"):
        graph.piece(graph.num_ids)


def test_text_that_writes_no_bytes_is_taken_as_it_stands() -> None:
    """A byte-level vocabulary may hold a token with a character that is no byte's symbol."""
    data = bpe_data(vocab=bpe_data()["model"]["vocab"] | {"患": 10}) | {"added_tokens": []}
    data["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "ByteLevel", "use_regex": True}]}
    graph = read_tokenizer(data)
    assert (graph.kind, graph.text(10), graph.text(5)) == ("byte-level BPE", "患", "ab")


@pytest.mark.parametrize("kind", ["byte_level", "unigram"])
def test_old_files_name_no_model_type(kind: str) -> None:
    """The type is then known by its keys."""
    data = tokenizer_data(kind)
    expected = read_tokenizer(tokenizer_data(kind))
    del data["model"]["type"]
    assert read_tokenizer(data).kind == expected.kind


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "WordPiece"}, "a tokenizer of type WordPiece cannot be cut"),
        ({"type": "WordLevel"}, "a tokenizer of type WordLevel cannot be cut"),
        ({"dropout": 0.1}, "dropout = 0.1 cannot be cut"),
        ({"continuing_subword_prefix": "##"}, "continuing_subword_prefix = '##' cannot be cut"),
        ({"end_of_word_suffix": "</w>"}, "end_of_word_suffix = '</w>' cannot be cut"),
        ({"vocab": None}, "must map tokens to ids, not None"),
        ({"vocab": ["a", "b"]}, "must map tokens to ids"),
        ({"vocab": {"a": "0"}}, "must map tokens to ids"),
        ({"vocab": {"a": 0, "b": 0}}, "gives several tokens the same id"),
        ({"merges": None}, "without a list of merges: None"),
        ({"merges": [["a", "b", "c"]]}, "is not two tokens"),
        ({"merges": ["a b c"]}, "is not two tokens"),
        ({"merges": [3]}, "the merge 3, which is not two tokens"),
        ({"merges": [["b", "a"]]}, "merges 'b' and 'a', but model.vocab lacks one of them or their join"),
        ({"merges": [["ab", "c"]], "unk_token": "ab"}, "stands for other text than its own characters"),
    ],
)
def test_a_bpe_model_that_cannot_be_cut_is_refused(changes: dict[str, Any], message: str) -> None:
    """By name, with what was received and what to do."""
    with pytest.raises(TokenizerError, match=message) as caught:
        read_tokenizer(bpe_data(**changes))
    assert str(caught.value).endswith("Leave `vocabulary` out of prune.units.")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab": []}, "must list tokens with their scores"),
        ({"vocab": {"a": 0}}, "must list tokens with their scores"),
        ({"vocab": [["a", None]]}, "must list tokens with their scores"),
        ({"vocab": [["a", float("nan")]]}, "must list tokens with their scores"),
        ({"vocab": [["a", -1.0], ["a", -2.0]]}, "each token once"),
        ({"unk_id": 9}, "unk_id = 9, which is no token"),
        ({"unk_id": "<unk>"}, "unk_id = '<unk>', which is no token"),
    ],
)
def test_a_malformed_unigram_model_is_refused(changes: dict[str, Any], message: str) -> None:
    """By name, with what was received."""
    with pytest.raises(TokenizerError, match=message):
        read_tokenizer(unigram_data(**changes))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"model": None}, "has model = None; it must be an object"),
        ({"model": {}}, "a tokenizer of type None cannot be cut"),
        ({"added_tokens": [{"content": "<s>"}]}, "an added token without content or id"),
        ({"added_tokens": ["<s>"]}, "an added token without content or id: '<s>'"),
        (
            {"added_tokens": [{"content": "<end>", "id": 12}]},
            "'<end>' has id 12 in tokenizer.json, but loads with id 10",
        ),
        ({"added_tokens": [{"content": "a", "id": 10}]}, "'a' has id 10 in tokenizer.json, but loads with id 1"),
        ({"post_processor": {"type": "Fancy", "id": 3}}, "a post-processor of type 'Fancy' whose token ids"),
        ({"post_processor": "Fancy"}, "a post-processor of type None"),
        ({"post_processor": {"type": "BertProcessing", "sep": ["a", 1]}}, "a post-processor of type 'BertProcessing'"),
        ({"post_processor": {"type": "TemplateProcessing"}}, "a post-processor of type 'TemplateProcessing'"),
    ],
)
def test_a_malformed_file_is_refused(part: dict[str, Any], message: str) -> None:
    """Also where it would load, but with other ids than it says."""
    with pytest.raises(TokenizerError, match=message):
        read_tokenizer(bpe_data() | part)


def _lowest(kind: str) -> str:
    """Return the Unigram token with the lowest score, else the empty string."""
    vocab = tokenizer_data(kind)["model"]["vocab"]
    return min(vocab, key=lambda entry: entry[1])[0] if isinstance(vocab, list) else ""
