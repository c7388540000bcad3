"""A look at a vocabulary as tables and sentences, from a made-up record."""

from __future__ import annotations

from typing import Any

from secateur.records.survey import FrequencyRow, KeepRule, SurveyedText, TextCost, VocabularySurvey
from secateur.report.vocabulary import frequency_table, rules_table, survey_notes, texts_table

MET = KeepRule(
    rule={"min_count": 5},
    num_kept=25_000,
    num_chosen=24_000,
    reasons={"used by the domain's text": 24_000, "chat template": 1_000},
    parameters_removed=14_400_000,
    bytes_saved=28_800_000,
    heldout=TextCost(lost_ratio=0.00123, touched_ratio=0.25, inflation=0.0014),
)
UNMET = KeepRule(rule={"size": 1000}, problem="a vocabulary of 1,000 ids is too small: 3,000 must stay.")


def survey(**changes: Any) -> VocabularySurvey:
    """Return a survey of 50,000 ids and 50,176 rows, with one rule that can be met and one that cannot."""
    plain: dict[str, Any] = {
        "model": "org/model",
        "family": "llama",
        "tokenizer_kind": "byte-level BPE",
        "num_ids": 50_000,
        "num_rows": 50_176,
        "num_unreachable": 0,
        "smallest_size": 3_000,
        "total_parameters": 144_000_000,
        "counted": SurveyedText("notes.txt", 800, 200_000, 1_000_000),
        "heldout": SurveyedText("notes.txt", 100, 25_000, 125_000),
        "other_counted": None,
        "other_heldout": None,
        "frequencies": (FrequencyRow(100, 0.5, 0.49, 1234.5), FrequencyRow(20_000, 1.0, 0.99876, 5.0)),
        "rules": (MET, UNMET),
    }
    return VocabularySurvey(**{**plain, **changes})


def compared() -> VocabularySurvey:
    """Return the survey with another corpus."""
    other = SurveyedText("wiki.txt", 80, 20_000, 90_000)
    rows = (FrequencyRow(100, 0.5, 0.49, 1234.5, 0.3, 0.44), FrequencyRow(20_000, 1.0, 0.99876, 5.0, 0.85, 0.36))
    rule = KeepRule(**{**{name: getattr(MET, name) for name in MET.__slots__}, "other": TextCost(0.1, 1.0, 0.125)})
    return survey(other_counted=other, other_heldout=other, frequencies=rows, rules=(rule, UNMET))


def test_the_texts_say_how_much_was_read() -> None:
    """One row per split, and tokens per byte."""
    assert texts_table(survey()).rows == [
        ["counted", "notes.txt", "800", "200,000", "1,000,000", "0.2000"],
        ["held out", "notes.txt", "100", "25,000", "125,000", "0.2000"],
    ]
    assert [row[0] for row in texts_table(compared()).rows] == [
        "counted",
        "held out",
        "other, counted",
        "other, held out",
    ]


def test_the_curve_is_one_row_per_size() -> None:
    """The last row has all ids; columns for the other corpus only where there is one."""
    assert frequency_table(survey()).rows == [
        ["100", "50.000%", "49.000%", "1,234"],
        ["20,000 (all)", "100.000%", "99.876%", "5"],
    ]
    table = frequency_table(compared())
    assert table.columns[-2:] == ["of other text", "also among the other's"]
    assert table.rows[-1][-2:] == ["85.000%", "36.0%"]
    assert frequency_table(survey(frequencies=())).rows == []


def test_a_rule_is_one_row() -> None:
    """What it keeps, saves and costs; a rule that cannot be met says so, and every row is as long as the head."""
    table = rules_table(survey())
    met, unmet = table.rows
    assert met == [
        "min_count 5",
        "25,000",
        "1,000",
        "49.8%",
        "-14.4 M",
        "-10.0%",
        "-28.8 MB",
        "0.123%",
        "25.0%",
        "+0.140%",
    ]
    assert unmet[:2] == ["size 1,000", "cannot be met"] and not any(unmet[2:])
    for table in (rules_table(survey()), rules_table(compared())):
        assert {len(row) for row in table.rows} == {len(table.columns)}
    assert rules_table(compared()).rows[0][-2:] == ["+0.140%", "+12.5%"]


def test_the_notes_say_what_the_tables_do_not() -> None:
    """Why a rule cannot be met, what the tokenizer is, and that no loss was measured."""
    problem, anatomy, caveat = survey_notes(survey())
    assert problem.startswith("size 1,000 cannot be met: a vocabulary of 1,000 ids is too small")
    for words in ("llama", "byte-level BPE", "50,000 ids", "50,176 rows", "176 of them without", "3,000 ids must stay"):
        assert words in anatomy
    assert "longer sequences" in caveat and "`secateur run`" in caveat
    assert "12 tokens are made by no merge" in survey_notes(survey(num_unreachable=12))[2]
