from __future__ import annotations

from typing import Any

import pytest
from transformers import GenerationConfig

from secateur.errors import TokenizerError
from secateur.vocabulary import referenced_ids, renumber

KEEP = [0, 2, 5, 7, 9]


def test_every_named_token_is_found() -> None:
    """Alone, in lists and in nested parts; suppressed and biased tokens may go."""
    config = {
        "bos_token_id": 2,
        "eos_token_id": [5, 7],
        "pad_token_id": None,
        "sep_token_id": -1,
        "decoder_start_token_id": 0,
        "cls_token_id": True,
        "text_config": {"eos_token_id": 9, "vision": [{"image_token_index": 11}, 3]},
        "forced_decoder_ids": [[1, 13], [2, None]],
        "suppress_tokens": [20],
        "bad_words_ids": [[21]],
        "num_return_sequences": 22,
        "id2label": {0: "no", 1: "yes"},
        "sequence_bias": {(23,): 1.0},
        "eos_token": "</s>",
    }
    assert referenced_ids(config) == {0, 2, 5, 7, 9, 11, 13}
    assert referenced_ids({}) == set()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"eos_token_id": 5}, {"eos_token_id": 2}),
        ({"eos_token_id": [9, 2]}, {"eos_token_id": [4, 1]}),
        ({"pad_token_id": None, "sep_token_id": -1}, {"pad_token_id": None, "sep_token_id": -1}),
        ({"forced_eos_token_id": 7}, {"forced_eos_token_id": 3}),
        ({"suppress_tokens": [1, 2, 3, 9, 80]}, {"suppress_tokens": [1, 4]}),
        ({"begin_suppress_tokens": [-1, 7, 8]}, {"begin_suppress_tokens": [-1, 3]}),
        ({"suppress_tokens": None}, {"suppress_tokens": None}),
        ({"bad_words_ids": [[2, 5], [2, 3], [9]]}, {"bad_words_ids": [[1, 2], [4]]}),
        ({"force_words_ids": [[2, 5], [1]]}, {"force_words_ids": [[1, 2]]}),
        ({"force_words_ids": [[[2], [1]], [[1], [3]]]}, {"force_words_ids": [[[1]]]}),
        ({"forced_decoder_ids": [[1, 9], [2, None]]}, {"forced_decoder_ids": [[1, 4], [2, None]]}),
        ({"sequence_bias": [[[2, 5], -1.5], [[4], 2.0]]}, {"sequence_bias": [[[1, 2], -1.5]]}),
        ({"sequence_bias": {(2, 5): -1.5, (4,): 2.0}}, {"sequence_bias": {(1, 2): -1.5}}),
        ({"sequence_bias": None, "bad_words_ids": None}, {"sequence_bias": None, "bad_words_ids": None}),
        ({"vocab_size": 10, "text_config": {"vocab_size": 10}}, {"vocab_size": 5, "text_config": {"vocab_size": 5}}),
        ({"vocab_size": None}, {"vocab_size": None}),
        ({"decoder": [{"bos_token_id": 9}, "x"]}, {"decoder": [{"bos_token_id": 4}, "x"]}),
        ({"num_layers": 7, "id2label": {0: "no"}}, {"num_layers": 7, "id2label": {0: "no"}}),
    ],
)
def test_ids_become_their_places(value: dict[str, Any], expected: dict[str, Any]) -> None:
    """What may go is dropped, what is no id is left, and the input is not changed."""
    before = repr(value)
    assert renumber(value, KEEP) == expected
    assert repr(value) == before


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"eos_token_id": 3}, "eos_token_id = 3, which is not among the 5 kept tokens"),
        ({"eos_token_id": [2, 4]}, "eos_token_id = 4"),
        ({"pad_token_id": 32000}, "pad_token_id = 32000"),
        ({"text_config": {"bos_token_id": 1}}, "bos_token_id = 1"),
        ({"forced_decoder_ids": [[1, 3]]}, "forced_decoder_ids = 3"),
    ],
)
def test_a_named_token_that_goes_is_refused(config: dict[str, Any], message: str) -> None:
    """The message has the key and the id."""
    with pytest.raises(TokenizerError, match=message):
        renumber(config, KEEP)


def test_keep_must_ascend() -> None:
    """As for the tokenizer itself."""
    with pytest.raises(TokenizerError, match="must ascend"):
        renumber({}, [1, 0])


def test_a_generation_configuration_of_transformers_is_covered() -> None:
    """Every option whose name speaks of ids or tokens is renumbered, or known to be a count or a word."""
    known = {
        "max_new_tokens",
        "min_new_tokens",
        "num_assistant_tokens",
        "num_assistant_tokens_schedule",
        "prompt_lookup_num_tokens",
        "token_healing",
    }
    options = {key for key in vars(GenerationConfig()) if "token" in key or "ids" in key or "bias" in key}
    lists = {"suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids", "sequence_bias"}
    for key in options - known:
        value = {"sequence_bias": [[[9], 1.0]]}.get(key, [[9]] if key.endswith("_ids") else [9])
        expected = {"sequence_bias": [[[4], 1.0]]}.get(key, [[4]] if key.endswith("_ids") else [4])
        assert renumber({key: value}, KEEP) == {key: expected}
        assert (key in lists) == (not referenced_ids({key: value}))
