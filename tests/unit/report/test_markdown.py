"""The report: everything a reader needs to judge a run, on one page."""

from __future__ import annotations

from typing import Any

from secateur.records.evaluation import Evaluation
from secateur.report.markdown import render_report

from .records import asked, evaluation, plan


def report(measured: Evaluation | None = None, **changes: Any) -> str:
    """Return a report of the made-up records."""
    return render_report(
        plan(**changes),
        measured or evaluation(),
        model_name="pico-llama",
        domains=["medical"],
        manifest={"versions": {"secateur": "0.1.0", "torch": "2"}, "model_fingerprint": "abc", "stages": {}},
        calibration_tokens_per_s={"medical": 810.0},
        recipe_yaml="model: pico\n",
    )


def test_the_report_says_what_was_done_and_on_what_evidence() -> None:
    """Title, verdict, method, budget, every table, versions and the recipe to do it again."""
    text = report()
    assert text.startswith("# pico-llama, pruned for medical\n\n14.3% fewer parameters; perplexity on held-out medical")
    for words in ("`contextual`", "{'channels': 0.25}", "`uniform`", "65,536 tokens of medical", "not calibrated on"):
        assert words in text
    for title in ("Held-out results", "Parameters", "Test text", "Speed of this run", "Plan"):
        assert f"\n## {title}" in text
    assert "Model fingerprint `abc`; secateur 0.1.0, torch 2." in text
    assert text.endswith("```yaml\nmodel: pico\n```\n")


def test_every_table_has_rows_of_one_width() -> None:
    """GitHub shows a table only where each row has as many cells as the head."""
    blocks = [block.splitlines() for block in report().split("\n\n") if block.startswith("|")]
    assert len(blocks) == 6
    for lines in blocks:
        assert len({line.count("|") for line in lines}) == 1
        assert len(lines) > 2


def test_answers_have_tables_where_questions_were_asked() -> None:
    """And no word is said of them elsewhere."""
    text = report(asked(dense=[True, False], pruned=[True, True]))
    assert "\n## Multiple choice (± one standard error)\n" in text
    assert "\n## Questions\n" in text
    assert "Multiple choice" not in report()


def test_notes_of_the_plan_are_shown() -> None:
    """What was rounded or could not be met is not hidden."""
    assert "- asked for more\n" in report(notes=("asked for more",))
    assert "\n- " not in report().partition("## ")[0]
