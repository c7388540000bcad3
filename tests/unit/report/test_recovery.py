"""Trainings in words and as curves."""

from __future__ import annotations

from dataclasses import replace

from secateur.records.recovery import CurvePoint, Recovery
from secateur.report.recovery import curve_table, describe_recovery

POINTS = (
    CurvePoint(0, 0.0, 0, None, {"medical": 3.0}, {"exam": 0.5}),
    CurvePoint(10, 0.5, 100, 2.0, {"medical": 2.0}, {"exam": 0.75}),
)
PLAIN = Recovery("recovered", "distill", POINTS, 10, 10, 100, 0.5, "end", None, 4.0, 50.0, "t", 7)


def test_trainings_with_other_questions_stand_in_one_table() -> None:
    """A training that was not asked a set leaves its cells empty, whichever training comes first."""
    unasked = replace(PLAIN, points=tuple(replace(point, accuracy={}) for point in POINTS))
    for recoveries in ({"a": PLAIN, "b": unasked}, {"b": unasked, "a": PLAIN}):
        table = curve_table(recoveries)
        assert table.columns[-1] == "exam accuracy"
        assert {row[0]: row[-1] for row in table.rows} == {"a": "75.0%", "b": ""}


def test_one_point_is_marked_where_rounds_meet() -> None:
    """A round that ends and the next that begins have the same step; the weights kept are the next one's."""
    met = (*POINTS, replace(POINTS[1], train_loss=None), replace(POINTS[1], step=20))
    table = curve_table({"recovered": replace(PLAIN, points=met, best_step=10, steps=20)})
    assert [row[1] for row in table.rows] == ["0", "10", "10*", "20"]


def test_the_sentence_names_no_teacher_that_it_does_not_know() -> None:
    """A record says that there was distillation, not from which model."""
    text = describe_recovery(replace(PLAIN, best_step=0))
    assert "was trained by distillation on 100 tokens (0.50 epochs, 10 steps, 7 parameters trained)" in text
    assert text.endswith("it ran to its end; the weights of step 0 were kept.")
