"""Answers survive JSON, and an answer without text is empty."""

from __future__ import annotations

import json

import pytest

from secateur.records.responses import Response, Responses

ANSWER = Response(3, "Why?", " Because.", (1, 5, 6), (7, 8, 2), 1, True)


def test_a_response_survives_json() -> None:
    assert Response.from_dict(json.loads(json.dumps(ANSWER.to_dict()))) == ANSWER


def test_what_is_no_response_is_not_read_as_one() -> None:
    with pytest.raises(KeyError):
        Response.from_dict({"index": 3})
    with pytest.raises(TypeError):
        Response.from_dict({**ANSWER.to_dict(), "extra": 1})


def test_white_space_is_an_empty_answer() -> None:
    assert Response(0, "Why?", " \n", (1,), (4, 2), 0, True).is_empty
    assert not ANSWER.is_empty


def test_every_prompt_is_counted_once() -> None:
    """Answered, answered with nothing, or not asked."""
    counts = Responses((ANSWER, ANSWER), num_empty=3, num_too_long=4, num_unended=1).counts()
    assert counts == {"prompts": 9, "answers": 2, "empty": 3, "prompts_too_long": 4, "cut_short": 1}
