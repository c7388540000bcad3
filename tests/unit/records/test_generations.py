"""Two answers side by side: where they part, when they count as equal, and how that is summed up."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from secateur.records.generations import Answer, AnswerPair, Generations, common_length


def answer(*tokens: str, ended: bool = False) -> Answer:
    """Return an answer of these tokens."""
    ends = [len("".join(tokens[: count + 1])) for count in range(len(tokens))]
    return Answer("".join(tokens), tuple(ends), ended)


def pair(dense: Answer, result: Answer, **changes: Any) -> AnswerPair:
    """Return both answers to one prompt."""
    return replace(AnswerPair("medical", "Why?", "greedy", dense, result), **changes)


@pytest.mark.parametrize(
    ("first", "second", "length"), [("", "", 0), ("abc", "abc", 3), ("abc", "abd", 2), ("ab", "abc", 2), ("x", "y", 0)]
)
def test_the_common_start_is_counted_in_characters(first: str, second: str, length: int) -> None:
    assert common_length(first, second) == length


def test_an_answer_is_parted_at_whole_tokens() -> None:
    """Answers that part inside a token part before it, each before its own; the parts give the text back."""
    both = pair(answer("a", " bee", " c"), answer("a", " be", "ar"))
    assert both.common_characters == 4
    assert both.common_tokens == 1
    assert both.dense.parts(4) == ("a", " bee", " c")
    assert both.result.parts(4) == ("a be", "ar", "")


def test_what_ends_early_has_nothing_to_mark() -> None:
    both = pair(answer("a", ended=True), answer("a", " b"))
    assert both.dense.parts(both.common_characters) == ("a", "", "")
    assert both.result.parts(both.common_characters) == ("a", " b", "")
    assert answer().parts(0) == ("", "", "")


@pytest.mark.parametrize(
    ("dense", "result", "equal"),
    [
        (answer("a", "b"), answer("ab"), True),
        (answer("a", ended=True), answer("a", ended=True), True),
        (answer("a", "b"), answer("a"), True),
        (answer("a", "b"), answer("a", ended=True), False),
        (answer("a", ended=True), answer("a", "b"), False),
        (answer("a"), answer("b"), False),
        (answer(ended=True), answer(ended=True), True),
    ],
)
def test_answers_are_equal_as_far_as_a_cut_one_goes(dense: Answer, result: Answer, equal: bool) -> None:
    """Another segmentation makes no difference, an answer that its model ended does."""
    assert pair(dense, result).is_equal is equal
    assert not equal or pair(dense, result).common_ratio == 1


def test_agreement_is_of_each_way_of_choosing_tokens_by_itself() -> None:
    """Shares, means and errors as computed by hand for two and for one prompt."""
    same = pair(answer("a", "b"), answer("a", "b"))
    other = pair(answer("a", "b", "cd"), answer("a", "x"), prompt="Who?")
    found = Generations("pruned", (same, other, replace(other, decoding="sampled")), 0.8, 0, 8)
    greedy, sampled = found.agreements()
    assert (greedy.num_prompts, greedy.num_equal, greedy.equal_ratio, greedy.equal_stderr) == (2, 1, 0.5, 0.5)
    assert (greedy.common_tokens, greedy.common_tokens_stderr) == (1.5, 0.5)
    assert greedy.common_ratio == (1 + 1 / 4) / 2
    assert (sampled.decoding, sampled.num_equal, sampled.equal_stderr) == ("sampled", 0, math.inf)
    assert [len(pairs) for pairs in found.by_prompt()] == [1, 2]


def test_the_record_goes_through_json() -> None:
    """What is read equals what was written; an error that is not known is null there."""
    found = Generations("recovered", (pair(answer("a"), answer("\ufffd", " <b>", ended=True)),), 0.7, 3, 16, 2)
    text = json.dumps(found.to_dict(), allow_nan=False)
    assert json.loads(text)["agreement"][0]["equal_stderr"] is None
    assert Generations.from_dict(json.loads(text)) == found
    with pytest.raises(TypeError, match="schema version 0"):
        Generations.from_dict({**found.to_dict(), "schema_version": 0})
