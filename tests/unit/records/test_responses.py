"""Answers survive JSON, and an answer without text is empty."""

from __future__ import annotations

import json

import pytest

from secateur.records.responses import Response

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
