"""Multiple choice in tables and sentences: beside what needs no knowledge, and claims only where there is a signal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from secateur.records.evaluation import Evaluation
from secateur.report.choices import (
    choices_evidence_table,
    choices_sentences,
    choices_table,
    format_p,
    paired_answers_table,
    subjects_table,
)

from .records import asked, choices_score, evaluation

GOOD, WORSE = [True, True, True, False], [False, True, True, False]


def with_scores(answers: dict[str, Sequence[bool]], **changes: Any) -> Evaluation:
    """Return an evaluation with questions ``exam``, answered like this, with fields of the scores changed."""
    plain = asked(**answers)
    models = {
        name: replace(model, choices={n: replace(score, **changes) for n, score in model.choices.items()})
        for name, model in plain.models.items()
    }
    return replace(plain, models=models)


def test_answers_stand_beside_what_needs_no_knowledge_and_the_dense_model() -> None:
    """In percent with their errors; the difference to the dense model is paired; only who was asked has a row."""
    table = choices_table(asked(dense=GOOD, pruned=WORSE))
    guessing, same, words, dense, pruned = table.rows
    assert guessing == ["exam", "guessing", "25.0", "", "25.0", "", "", ""]
    assert same[1:3] == ["same answer always", "25.0"]
    assert words[1:3] == ["most words in common", "30 ± 10"]
    assert dense == ["exam", "dense", "75 ± 25", "", "75 ± 25", "", "0.50 ± 0.50", ""]
    assert pruned[2:4] == ["50 ± 29", "-25 ± 25"]
    assert pruned[6:] == ["0.00 ± 0.58", "-0.50 ± 0.50"]
    assert {len(row) for row in table.rows} == {len(table.columns)}


def test_without_a_signal_no_difference_is_shown() -> None:
    """Where the dense model's interval reaches the better of guessing and one answer always, per measure."""
    measured = with_scores({"dense": GOOD, "pruned": WORSE}, majority=0.5)
    dense, pruned = choices_table(measured).rows[3:]
    assert dense[2:6] == ["75 ± 25", "no signal", "75 ± 25", "no signal"]
    assert pruned[3] == pruned[5] == "no signal"
    assert pruned[7] == "-0.50 ± 0.50"
    assert paired_answers_table(measured).rows == []
    [sentence] = choices_sentences(measured)
    assert sentence.startswith("exam: no signal. The dense model answers 75.0% of 4 questions")
    assert sentence.endswith("and 50.0% need no knowledge. It says nothing about what was cut.")
    [evidence] = choices_evidence_table(measured).rows
    assert evidence[2:4] == ["50.0%", "30.1% to 95.4% (no signal)"]
    one = with_scores({"dense": GOOD, "pruned": WORSE}, item_correct=(True, False, False, False), acc=0.25)
    assert choices_sentences(one)[0].endswith("Only acc_norm can be compared.")
    assert [row[1] for row in paired_answers_table(one).rows] == ["acc_norm"]


def test_paired_tests_have_their_counts() -> None:
    """Per measure and model: the difference, who alone was right, and the exact p-value."""
    many = [True] * 12 + [False] * 2
    table = paired_answers_table(asked(dense=many, pruned=[False] * 8 + [True] * 5 + [False], random=many))
    assert {len(row) for row in table.rows} == {len(table.columns)}
    assert table.rows[0] == ["exam", "acc", "pruned", "-50 ± 17", "8", "1", "0.039"]
    assert table.rows[1][2:] == ["random", "0", "0", "0", "1"]
    assert [row[1] for row in table.rows] == ["acc", "acc", "acc_norm", "acc_norm"]
    assert (format_p(1e-9), format_p(0.0312)) == ("< 0.0001", "0.031")


def test_the_sentence_says_what_the_answers_show() -> None:
    """Both shares, the paired difference and test; and whether words in common would do."""
    measured = with_scores({"dense": [True] * 8 + [False] * 2, "pruned": [True] * 7 + [False] * 3}, overlap=0.1)
    [sentence] = choices_sentences(measured)
    assert sentence == (
        "exam: the dense model answers 80.0% of 10 questions (95 % interval 49.0% to 94.3%) right and pruned 70.0%, a "
        "difference of -10 ± 10 points; 1 are answered right by dense only and 0 by pruned only (exact McNemar test: "
        "p = 1)."
    )
    easy = with_scores({"dense": GOOD, "pruned": WORSE}, overlap=0.6)
    assert choices_sentences(easy)[0].endswith("right for 60.0%, so that these answers may need no knowledge.")
    assert choices_sentences(evaluation()) == []


def test_the_papers_scoring_has_columns_where_it_was_asked_for() -> None:
    """As the other measures, with its own difference."""
    scored = {"item_correct_perplexity": (True, True, True, True), "acc_perplexity": 1.0, "acc_perplexity_stderr": 0.0}
    table = choices_table(with_scores({"dense": GOOD, "pruned": WORSE}, **scored))
    assert table.columns[6:8] == ["acc_perplexity (%)", "to dense"]
    assert table.rows[4][6:8] == ["100", "0"]
    assert {len(row) for row in table.rows} == {len(table.columns)}


def test_subjects_have_rows_and_models_columns() -> None:
    """Shares with their errors and how many questions; no table where questions have no subjects."""
    measured = with_scores({"dense": GOOD, "pruned": WORSE}, item_subject=("law", "art", "law", "law"))
    table = subjects_table(measured)
    assert table.columns == ["questions", "subject", "asked", "guessing", "dense", "pruned"]
    assert table.rows == [
        ["exam", "art", "1", "25.0", "100", "100"],
        ["exam", "law", "3", "25.0", "67 ± 33", "33 ± 33"],
    ]
    assert subjects_table(asked(dense=GOOD)).rows == []


def test_no_questions_make_no_table() -> None:
    """Nothing is said about what was not asked."""
    for make in (choices_table, choices_evidence_table, paired_answers_table, subjects_table):
        assert make(evaluation()).rows == []


def test_the_evidence_of_answers_is_how_many_questions() -> None:
    """How many, the share to beat, the dense model's intervals, and how many prompts did not fit."""
    rows = choices_evidence_table(asked(dense=[True, False])).rows
    interval = "9.5% to 90.5% (no signal)"
    assert rows == [["exam", "2", "25.0%", interval, interval, "1", "fedcba987654"]]


@pytest.mark.parametrize("right", [0, 3, 7])
def test_an_interval_never_leaves_the_possible(right: int) -> None:
    """Shares of 0 and 1 have an interval too."""
    low, high = choices_score([True] * right + [False] * (7 - right)).interval()
    assert 0 <= low <= right / 7 <= high <= 1
    assert low < high
