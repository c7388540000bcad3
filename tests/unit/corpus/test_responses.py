"""Packed answers: a prompt before each, and nothing but the answer's tokens learned."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from secateur.corpus.responses import renumber_responses, response_blocks, responses_split
from secateur.errors import CorpusError
from secateur.records.blocks import TokenBlocks
from secateur.records.responses import Response

from .conftest import build_tokenizer


def response(index: int, num_prompt: int, num_answer: int, *, ended: bool = True) -> Response:
    """Return an answer of made-up tokens, all different."""
    first = 10 + 40 * index
    return Response(
        index=index,
        prompt="p" * num_prompt,
        text="é" * num_answer,
        prompt_ids=tuple(range(first, first + num_prompt)),
        response_ids=tuple(range(first + num_prompt, first + num_prompt + num_answer)),
        num_prefix=1,
        ended=ended,
    )


ANSWERS = [response(0, 3, 4), response(2, 5, 1), response(3, 1, 9), response(5, 10, 1), response(6, 2, 3)]
HASHES = [100, 101, 102, 103, 104, 105, 106]


def test_exactly_the_answers_tokens_are_learned_in_order_and_from_position_0() -> None:
    """Every piece is a prompt and its answer; predicted are all tokens of the answer and none else."""
    blocks, dropped = response_blocks(ANSWERS, HASHES, block_size=12)
    assert isinstance(blocks, TokenBlocks) and dropped == 0
    assert blocks.documents.tolist() == [100, 102, 103, 105, 106]
    assert blocks.num_tokens == 39
    (batch,) = blocks.batches(blocks.num_blocks)
    for place, given in enumerate(ANSWERS):
        here = batch.document == place
        assert batch.input_ids[here].tolist() == [*given.prompt_ids, *given.response_ids]
        assert batch.input_ids[here & batch.predicted].tolist() == list(given.response_ids)
        assert batch.position_ids[here].tolist() == list(range(int(here.sum())))
        assert (place, 2 * len(given.response_ids)) in batch.piece_bytes
    assert int(batch.predicted.sum()) == sum(len(given.response_ids) for given in ANSWERS)
    assert not (batch.predicted & ((batch.position_ids == 0) | ~batch.valid)).any()


def test_long_prompts_are_dropped_and_counted_and_long_answers_cut() -> None:
    """A prompt must leave room for one token; the rest of an answer that does not fit is left out, with its bytes."""
    blocks, dropped = response_blocks(ANSWERS, HASHES, block_size=6)
    assert dropped == 1
    assert blocks.documents.tolist() == [100, 102, 103, 106]
    (batch,) = blocks.batches(10)
    assert batch.input_ids[batch.document == 2].tolist() == list(range(130, 136))
    assert batch.input_ids[(batch.document == 2) & batch.predicted].tolist() == list(range(131, 136))
    assert (2, 10) in batch.piece_bytes


def test_the_fingerprint_looks_at_tokens_and_at_what_is_learned() -> None:
    moved = Response(0, "ppp", "é", tuple(range(10, 16)), (16,), 1, True)
    prints = {
        response_blocks(answers, HASHES, block_size=size)[0].fingerprint
        for answers, size in ((ANSWERS[:1], 12), ([moved], 12), (ANSWERS[:2], 12), (ANSWERS[:1], 13))
    }
    assert len(prints) == 4
    again, _ = response_blocks(ANSWERS[:1], HASHES, block_size=12)
    assert again.fingerprint in prints


def test_nothing_to_learn_is_refused() -> None:
    with pytest.raises(CorpusError, match=r"none of 1 prompts .* leaves room for an answer in a block of 10"):
        response_blocks(ANSWERS[3:4], HASHES, block_size=10)
    with pytest.raises(CorpusError, match="prompt 1 or its answer has no tokens"):
        response_blocks([Response(1, "p", "", (1,), (), 0, False)], HASHES, block_size=10)


def test_a_smaller_vocabulary_keeps_tokens_that_stay_and_reads_the_rest_again(bos_tokenizer: Any) -> None:
    """Tokens that stay are renumbered even where the text would be cut otherwise; others come from the text."""
    small = build_tokenizer(bos=True, num_merges=5)
    keep = list(range(len(small)))
    text = " the drug"
    ids = bos_tokenizer(text, add_special_tokens=False)["input_ids"]
    letters = bos_tokenizer(list(text), add_special_tokens=False, is_split_into_words=False)["input_ids"]
    by_letter = tuple(token for letter in letters for token in letter)
    assert max(ids) >= len(small) > max(by_letter), "the test needs a token that goes"
    prompt = (1, *by_letter)
    answers = [
        Response(0, text, text, prompt, (*by_letter, 2), 1, True),
        Response(1, text, text, (1, *ids), (*ids, 2), 1, True),
        Response(2, text, text, tuple(ids), tuple(ids), 0, False),
    ]
    stayed, read, chat = renumber_responses(answers, torch.tensor(keep), small)
    anew = small(text, add_special_tokens=False)["input_ids"]
    assert (stayed.prompt_ids, stayed.response_ids) == (prompt, (*by_letter, 2))
    assert (read.prompt_ids, read.response_ids, read.num_prefix) == ((1, *anew), (*anew, 2), 1)
    assert (chat.prompt_ids, chat.response_ids, chat.num_prefix) == (tuple(anew), tuple(anew), 0)


def test_an_end_of_text_that_goes_is_left_out(bos_tokenizer: Any) -> None:
    """And numbers follow the place in ``keep``; an answer that was nothing else is gone."""
    keep = [1, 40, 41]
    answers = [Response(0, "x", "é", (40, 41), (41, 2), 0, True), Response(1, "x", "", (40,), (2,), 0, True)]
    (left,) = renumber_responses(answers, keep, bos_tokenizer)
    assert left.prompt_ids == (1, 2)
    assert left.response_ids == tuple(bos_tokenizer("é", add_special_tokens=False)["input_ids"])


def test_a_split_of_answers_takes_whole_ones_up_to_the_limit() -> None:
    """Nothing is cut, and the split is that of calibration."""
    how = {"block_size": 12, "name": "medical", "where": "domain.medical.responses"}
    whole = responses_split(ANSWERS, HASHES, max_tokens=None, **how)
    assert (whole.num_tokens, whole.split, whole.name) == (39, "calibration", "medical")
    for most, taken in ((12, 7), (13, 13), (22, 13), (23, 23), (38, 34), (100, 39)):
        part = responses_split(ANSWERS, HASHES, max_tokens=most, **how)
        assert part.num_tokens == taken
        assert part.documents.tolist() == whole.documents[: part.num_documents].tolist()


def test_less_than_a_block_of_answers_is_refused() -> None:
    how = {"name": "medical", "where": "domain.medical.responses"}
    with pytest.raises(CorpusError, match=r"2 prompts and their answers have 13 tokens; one block needs 14: .*max_new"):
        responses_split(ANSWERS[:2], HASHES, block_size=14, max_tokens=None, **how)
    with pytest.raises(CorpusError, match=r"max_tokens 11 is less than one block of 12 tokens: raise calibrate"):
        responses_split(ANSWERS, HASHES, block_size=12, max_tokens=11, **how)
