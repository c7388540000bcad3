"""Results of tasks as a table and in sentences."""

from __future__ import annotations

from secateur.report.tasks import describe_tasks, tasks_lines, tasks_table

from .answers import results


def test_the_table_has_both_models_and_the_paired_difference() -> None:
    """A metric without documents has no difference, and one that should be low says so."""
    table = tasks_table(results())
    assert table.columns[2:5] == ["dense", "pruned", "paired difference"]
    acc, perplexity = table.rows
    assert acc == ["terms", "acc", "1.00 ± 0.10", "0.50 ± 0.10", "-0.500 ± 0.080", "40", "0", "1.0"]
    assert perplexity[1:5] == ["word_perplexity, lower is better", "12.5", "12.5", ""]


def test_what_is_surely_worse_is_said() -> None:
    """A fall of six standard errors is; and so is the limit, as a count or as a share."""
    told = describe_tasks(results(limit=100.0))
    assert told[1:] == [
        "Only the first 100 of each task's documents were asked.",
        "The pruned model is worse beyond its 95 % interval on terms (acc).",
    ]
    assert describe_tasks(results(limit=0.25))[1] == "Only 25% of each task's documents were asked."
    same = results()
    equal = type(same)(same.harness, None, {"dense": same.dense, "pruned": same.dense})
    assert len(describe_tasks(equal)) == 1
    assert tasks_lines(None) == []
    assert tasks_lines(same)[0] == "## Tasks"
