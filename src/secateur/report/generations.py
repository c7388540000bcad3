"""Two models' answers side by side in words: how far they agree, and the first few for Markdown."""

from __future__ import annotations

import re

from secateur.records.generations import Agreement, Answer, AnswerPair, Generations
from secateur.report.tables import Table, with_error

FEW = 3
"""Prompts that Markdown shows; the page has all."""


def agreement_table(generations: Generations) -> Table:
    """Return how many answers are equal, and how long their common start is."""
    rows = [
        [
            name_decoding(generations, one.decoding),
            f"{one.num_prompts:,}",
            f"{one.num_equal:,}",
            with_error(one.equal_ratio, one.equal_stderr),
            with_error(one.common_tokens, one.common_tokens_stderr),
            with_error(one.common_ratio, one.common_ratio_stderr),
        ]
        for one in generations.agreements()
    ]
    columns = ["answers", "prompts", "equal", "share equal", "tokens before the first difference", "share in common"]
    return Table("agreement with the dense model (± one standard error)", columns, rows)


def name_decoding(generations: Generations, decoding: str) -> str:
    """Return how tokens were chosen, such as ``sampled at 0.8``."""
    return f"sampled at {generations.temperature:g}" if decoding == "sampled" else decoding


def describe_agreement(generations: Generations) -> list[str]:
    """Return in sentences how the answers were made and how far they agree."""
    domains = ", ".join(dict.fromkeys(pair.domain for pair in generations.pairs))
    told = [
        f"The dense model and the {generations.result} one answered {_counted(len(generations.by_prompt()), 'prompt')} "
        f"from test text ({domains}), with at most {_counted(generations.max_new_tokens, 'token')} each."
    ]
    told += [_agreement(generations, one) for one in generations.agreements()]
    told.append(
        f"Sampled answers of both models are drawn with the same random numbers (seed {generations.seed}), so that "
        "equal models give equal answers. An answer that was cut is compared as far as it goes."
    )
    if generations.num_too_long:
        told.append(f"{_counted(generations.num_too_long, 'prompt')} left no room for an answer and did not count.")
    return told


def _agreement(generations: Generations, one: Agreement) -> str:
    return (
        f"Of the {one.decoding} answers {one.num_equal} of {one.num_prompts} are equal; on average they have "
        f"{one.common_ratio:.0%} of the dense answer in common before they part, {one.common_tokens:.1f} tokens."
    )


def describe_difference(pair: AnswerPair) -> str:
    """Return where two answers part, such as ``differ after 12 tokens``."""
    if pair.is_equal:
        return "equal"
    if pair.common_tokens == 0:
        return "differ from the start"
    return f"differ after {_counted(pair.common_tokens, 'token')}"


def describe_answer(answer: Answer) -> str:
    """Return how long an answer is and how it ended."""
    return f"{_counted(answer.num_tokens, 'token')}, {'ended by the model' if answer.ended else 'cut there'}"


def generations_lines(generations: Generations | None) -> list[str]:
    """Return Markdown paragraphs, below a heading: the agreement, and the first prompts with their answers.

    What differs stands after a mark, because Markdown has no way to colour it. All text is quoted as code.
    """
    if generations is None:
        return []
    lines = ["## What does it say?", " ".join(describe_agreement(generations)), agreement_table(generations).markdown()]
    shown = generations.by_prompt()[:FEW]
    for pairs in shown:
        lines += [f"Prompt ({pairs[0].domain}):", _fenced(pairs[0].prompt)]
        for pair in pairs:
            lines.append(f"{name_decoding(generations, pair.decoding).capitalize()}: {describe_difference(pair)}.")
            lines.append(
                _fenced("\n".join(f"{who}: {_marked(pair, answer)}" for who, answer in _both(generations, pair)))
            )
    left = len(generations.by_prompt()) - len(shown)
    if left:
        lines.append(f"The page shows {left} more.")
    return lines


def _both(generations: Generations, pair: AnswerPair) -> list[tuple[str, Answer]]:
    return [("dense", pair.dense), (generations.result, pair.result)]


def _marked(pair: AnswerPair, answer: Answer) -> str:
    """Return an answer with a mark where it parts from the other one."""
    if pair.is_equal:
        return answer.text
    before, differing, after = answer.parts(pair.common_characters)
    return f"{before}>>>{differing}{after}"


def _fenced(text: str) -> str:
    """Return a Markdown code block; its fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
