"""The page's section with the answers of two models side by side."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.records.generations import Answer, AnswerPair, Generations
from secateur.report.generations import (
    agreement_table,
    describe_agreement,
    describe_answer,
    describe_difference,
    name_decoding,
)
from secateur.report.page.document import Exchange, Saying, Section

_TITLE_LENGTH = 60


def generations_section(generations: Generations) -> Section:
    """Return the section on what dense model and result say to the same prompts."""
    return Section(
        "generations",
        "What does it say?",
        [
            " ".join(describe_agreement(generations)),
            "What both answers have in common is plain. The token in which an answer parts from the other one is "
            "marked, and what follows it is in colour.",
        ],
        tables=[agreement_table(generations)],
        exchanges=[_exchange(generations, pairs) for pairs in generations.by_prompt()],
    )


def _exchange(generations: Generations, pairs: Sequence[AnswerPair]) -> Exchange:
    told = "; ".join(f"{pair.decoding} {describe_difference(pair)}" for pair in pairs)
    sayings = [
        _saying(f"{who}, {name_decoding(generations, pair.decoding)}", pair, answer)
        for pair in pairs
        for who, answer in (("dense", pair.dense), (generations.result, pair.result))
    ]
    words = " ".join(pairs[0].prompt.split())
    short = words if len(words) <= _TITLE_LENGTH else words[: _TITLE_LENGTH - 1].rstrip() + "\u2026"
    return Exchange(f"{pairs[0].domain}: {short}", told, pairs[0].prompt, sayings)


def _saying(who: str, pair: AnswerPair, answer: Answer) -> Saying:
    if pair.is_equal:
        return Saying(who, answer.text, "", "", f"{describe_answer(answer)}; equal")
    before, differing, after = answer.parts(pair.common_characters)
    if visible := differing.lstrip():  # white space before the token is not worth a mark
        before, differing = before + differing[: len(differing) - len(visible)], visible
    ends = "" if differing else "; says nothing more where the other goes on"
    return Saying(who, before, differing, after, describe_answer(answer) + ends)
