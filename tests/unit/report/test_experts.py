"""A family of experts in words: what came out, what weakens it, and where each model lies."""

from __future__ import annotations

from dataclasses import replace

from secateur.records.experts import ExpertFamily
from secateur.report.experts import experts_notes, experts_table, experts_tables, experts_verdict, places_table
from secateur.report.page.experts import experts_document, loss_chart
from secateur.report.page.records import TIMES

from .families import full_family


def test_the_verdict_says_how_good_each_is_on_its_own_text_and_whether_it_is_the_best_there() -> None:
    """From the best to the worst expert, and beside the others on average."""
    told = experts_verdict(full_family())
    assert told.startswith("3 experts with 25 % of channels removed, then trained: on its own text, an expert's")
    assert "The own expert is the best of the family on its text in 3 of 3 domains, in 3 surer than chance" in told
    assert f"{TIMES} that of the other experts on average (95 % interval" in told


def test_one_expert_is_not_compared_with_itself() -> None:
    """A family that has begun has a verdict too, and says what it lacks."""
    family = full_family()
    size = replace(family.size, rows=family.size.rows[:1], differences=())
    first = ExpertFamily(replace(family.matrix, sizes=(size,)), family.experts[:1])
    assert experts_verdict(first).startswith(
        "1 expert with 25 % of channels removed, then trained: on its own text, the"
    )
    assert "best of the family" not in experts_verdict(first)
    assert "No expert was asked for of legal, code." in experts_notes(first)
    assert "against" not in [section.name for section in experts_document(first).sections]


def test_what_weakens_the_evidence_is_said() -> None:
    """Failures, experts of another size, and those that are no better than chance."""
    family = full_family(failures={"code": "its exports: out of luck"})
    rows = (replace(family.size.rows[0], parameters=1), *family.size.rows[1:])
    size = replace(family.size, rows=rows)
    notes = " ".join(experts_notes(ExpertFamily(replace(family.matrix, sizes=(size,)), family.experts)))
    assert "code: its exports: out of luck" in notes
    assert "The experts keep from 1 to 3.0 M parameters" in notes
    assert "On its own text no better than a random cut of the same size: medical." in notes


def test_tables_have_only_columns_that_say_something() -> None:
    """No column of trainings or controls where there were none; places are in the family's folder."""
    family = full_family()
    assert "own text, as cut" in experts_table(family).columns
    bare = tuple(replace(one, as_cut=None, against_random=None, exports=()) for one in family.experts)
    assert list(experts_table(replace(family, experts=bare)).columns) == [
        "expert",
        "parameters",
        "weights",
        "own text",
        "other domains",
        "general text",
    ]
    assert places_table(family).rows[:2] == [
        ["medical", "trials/medical/recovered"],
        ["", "trials/medical/exports/medical.gguf"],
    ]
    assert len(experts_tables(family)) == 4


def test_a_chart_shows_all_experts_on_one_text() -> None:
    """In the order of the family, ratios to the dense model."""
    values = loss_chart(full_family(), "legal").spec["data"]["values"]
    assert [row["model"] for row in values] == ["medical", "legal", "code"]
    assert min(values, key=lambda row: row["ratio"])["model"] == "legal"
