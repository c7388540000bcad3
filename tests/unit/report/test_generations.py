"""Answers side by side in words: counts, where they part, and text that cannot break a page."""

from __future__ import annotations

from dataclasses import replace

from secateur.report.generations import (
    agreement_table,
    describe_agreement,
    describe_difference,
    generations_lines,
)

from .answers import answer, generations


def test_agreement_is_a_row_per_way_of_choosing_tokens() -> None:
    """Counts, shares and means with their standard errors."""
    greedy, sampled = agreement_table(generations()).rows
    assert greedy[:4] == ["greedy", "2", "0", "0"]
    assert sampled == ["sampled at 0.8", "2", "1", "0.50 ± 0.50", "2.5 ± 1.5", "1"]


def test_sentences_say_how_many_and_how_far() -> None:
    told = describe_agreement(generations())
    assert told[0].startswith("The dense model and the pruned one answered 2 prompts from test text (medical)")
    assert told[1].startswith("Of the greedy answers 0 of 2 are equal; on average they have ")
    assert told[1].endswith("1.5 tokens.")
    assert told[-1] == "1 prompt left no room for an answer and did not count."


def test_a_difference_is_told_in_tokens() -> None:
    first, second, third, _ = generations().pairs
    assert [describe_difference(pair) for pair in (first, second, third)] == [
        "differ after 2 tokens",
        "equal",
        "differ after 1 token",
    ]
    assert describe_difference(replace(first, result=answer("Else"))) == "differ from the start"


def test_markdown_quotes_the_first_prompts() -> None:
    """A mark stands before the token that differs; a fence in the text does not end the block."""
    text = "\n\n".join(generations_lines(generations("```\n# Head", " `````")))
    assert "dense: To be>>> safe .\npruned: To be>>> `````" in text
    assert "```text\n" not in text.split("dense: To")[0].replace("````text", "")
    assert "Sampled at 0.8: equal." in text
    assert "more" not in text.rpartition("\n")[2]
    assert generations_lines(None) == []


def test_markdown_says_how_many_prompts_are_left_out() -> None:
    found = generations()
    many = replace(found, pairs=tuple(replace(found.pairs[0], prompt=str(n)) for n in range(5)))
    assert generations_lines(many)[-1] == "The page shows 2 more."
